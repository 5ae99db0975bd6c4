"""The processes of a job that read data, as far as the cost of decoding depends on them."""

from dataclasses import dataclass

from mixtera_hpc.dataplane.reading.source import Source

__all__ = ["JobShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """The processes that read."""

    num_groups: int
    """Ranks with batches of their own."""
    copies: int
    """Processes that read the same lanes: model-parallel peers, and worker processes."""
    readers_per_node: int
    num_nodes: int | None = None
    """Nodes whose processes share decoded blocks, and read lanes that others do not read; None if none are shared."""

    @classmethod
    def of_job(cls, source: Source, num_ranks: int, ranks_per_node: int) -> "JobShape":
        """Return the shape of a job of `num_ranks`."""
        plane = source.config.dataplane
        workers = plane.workers or 1
        readers = 1 if plane.delivery == "lead" else plane.model_parallel_size
        ranks_per_node = max(min(ranks_per_node, num_ranks), 1)
        copies = readers * workers
        num_nodes: int | None = None
        if ranks_per_node * workers > 1:
            # Peers of a group that are on other nodes read the same lanes.
            copies = -(-readers // ranks_per_node)
            num_nodes = max(-(-num_ranks // ranks_per_node) // copies, 1)
        return cls(
            num_groups=max(num_ranks // plane.model_parallel_size, 1),
            copies=copies,
            readers_per_node=ranks_per_node * workers,
            num_nodes=num_nodes,
        )

    @property
    def num_decoders(self) -> int:
        """Nodes or ranks that decode for themselves."""
        return self.num_groups if self.num_nodes is None else self.num_nodes
