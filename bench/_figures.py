"""Lines of a benchmark's table: our figure, what it is compared with, and whether the goal is met."""

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FigureLine", "at_most", "print_header", "print_line", "rate", "ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureLine:
    """One line of the table."""

    what: str
    ours: float
    unit: str
    limit: str
    """Name of the figure that ours is compared with."""
    other: float
    """The figure of `limit`."""
    ratio: float
    goal: str
    met: bool


def print_header() -> None:
    """Print the head of the table."""
    print(f"{'what':52} {'ours':>16}  {'compared with':44} {'figure':>10} {'ratio':>6}  goal")


def print_line(line: FigureLine) -> None:
    """Print one line of the table."""
    ours = f"{line.ours:,.4g} {line.unit}"
    missed = "" if line.met else "   MISSED"
    print(
        f"{line.what:52} {ours:>16}  {line.limit:44} {line.other:10,.4g} {line.ratio:6.2f}  {line.goal}{missed}",
        flush=True,
    )


def ratio(what: str, ours: float, unit: str, limit: str, other: float, goal: float) -> FigureLine:
    """Return a line whose goal is a ratio of at least `goal`."""
    value = ours / other
    return FigureLine(
        what=what,
        ours=ours,
        unit=unit,
        limit=limit,
        other=other,
        ratio=value,
        goal=f"≥ {goal:g}",
        met=value >= goal,
    )


def at_most(what: str, ours: float, unit: str, limit: str, goal: float) -> FigureLine:
    """Return a line whose goal is a figure of at most `goal`."""
    return FigureLine(
        what=what,
        ours=ours,
        unit=unit,
        limit=limit,
        other=goal,
        ratio=ours / goal,
        goal=f"≤ {goal:g}",
        met=ours <= goal,
    )


def rate(work: Callable[[], int]) -> float:
    """Return what `work` counts per second of this process's CPU time."""
    began_s = time.process_time()
    count = work()
    return count / (time.process_time() - began_s)
