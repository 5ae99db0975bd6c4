"""`PlaneDataset`: a data plane as a torch `IterableDataset`, for trainers that require a `DataLoader`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.errors import ConfigError

__all__ = ["PlaneDataset"]


class PlaneDataset(IterableDataset[Any]):
    """The batches of an open `DataPlane` as a torch dataset.

    Use it with `DataLoader(dataset, batch_size=None)` or torchdata's `StatefulDataLoader`. The data plane already
    builds whole batches and reads ahead. The loader must therefore neither collate them (`batch_size=None`) nor start
    worker processes (`num_workers=0`); `dataplane.workers` reads in processes instead.

    A loader may fetch batches ahead of the trainer. `DataPlane.record` or `DataPlane.finish` says which ones the
    trainer has finished; without them the state cannot be saved. With a `StatefulDataLoader`, `state_dict()` holds the
    state of the data plane. It is the same on every rank: save one of them and load it on any number of ranks.
    """

    def __init__(self, plane: DataPlane, transform: Callable[[Batch], Any] | None = None) -> None:
        """Wrap an open data plane.

        Args:
            plane: the data plane; the caller opens and closes it.
            transform: maps each `Batch` to the value that the loader yields; called in the thread that iterates. By
                default the `Batch` itself is yielded, as `DataPlane.record` needs it.
        """
        self._plane = plane
        self._transform = transform

    def __iter__(self) -> Iterator[Any]:
        """Yield the remaining batches of the run. **Collective.**"""
        if get_worker_info() is not None:
            raise _worker_processes_error()
        self._plane.expect_loader()
        for batch in self._plane:
            yield batch if self._transform is None else self._transform(batch)

    def state_dict(self) -> dict[str, NDArray[np.uint8]]:
        """Return the state of the data plane, see `DataPlane.state_dict`. **Collective.**"""
        return self._plane.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the data plane, see `DataPlane.load_state_dict`. **Collective.**"""
        self._plane.load_state_dict(state)

    def __getstate__(self) -> Any:
        """Refuse to be pickled, which a loader does to start worker processes by spawning."""
        raise _worker_processes_error()


def _worker_processes_error() -> ConfigError:
    return ConfigError(
        "A DataLoader with num_workers > 0 got a PlaneDataset. Each worker process would open its own data plane.\n"
        "  Set num_workers=0 in the loader. To read in several processes, set dataplane.workers."
    )
