"""The goals of Mixtera-HPC among the ratios of `python -m bench peers`, as rows of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench._peers.environments import OURS
from bench._peers.ratios import ratios, rounded
from bench._peers.rounds import Measured
from bench._peers.systems import SECTIONS

__all__ = ["BEST_PEER", "BEST_PUBLISHED", "GOALS", "Goal", "goal_rows"]

BEST_PEER = "the fastest other system"
"""Stands for the peer with the largest median rate; all peers shuffle. Bare loops are no peers."""
BEST_PUBLISHED = "the fastest other system as published"
"""The same among the peers that were not given a faster decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on the ratio of one system of a section to another one."""

    section: str
    """Key of the section."""
    other: str
    """Name of the other system, or one of the names above."""
    bound: float | None
    """The bound; None for a ratio that shows how much a goal can ask for."""
    of: str = ""
    """Name of the system that is compared; empty for the first of the section."""
    is_cost: bool = False
    """True if the ratio is a cost, which must not be larger than the bound; else it is a rate, at least the bound."""


GOALS = (
    Goal(section="documents", other="a positioned read and msgspec per row", bound=0.8),
    Goal(section="documents", other=BEST_PUBLISHED, bound=1.5),
    Goal(section="documents", other=BEST_PEER, bound=1.5),
    # No loop that decodes every row with msgspec is faster than one in file order.
    Goal(section="documents", of="msgspec, line by line", other=BEST_PEER, bound=None),
    Goal(section="packed", other="positioned reads, msgspec, gigatoken, packing", bound=0.85),
    Goal(section="packed", other="Hugging Face map and group_texts", bound=30),
    Goal(section="tokens", other="numpy gather, mask and document ids", bound=0.5),
    Goal(section="tokens", other="Megatron-core GPTDataset, blended", bound=5),
    Goal(section="compressed", other="streams, buffer of 10,000 rows, msgspec", bound=0.15),
    Goal(section="shards", other="5,000 shards", bound=2, is_cost=True),
    Goal(section="shards-tokens", other="420 shards", bound=1.25, is_cost=True),
    Goal(section="domains", other="1,000 domains", bound=2, is_cost=True),
)


def goal_rows(measured: Mapping[str, Sequence[Measured]]) -> list[list[str]]:
    """Return a table of the goals, with its head, given the systems of each section by its key."""
    head = ["work", "ratio", "measured", "goal", "met"]
    return [head, *(_row(goal, measured[goal.section]) for goal in GOALS if goal.section in measured)]


def _row(goal: Goal, systems: Sequence[Measured]) -> list[str]:
    section = next(section for section in SECTIONS if section.key == goal.section)
    reference = next((system for system in systems if system.name == goal.of), systems[0])
    other = _other(goal, systems)
    name = goal.other if other is None or other.name == goal.other else f"{goal.other}, {other.name}"
    what = f"cost of {name} ÷ {reference.name}" if goal.is_cost else f"{reference.name} ÷ {name}"
    bound = "the most" if goal.bound is None else f"{'≤' if goal.is_cost else '≥'} {rounded(goal.bound)}"
    ratio = ratios(reference, other) if other is not None else None
    if ratio is None:
        return [section.title, what, "not run", bound, ""]
    if goal.bound is None:
        return [section.title, what, str(ratio), bound, ""]
    is_met = ratio.median <= goal.bound if goal.is_cost else ratio.median >= goal.bound
    return [section.title, what, str(ratio), bound, "✓" if is_met else "✗"]


def _other(goal: Goal, systems: Sequence[Measured]) -> Measured | None:
    """Return the system that a goal compares with; None if it was not run."""
    peers = {s.name: s.is_published for section in SECTIONS for s in section.systems if s.environment != OURS}
    chosen = [system for system in systems if system.name == goal.other]
    if goal.other in (BEST_PEER, BEST_PUBLISHED):
        chosen = [s for s in systems if s.name in peers and (peers[s.name] or goal.other == BEST_PEER)]
    # The same rounds are compared for all of them.
    run = [(ratio.median, number) for number, system in enumerate(chosen) if (ratio := ratios(systems[0], system))]
    return chosen[min(run)[1]] if run else None
