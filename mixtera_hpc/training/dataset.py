"""A data plane as the dataset of a torch loader, for trainers that insist on one."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.errors import ConfigError

__all__ = ["PlaneDataset"]


class PlaneDataset(IterableDataset[Any]):
    """The batches of an open `DataPlane`, for `DataLoader(dataset, batch_size=None)` or torchdata's `StatefulDataLoader`.

    They are whole batches, read ahead: the loader must neither put them together nor have workers of its own
    (`dataplane.workers` reads in processes). With a `StatefulDataLoader`, its `state_dict()` is the plane's, **collective** like it,
    and only rank 0's says something: save that one, and give it back with any number of ranks.
    """

    def __init__(self, plane: DataPlane, transform: Callable[[Batch], Any] | None = None) -> None:
        """
        Args:
            transform: what is yielded of a batch, made in the thread that asks; None: the `Batch`, as `plane.record` wants it.
        """
        self._plane = plane
        self._transform = transform

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise _no_workers()
        for batch in self._plane:
            yield batch if self._transform is None else self._transform(batch)

    def state_dict(self) -> dict[str, Any]:
        """See `DataPlane.state_dict`. **Collective.**"""
        return {"plane": self._plane.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `DataPlane.load_state_dict`. **Collective.**"""
        self._plane.load_state_dict(state["plane"])

    def __getstate__(self) -> Any:
        raise _no_workers()


def _no_workers() -> ConfigError:
    return ConfigError(
        "A loader with num_workers > 0 was given a PlaneDataset: every worker would be a data plane of its own.\n"
        "  Set num_workers=0; dataplane.workers reads in processes."
    )
