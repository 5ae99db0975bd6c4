"""How throughput grows with ranks, over several runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.summary import RunPerformance, RunSummary, summarize_run

__all__ = ["ScalingRow", "scaling_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """One run; compared with the one of fewest ranks."""

    name: str
    run_id: str
    nodes: int | None
    ranks: int
    global_batch_size: int | None
    tokens_per_s: float
    tokens_per_s_per_rank: float
    speedup: float
    efficiency: float
    """Speed-up divided by how many times more ranks there are."""
    step_p50_s: float
    step_p95_s: float
    data_wait_share: float
    data_wait_p99_share: float
    broadcast_p50_s: float | None
    broadcast_p95_s: float | None
    reduce_p50_s: float | None
    reduce_p95_s: float | None


def scaling_table(records: Sequence[RunMetrics]) -> list[ScalingRow]:
    """One row per run, fewest ranks first; of runs with as few ranks the slowest is the reference."""
    pairs = [(summarize_run(record), record) for record in records]
    pairs.sort(key=lambda pair: (pair[0].speed.num_ranks, pair[0].speed.tokens_per_s))
    base = pairs[0][0].speed
    return [
        _row(summary, base, record.config.get("dataplane", {}).get("global_batch_size")) for summary, record in pairs
    ]


def _row(summary: RunSummary, base: RunPerformance, global_batch_size: int | None) -> ScalingRow:
    speed = summary.speed
    speedup = speed.tokens_per_s / max(base.tokens_per_s, 1e-9)
    return ScalingRow(
        name=summary.name,
        run_id=summary.run_id,
        nodes=speed.num_nodes,
        ranks=speed.num_ranks,
        global_batch_size=global_batch_size,
        tokens_per_s=speed.tokens_per_s,
        tokens_per_s_per_rank=speed.tokens_per_s / speed.num_ranks,
        speedup=speedup,
        efficiency=speedup * base.num_ranks / speed.num_ranks,
        step_p50_s=speed.step_p50_s,
        step_p95_s=speed.step_p95_s,
        data_wait_share=speed.data_wait_share,
        data_wait_p99_share=speed.data_wait_p99_share,
        broadcast_p50_s=speed.broadcast_p50_s,
        broadcast_p95_s=speed.broadcast_p95_s,
        reduce_p50_s=speed.reduce_p50_s,
        reduce_p95_s=speed.reduce_p95_s,
    )
