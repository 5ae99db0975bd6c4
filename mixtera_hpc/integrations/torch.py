"""`PlaneDataset`: a data plane as a torch `IterableDataset`, for trainers that require a `DataLoader`."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.collation import collate_samples

__all__ = ["PlaneDataset", "as_tensors", "micro_batches"]

CURE_FOR_HUGGING_FACE = (
    "\n  With the Hugging Face Trainer, use mixtera_hpc.integrations.transformers.PlaneTrainer instead."
)

MAX_CALLERS = 4
"""Python frames between `PlaneDataset.__iter__` and the part of a loader that stacks batches."""


class PlaneDataset(IterableDataset[Any]):
    """The batches of an open `DataPlane` as a torch dataset.

    Use it with `DataLoader(dataset, batch_size=None)` or torchdata's `StatefulDataLoader`. The data plane already
    builds whole batches, gives every rank its own part, and reads ahead. The loader must therefore neither stack them
    (`batch_size=None`) nor share them out among ranks, nor start worker processes (`num_workers=0`);
    `dataplane.workers` reads in processes instead.

    A loader may fetch batches ahead of the trainer. `DataPlane.record` or `DataPlane.finish` says which ones the
    trainer has finished; without them the state cannot be saved. With a `StatefulDataLoader`, `state_dict()` holds the
    state of the data plane. It is the same on every rank: save one of them and load it on any number of ranks.
    """

    def __init__(
        self,
        plane: DataPlane,
        collate: Callable[[Batch], Any] | None = None,
        *,
        micro_batch_size: int | None = None,
        num_micro_batches: int = 1,
        num_steps: int | None = None,
    ) -> None:
        """Wrap an open data plane.

        Args:
            plane: the data plane; the caller opens and closes it.
            collate: maps each `Batch` to the value that the loader yields; called in the thread that iterates. By
                default that is `as_tensors`.
            micro_batch_size: sequences in each batch that the loader yields, for gradient accumulation. With a batch
                ramp, larger steps have more micro-batches.
            num_micro_batches: without `micro_batch_size`, the micro-batches of every step. With a batch ramp, those of
                larger steps have more sequences. With `dataplane.sample_budget`, the budget decides instead of both.
            num_steps: the training ends after this many steps, counted from the beginning of the run. None: when the
                data ends.

        Raises:
            ConfigError: the sequences of a step cannot be cut into micro-batches of this size, or
                `dataplane.sample_budget` cuts them.
        """
        self._plane = plane
        self._collate = as_tensors if collate is None else collate
        self._num_steps = num_steps
        self._has_budget = plane.config.dataplane.sample_budget is not None
        if self._has_budget and (micro_batch_size is not None or num_micro_batches != 1):
            raise ConfigError(
                f"micro_batch_size={micro_batch_size} and num_micro_batches={num_micro_batches}, but "
                "dataplane.sample_budget cuts the samples of a step into micro-batches.\n  Remove one of them."
            )
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self._check_micro_batches()

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of the run. **Collective.**

        Raises:
            ConfigError: a loader would stack the batches, or reads in worker processes.
        """
        if get_worker_info() is not None:
            raise _worker_processes_error()
        # Only now can the loader be seen. The error waits for the first batch: after one from here, Lightning raises
        # another error while it cleans up.
        return self._batches(_stacking_error() if _is_stacked_by_loader() else None)

    def __len__(self) -> int:
        """Return the number of micro-batches of the whole run, also after a resume.

        Raises:
            TypeError: the dataset has no `num_steps`, or `dataplane.sample_budget` makes another number in each step.
        """
        if self._has_budget:
            raise TypeError(
                "With dataplane.sample_budget the number of micro-batches differs from step to step, so a PlaneDataset "
                "has no length. Count steps instead: batch['step'] is the same in all micro-batches of a step."
            )
        if self._num_steps is None:
            raise TypeError("A PlaneDataset has a length only with num_steps. Pass PlaneDataset(plane, num_steps=N).")
        if self._micro_batch_size is None:
            return self._num_steps * self._num_micro_batches
        return self._plane.num_local_sequences(self._num_steps) // self._micro_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the data plane counts epochs by itself. Loaders of accelerate call this before they iterate.

        Raises:
            ConfigError: accelerate would share out or stack the batches that the ranks already share.
        """
        _check_accelerate_loader(self)

    def state_dict(self) -> dict[str, NDArray[np.uint8]]:
        """Return the state of the data plane, see `DataPlane.state_dict`. **Collective.**"""
        return self._plane.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the data plane, see `DataPlane.load_state_dict`. **Collective.**"""
        self._plane.load_state_dict(state)

    def __getstate__(self) -> Any:
        """Refuse to be pickled, which a loader does to start worker processes by spawning."""
        raise _worker_processes_error()

    def _check_micro_batches(self) -> None:
        """Raise ConfigError unless the steps that are known to come can be cut into micro-batches."""
        name = "num_micro_batches" if self._micro_batch_size is None else "micro_batch_size"
        given = self._num_micro_batches if self._micro_batch_size is None else self._micro_batch_size
        for key, size in self._plane.local_batch_sizes.items():
            if given < 1 or size % given:
                raise ConfigError(
                    f"{name}={given} does not divide the {size} sequences that this rank gets in every step of {key}.\n"
                    f"  {key} must be micro-batch size × accumulation steps × data-parallel size."
                )

    def _batches(self, error: ConfigError | None) -> Iterator[Any]:
        if error is not None:
            raise error
        self._plane.expect_loader()
        # Before the first batch, only the last stage of a batch ramp was known to come.
        self._check_micro_batches()
        if self._is_at_end:
            return
        for batch in self._plane:
            size = self._micro_batch_size or len(batch.positions) // self._num_micro_batches
            for micro_batch in _budgeted_batches(batch) if self._has_budget else micro_batches(batch, size):
                yield self._collate(micro_batch)
            if self._is_at_end:
                return

    @property
    def _is_at_end(self) -> bool:
        return self._num_steps is not None and self._plane.next_step >= self._num_steps


