"""`MegatronData`: a data plane as the external data iterators of Megatron-LM and of loops on megatron-core.

Megatron asks for micro-batches in the middle of its pipeline schedule, and only on some ranks: usually the first
tensor-parallel rank of the first and of the last pipeline stage. There, a collective call could wait for ranks that
wait for activations of this rank. So all ranks fetch the batch of a step together before the schedule (`begin_step`),
and the iterators only hand out its micro-batches. Every rank holds the batch, so a tensor-parallel group may broadcast
it, as Megatron-LM does, or use its own copies.
"""

from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from megatron.core import parallel_state
from torch import Tensor

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.loss_weights import refuse_loss_weights
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.integrations.megatron.batch_format import BatchFormat, megatron_batch, micro_batches_of
from mixtera_hpc.integrations.megatron.parallel_groups import (
    MegatronMesh,
    check_groups_exist,
    loss_parts,
    own_loss_parts,
)
from mixtera_hpc.integrations.torch import as_tensors

__all__ = ["MegatronData", "TrainIterator", "ValidationIterator"]

Log = Callable[[dict[str, float], int], None]
"""Takes metrics by name, and the step that they belong to."""


class MegatronData:
    """The data of a training job in Megatron's groups of ranks. Every rank makes the same calls in the same order.

        with MegatronData.open(config, BatchFormat(micro_batch_size=2)) as data:
            iterator = data.train_iterator()
            while data.begin_step():
                forward_backward(forward_step, iterator, ...)  # forward_step calls data.record(iterator, loss)
                if data.stop_requested():
                    save(data.state_dict())
                    break

    A step is finished when the schedule is over: with `stop_requested`, `save_requested`, `state_dict` or the next
    `begin_step`, whichever comes first.
    """

    def __init__(self, plane: DataPlane, form: BatchFormat, log: Log, log_every: int) -> None:
        """Use `MegatronData.open`. **Collective.**"""
        self.plane = plane
        self.form = form
        self.micro_batches: list[dict[str, Tensor]] = []
        """The micro-batches of the current step."""
        self._log = log
        self._log_every = log_every
        self._completed: list[DomainStatistics] = []
        """Since the last log."""
        self._batches = iter(plane)
        self._unfinished: dict[str, Tensor] | None = None
        self._has_held_out = plane.config.query.holdout.fraction > 0
        self._held_out = plane.held_out() if self._has_held_out else None
        self.validation_number = 0
        """Validations that have ended."""
        self._saved_state: dict[str, Tensor] | None = None

    @classmethod
    def open(
        cls,
        config: Config,
        form: BatchFormat,
        folder: RunFolder | None = None,
        log: Log | None = None,
        log_every: int = 1,
    ) -> Self:
        """Open the data plane for the groups of `parallel_state`, which must be initialised. **Collective.**

        Context-parallel ranks get the same sequences, as all ranks of one model replica do.

        Args:
            folder: of the run; without one nothing is journalled, and there are no control files.
            log: called on every rank with the metrics of the domains and a step: training losses and weights when their
                reduction is complete, held-out losses after a validation.
            log_every: steps between two logs of the training.

        Raises:
            ConfigError: Megatron's groups do not exist, or the batch sizes do not fit together.
        """
        check_groups_exist()
        plane = DataPlane.open(config, folder=folder, mesh=MegatronMesh(), loss_parts=loss_parts())
        try:
            _check_format(plane, form)
            return cls(plane, form, log or _log_nothing, log_every)
        except BaseException as error:
            plane.__exit__(type(error), error, error.__traceback__)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.plane.__exit__(kind, error, trace)

    def train_iterator(self) -> "TrainIterator":
        """Return a new iterator over the micro-batches of the current step, for one model chunk."""
        return TrainIterator(self)

    def validation_iterator(self) -> "ValidationIterator | None":
        """Return an iterator over the held-out micro-batches; None without `query.holdout`."""
        return ValidationIterator(self) if self._has_held_out else None

    def begin_step(self) -> bool:
        """Fetch the batch of the next step; return False when the data ends. **Collective.**

        Call it before the forward and backward schedule, outside of it.
        """
        self._finish_step()
        batch = next(self._batches, None)
        self._log_completed(is_due=self.plane.next_step % self._log_every == 0)
        if batch is None:
            self.micro_batches = []
            return False
        self._unfinished = as_tensors(batch)
        self.micro_batches = micro_batches_of(self._unfinished, self.form)
        return True

    def record(self, data_iterator: Any, loss: Tensor) -> None:
        """Add the losses of the oldest micro-batch of an iterator that was not recorded yet.

        Call it where the loss exists: on the last pipeline stage, on every rank of it. One rank of each tensor-parallel
        group counts; context-parallel ranks each add their part. Micro-batches that Megatron computes again
        (`RerunDataIterator`) count once.

        Args:
            data_iterator: the one that was passed to `forward_step`, of a training or of a validation.
            loss: cross-entropy in nats of every token before the loss mask, shape (B, T / context-parallel size).
        """
        iterator = getattr(data_iterator, "iterable", data_iterator)
        if not isinstance(iterator, (TrainIterator, ValidationIterator)):
            raise TypeError(
                f"record() got {data_iterator!r}, but needs the data_iterator that was passed to forward_step.\n"
                "  If it is None, give the iterator to all ranks: provider.is_distributed = True."
            )
        is_repeated = getattr(data_iterator, "replaying", False)
        if parallel_state.get_tensor_model_parallel_rank() == 0 and not is_repeated:
            iterator.record(loss)

    def stop_requested(self) -> bool:
        """Finish the step and return whether all ranks should save and leave now. **Collective.**"""
        self._finish_step()
        return self.plane.stop_requested()

    def save_requested(self) -> bool:
        """Finish the step and return whether all ranks should save and continue, once per request. **Collective.**"""
        self._finish_step()
        return self.plane.save_requested()

    def end_validation(self) -> dict[str, float]:
        """Return and log the held-out loss of every domain, `held_out_loss/DOMAIN`. **Collective.**

        Call it after a validation, outside of the schedule. The next validation begins with the first batch again.
        """
        if self._held_out is None:
            return {}
        self.validation_number += 1
        step = self.plane.next_step
        losses = domain_losses([self._held_out.reduce(step)], self.plane.domain_names, "held_out_loss")
        self._log(losses, step)
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """Finish the step and return the state of the data, the same on every rank, as one tensor. **Collective.**"""
        self._finish_step()
        state = {name: torch.from_numpy(array) for name, array in self.plane.state_dict().items()}
        self._log_completed(is_due=True)
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a saved state, before the first step. **Collective.** Only that of rank 0 counts."""
        self.plane.load_state_dict(state)

    def prepare_save(self) -> None:
        """Take the state that `save_state` of the training iterators returns until the next step. **Collective.**"""
        self._saved_state = self.state_dict()

    def saved_state(self) -> dict[str, Tensor]:
        """Return the state that `prepare_save` has taken.

        Raises:
            ConfigError: a step has begun since.
        """
        if self._saved_state is None:
            raise ConfigError(
                "Megatron asks one rank for the state of its data iterator, but the state belongs to all ranks.\n"
                "  Call MegatronData.prepare_save() on every rank before save_checkpoint."
            )
        return self._saved_state

    def held_out_batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the micro-batches of one validation."""
        assert self._held_out is not None
        for batch in self._held_out.batches():
            yield from micro_batches_of(as_tensors(batch), self.form)

    def record_held_out(self, batch: dict[str, Tensor], loss: Tensor) -> None:
        """Add the losses of a held-out micro-batch."""
        assert self._held_out is not None
        for part, columns in own_loss_parts(loss):
            self._held_out.record(batch, part, tokens=columns)

    def record_train(self, batch: dict[str, Tensor], loss: Tensor) -> None:
        """Add the losses of a training micro-batch."""
        for part, columns in own_loss_parts(loss):
            self.plane.record(batch, part, tokens=columns)

    def _finish_step(self) -> None:
        # Most ranks have no losses. With this, they finish the step at the same time as those that have.
        if self._unfinished is not None:
            self.plane.finish(self._unfinished)
            self._unfinished = None
            self._saved_state = None

    def _log_completed(self, *, is_due: bool) -> None:
        """Log the mean losses of the steps whose reduction is complete, and the weights of the current chunk."""
        self._completed += self.plane.completed_statistics()
        if not is_due or not self._completed:
            return
        names = self.plane.domain_names
        metrics = domain_losses(self._completed, names, "train_loss")
        weights = zip(names, self.plane.weights.tolist(), strict=True)
        metrics.update({f"weight/{name}": weight for name, weight in weights})
        self._log(metrics, self._completed[-1].step)
        self._completed.clear()


