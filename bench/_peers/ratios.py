"""Medians and ratios of measured systems, as rows of a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench._peers.rounds import Measured

__all__ = ["Spread", "ratios", "rounded", "table_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, smallest and largest value of some rounds."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median=statistics.median(values), smallest=min(values), largest=max(values))

    def __str__(self) -> str:
        return f"{rounded(self.median)} ({rounded(self.smallest)}–{rounded(self.largest)})"


def ratios(reference: Measured, other: Measured) -> Spread | None:
    """Return how often faster `reference` is than `other`, round by round; None if one of them was not run."""
    if not reference.rates or not other.rates:
        return None
    return Spread.of([a / b for a, b in zip(reference.rates, other.rates, strict=True)])


def rounded(value: float) -> str:
    """Write a number with three digits: 0.0123, 1.23, 12.3, 123, 1,230, 1.23M."""
    if value >= 1e6:
        return f"{float(f'{value / 1e6:.3g}'):,g}M"
    return f"{float(f'{value:.3g}'):,g}"


def table_rows(unit: str, measured: Sequence[Measured]) -> list[list[str]]:
    """Return the table of a section, with its head; the first system is the reference."""
    has_order = any(system.order for system in measured)
    reference = measured[0]
    name = f"{reference.name} ÷ it" if has_order else f"cost ÷ {reference.name}"
    head = ["system", "order", f"{unit} per CPU second", f"CPU ns per {unit.removesuffix('s')}", name, "CPU s"]
    rows = [head, *(_row(reference, system) for system in measured)]
    if not has_order:
        rows = [row[:1] + row[2:] for row in rows]
    return rows


def _row(reference: Measured, system: Measured) -> list[str]:
    if not system.rates:
        return [system.name, system.order, "not run", "", "", ""]
    rate = Spread.of(system.rates)
    ratio = ratios(reference, system)
    is_reference = system is reference
    return [
        system.name,
        system.order,
        str(rate),
        rounded(1e9 / rate.median),
        "1" if is_reference else str(ratio or ""),
        f"{system.cpu_s:.1f}",
    ]
