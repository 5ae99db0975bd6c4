"""Megatron's groups of ranks: the mesh that a data plane reads, and the part of a sequence that a rank computes."""

from collections.abc import Iterator

from megatron.core import parallel_state
from torch import Tensor

from mixtera_hpc.errors import ConfigError

__all__ = ["MegatronMesh", "check_groups_exist", "loss_parts", "own_loss_parts"]


class MegatronMesh:
    """Megatron's groups of ranks as the mesh that `DataPlane.open` reads; creates no further groups."""

    mesh_dim_names = ("dp", "cp")

    def size(self, dim: int) -> int:
        """Return the number of ranks along a dimension."""
        sizes = (parallel_state.get_data_parallel_world_size(), parallel_state.get_context_parallel_world_size())
        return int(sizes[dim])

    def get_local_rank(self, name: str) -> int:
        """Return the coordinate of this rank along a dimension."""
        if name == "dp":
            return int(parallel_state.get_data_parallel_rank())
        return int(parallel_state.get_context_parallel_rank())


def check_groups_exist() -> None:
    """Raise ConfigError if Megatron has not created its groups."""
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError(
            "Megatron's groups of ranks do not exist yet.\n"
            "  Call parallel_state.initialize_model_parallel(...) before MegatronData.open."
        )


def loss_parts() -> tuple[str, ...]:
    """Return the dimensions of the mesh along which ranks record parts of a sequence, for `DataPlane.open`."""
    # With one context-parallel rank, every loss belongs to a whole sequence.
    return ("cp",) if parallel_state.get_context_parallel_world_size() > 1 else ()


def own_loss_parts(loss: Tensor) -> Iterator[tuple[Tensor, slice | None]]:
    """Yield the parts of the losses of this context-parallel rank, and which tokens of the sequences they belong to.

    Megatron cuts a sequence into 2N chunks. Rank r of N has the chunks r and 2N - 1 - r, so that all have equal work.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        yield loss, None
        return
    rank = parallel_state.get_context_parallel_rank()
    length = loss.shape[1] // 2
    for part, chunk in zip(loss.split(length, dim=1), (rank, 2 * size - 1 - rank), strict=True):
        yield part, slice(chunk * length, (chunk + 1) * length)