class TrainIterator:
    """Micro-batches of the current step, in Megatron's format."""

    def __init__(self, data: MegatronData) -> None:
        self._data = data
        self._step = -1
        self._num_drawn = 0
        self._unrecorded: deque[dict[str, Tensor]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next micro-batch of the step.

        Raises:
            ConfigError: `begin_step` was not called, or all micro-batches of the step were handed out.
        """
        micro_batches = self._data.micro_batches
        step = int(micro_batches[0]["step"]) if micro_batches else -1
        if step != self._step:
            self._step = step
            self._num_drawn = 0
            # Those of the step before, on a pipeline stage without losses.
            self._unrecorded.clear()
        if self._num_drawn == len(micro_batches):
            raise _too_many_micro_batches(self._data)
        batch = micro_batches[self._num_drawn]
        self._num_drawn += 1
        self._unrecorded.append(batch)
        return megatron_batch(batch, self._data.form)

    def record(self, loss: Tensor) -> None:
        """See `MegatronData.record`."""
        self._data.record_train(_oldest(self._unrecorded), loss)

    def save_state(self) -> dict[str, Tensor]:
        """Return the state of the data for Megatron-LM's `--dataloader-save`; see `MegatronData.prepare_save`."""
        return self._data.saved_state()


class ValidationIterator:
    """Held-out micro-batches, in Megatron's format; every validation has the same ones."""

    def __init__(self, data: MegatronData) -> None:
        self._data = data
        self._number = -1
        self._batches: Iterator[dict[str, Tensor]] = iter(())
        self._unrecorded: deque[dict[str, Tensor]] = deque()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """Return the next micro-batch of the validation.

        Raises:
            ConfigError: all held-out batches were handed out.
        """
        if self._number != self._data.validation_number:
            self._number = self._data.validation_number
            self._batches = self._data.held_out_batches()
            # Those of the validation before, on a pipeline stage without losses.
            self._unrecorded.clear()
        batch = next(self._batches, None)
        if batch is None:
            raise ConfigError(
                "The validation asks for more batches than are held out.\n"
                "  Validate on fewer steps (--eval-iters), call end_validation() after each validation, or raise "
                "training.validate_steps or query.holdout.fraction."
            )
        self._unrecorded.append(batch)
        return megatron_batch(batch, self._data.form)

    def record(self, loss: Tensor) -> None:
        """See `MegatronData.record`."""
        self._data.record_held_out(_oldest(self._unrecorded), loss)


def _oldest(unrecorded: deque[dict[str, Tensor]]) -> dict[str, Tensor]:
    if not unrecorded:
        raise ValueError("record() was called more often than micro-batches were drawn from this data_iterator.")
    return unrecorded.popleft()


def _check_format(plane: DataPlane, form: BatchFormat) -> None:
    """Raise ConfigError if `plane` cannot serve micro-batches of this format."""
    if plane.config.mixture.unit != "tokens":
        raise ConfigError(
            f"mixture.unit is {plane.config.mixture.unit}, but Megatron's micro-batches hold tokens.\n"
            "  Set mixture.unit=tokens."
        )
    refuse_loss_weights(plane.config.mixture, "Megatron")
    if plane.config.dataplane.batch_schedule:
        raise ConfigError(
            "dataplane.batch_schedule is set, but all steps of a Megatron run have the same number of micro-batches.\n"
            "  Remove it. To enlarge the batch, resume with --change-batch-size and another --global-batch-size."
        )
    if form.micro_batch_size < 1 or plane.local_batch_size % form.micro_batch_size:
        raise ConfigError(
            f"micro_batch_size={form.micro_batch_size} does not divide the {plane.local_batch_size} sequences that "
            "each data-parallel rank gets in every step.\n"
            "  dataplane.global_batch_size must be micro-batch size × micro-batches × data-parallel size."
        )


def _too_many_micro_batches(data: MegatronData) -> ConfigError:
    return ConfigError(
        f"The trainer asked for more than the {len(data.micro_batches)} micro-batches of a step.\n"
        "  Call MegatronData.begin_step() on every rank before every schedule. The number of micro-batches is "
        "dataplane.global_batch_size / (micro-batch size × data-parallel size); batch-size ramp-up is not supported."
    )


def _log_nothing(metrics: dict[str, float], step: int) -> None:
    pass
