"""What a mixture will serve over a whole run, without expanding a single step: O(domains) per exhausted domain."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.apportion import UNIT
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.dataplane.source import Source

__all__ = ["DomainForecast", "Forecast", "forecast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainForecast:
    """One domain over the whole run."""

    name: str
    weight: float
    items: int
    """Tokens (special tokens included) or samples of one epoch."""
    served: int
    """Items served."""
    epochs: float
    runs_out_at_step: int | None
    """The step in which its first epoch ends; None when that is beyond the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The whole run."""

    unit: str
    steps_asked: int
    num_steps: int
    """Fewer than asked when the data ends before."""
    bytes_per_step: float
    """Read from disk by all ranks together, for the documents that are used."""
    domains: list[DomainForecast]


def forecast(source: Source, num_steps: int) -> Forecast:
    """Plan `num_steps` steps as one chunk: counts at its end do not depend on what happens inside it."""
    planner = replace(source.planner, chunk_steps=num_steps)
    plan, after = planner.plan(PlannerState.start(source.num_domains), source.weights)
    items = source.layout.epoch_items()
    served = after.cursors * source.grid.stride
    return Forecast(
        unit=source.config.mixture.unit,
        steps_asked=num_steps,
        num_steps=plan.num_steps,
        bytes_per_step=float(_bytes_per_item(source) @ served) / max(plan.num_steps, 1),
        domains=[
            DomainForecast(
                name=name,
                weight=float(source.weights[d]),
                items=int(items[d]),
                served=int(served[d]),
                epochs=float(served[d] / items[d]) if items[d] else 0.0,
                runs_out_at_step=_runs_out(source, d, int(items[d]), int(served[d]), plan.weights),
            )
            for d, name in enumerate(source.names)
        ],
    )


def _runs_out(source: Source, domain: int, items: int, served: int, weights: NDArray[np.int64]) -> int | None:
    """The step in which the share of `domain` passes one epoch, at its start weight."""
    if not items or served < items:
        return None
    sequences = items / source.grid.stride
    return int(sequences * UNIT / int(weights[domain]) / source.planner.global_batch_size)


def _bytes_per_item(source: Source) -> NDArray[np.float64]:
    """Mean bytes on disk of an item of each domain, from the blocks it lies in; shape (K,)."""
    table, blocks = source.layout.table, source.blocks
    per_row = blocks.length[table.block] / np.maximum(blocks.rows[table.block], 1)
    domain = np.repeat(np.arange(source.num_domains), np.diff(table.indptr))
    total = np.bincount(domain, per_row * table.rows, minlength=source.num_domains)
    return total / np.maximum(source.layout.epoch_items(), 1)