_TOKEN_FIELDS = ("tokens", "loss_mask", "document_ids", "position_ids")
"""The tokens come first: trainers take the batch size from the first tensor."""


def as_tensors(batch: Batch) -> dict[str, Any]:
    """Return a batch of B sequences of T predicted tokens as a dict, which loaders can pin and move to a device.

    Returns:
        `tokens` (B, T + 1) int64, `loss_mask` (B, T) bool, `document_ids` and `position_ids` (B, T + 1) int32,
        `positions` and `domain_ids` (B,) int64, `is_padding` (B,) bool, and `step`, int64 without dimensions; where a
        domain has a `loss_weight`, `loss_weights` (B,) float32. With
        `mixture.unit=samples`, the fields of `collate_samples` stand for the first four, and rows of padding are left
        out.

    Raises:
        ConfigError: samples have a field with one of these names.
    """
    if batch.payloads is None:
        rows = np.arange(len(batch.positions))
        fields = {name: torch.from_numpy(getattr(batch, name)) for name in _TOKEN_FIELDS}
    else:
        rows = np.flatnonzero(~batch.is_padding)
        fields = collate_samples([batch.payloads[row] for row in rows.tolist()])
    own = {name: torch.from_numpy(getattr(batch, name)[rows]) for name in ("positions", "domain_ids", "is_padding")}
    if batch.loss_weights is not None:
        own["loss_weights"] = torch.from_numpy(batch.loss_weights[rows])
    own["step"] = torch.tensor(batch.step)
    if taken := own.keys() & fields.keys():
        raise ConfigError(
            f"The samples have the fields {', '.join(sorted(taken))}, which a PlaneDataset adds itself.\n"
            "  Rename them in the function of data.transform, or give PlaneDataset(collate=)."
        )
    return fields | own


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into batches of at most `size` sequences; all of them have its step."""
    if size >= len(batch.positions):
        yield batch
        return
    for start in range(0, len(batch.positions), size):
        yield _rows_of(batch, slice(start, start + size))


def _budgeted_batches(batch: Batch) -> Iterator[Batch]:
    """Yield the micro-batches of `dataplane.sample_budget`, the same number on every rank; the last may be empty."""
    for rows in batch.micro_batches:
        yield _rows_of(batch, rows)


def _rows_of(batch: Batch, rows: slice) -> Batch:
    return replace(
        batch,
        domain_ids=batch.domain_ids[rows],
        positions=batch.positions[rows],
        tokens=batch.tokens[rows],
        loss_mask=batch.loss_mask[rows],
        document_ids=batch.document_ids[rows],
        loss_weights=None if batch.loss_weights is None else batch.loss_weights[rows],
        payloads=None if batch.payloads is None else batch.payloads[rows],
        digests=None if batch.digests is None else batch.digests[rows],
        micro_batches=(),
    )


def _is_stacked_by_loader() -> bool:
    """Return whether a loader of torch or torchdata calls, and stacks what it gets."""
    # A loader tells a dataset nothing. Its fetcher, which creates the iterator, knows whether it will stack.
    frame = sys._getframe(2)
    for _ in range(MAX_CALLERS):
        fetcher = frame.f_locals.get("self")
        if getattr(fetcher, "auto_collation", False):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _check_accelerate_loader(dataset: PlaneDataset) -> None:
    """Raise ConfigError if a loader of accelerate iterates over `dataset` in a way that changes the batches."""
    accelerate = sys.modules.get("accelerate.state")
    loader = accelerate.GradientState().active_dataloader if accelerate is not None else None
    # The loaders of accelerate name the class that they wrap as their `__class__`.
    served: Any = getattr(loader, "dataset", None)
    is_shard = type(served).__name__ == "IterableDatasetShard" and served.dataset is dataset
    if served is not dataset and not is_shard:
        return
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise _accelerate_error("dispatch_batches=True, so that only the first rank would ask for batches")
    if is_shard:
        raise _accelerate_error("dispatch_batches=False, so that every rank would keep a part of its own part")
    if getattr(loader, "use_stateful_dataloader", False):
        raise _accelerate_error("use_stateful_dataloader=True, which saves the state before a step is finished")


def _stacking_error() -> ConfigError:
    return ConfigError(
        "A DataLoader with a batch_size got a PlaneDataset, and would stack whole batches. A PlaneDataset already "
        "yields the batches of this rank.\n"
        "  Use DataLoader(PlaneDataset(plane), batch_size=None). The sizes are dataplane.global_batch_size and "
        "PlaneDataset(micro_batch_size=)." + CURE_FOR_HUGGING_FACE
    )


def _accelerate_error(setting: str) -> ConfigError:
    return ConfigError(
        f"Accelerate has wrapped the loader of a PlaneDataset with {setting}. The data plane already gives every rank "
        "its own part.\n"
        "  Iterate over DataLoader(PlaneDataset(plane), batch_size=None) itself: do not pass it to "
        "Accelerator.prepare(), and move the tensors to accelerator.device." + CURE_FOR_HUGGING_FACE
    )


def _worker_processes_error() -> ConfigError:
    return ConfigError(
        "A DataLoader with num_workers > 0 got a PlaneDataset. Each worker process would open its own data plane.\n"
        "  Set num_workers=0 in the loader. To read in several processes, set dataplane.workers."
    )
