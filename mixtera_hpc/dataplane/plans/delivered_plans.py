"""Chunk plans that have arrived on a rank, as long as its steps or a saved state need them."""

from mixtera_hpc.core.chunk_plan import ChunkPlan

__all__ = ["DeliveredPlans"]


class DeliveredPlans:
    """The newest plans of one rank, in order of chunks."""

    def __init__(self) -> None:
        """Hold no plan."""
        self._by_chunk: dict[int, ChunkPlan] = {}

    def add(self, plan: ChunkPlan) -> None:
        """Hold a plan that follows those added before."""
        self._by_chunk[plan.chunk] = plan

    def of_chunk(self, chunk: int) -> ChunkPlan:
        """Return the plan of a chunk that was not forgotten."""
        return self._by_chunk[chunk]

    def of_step(self, data_step: int) -> ChunkPlan:
        """Return the plan that a data step lies in, or the last plan if the step is not planned yet."""
        for plan in self._by_chunk.values():
            if plan.first_step <= data_step < plan.first_step + plan.num_steps:
                return plan
        return self._by_chunk[max(self._by_chunk)]

    def forget_before(self, chunk: int, data_step: int) -> None:
        """Forget the plans of chunks before `chunk` whose steps all lie before `data_step`."""
        self._by_chunk = {
            number: plan
            for number, plan in self._by_chunk.items()
            if number >= chunk or plan.first_step + plan.num_steps > data_step
        }
