"""Throughput of several runs against their number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.report.scaling.run_groups import check_comparable, group_runs
from mixtera_hpc.report.summary import RunPerformance, RunSummary, summarize_run
from mixtera_hpc.report.timing.stage_limits import StageLimit, stage_limits

__all__ = ["ScalingRow", "scaling_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRow:
    """One run, compared with the run of fewest ranks."""

    name: str
    run_id: str
    group: str
    """Values of the swept keys other than the scale, as `dataplane.seed=1`; empty if there are none."""
    nodes: int | None
    ranks: int
    global_batch_size: int | None
    tokens_per_s: float
    tokens_per_s_per_rank: float
    speedup: float
    """Throughput divided by that of the reference run."""
    efficiency: float
    """Speed-up divided by the ratio of the numbers of ranks; 1 is perfect scaling."""
    step_p50_s: float
    step_p95_s: float
    data_wait_share: float
    data_wait_p99_share: float
    broadcast_p50_s: float | None
    broadcast_p95_s: float | None
    reduce_p50_s: float | None
    reduce_p95_s: float | None
    limits: tuple[StageLimit, ...]
    """Throughput that each stage could sustain alone, the lowest limit first."""

    @property
    def binding_stage(self) -> str:
        """The stage that limits the throughput."""
        return next(limit.stage for limit in self.limits if limit.binds)


def scaling_table(runs: Sequence[RunMetrics], swept: Sequence[str] = ()) -> list[ScalingRow]:
    """Return one row per run, fewest ranks first, group by group.

    The first row of a group is its reference: of the runs with the fewest ranks, the slowest.

    Args:
        runs: the runs.
        swept: the keys of a sweep that have several values. Runs with other values than those of the scale form groups.

    Raises:
        ConfigError: runs of one group differ in more than the scale.
    """
    rows: list[ScalingRow] = []
    for group, members in group_runs(runs, swept).items():
        check_comparable(members)
        pairs = [(summarize_run(metrics), metrics) for metrics in members]
        pairs.sort(key=lambda pair: (pair[0].performance.num_ranks, pair[0].performance.tokens_per_s))
        reference = pairs[0][0].performance
        rows += [_scaling_row(group, summary, metrics, reference) for summary, metrics in pairs]
    return rows


def _scaling_row(group: str, summary: RunSummary, metrics: RunMetrics, reference: RunPerformance) -> ScalingRow:
    performance = summary.performance
    speedup = performance.tokens_per_s / max(reference.tokens_per_s, 1e-9)
    return ScalingRow(
        name=summary.name,
        run_id=summary.run_id,
        group=group,
        nodes=performance.num_nodes,
        ranks=performance.num_ranks,
        global_batch_size=metrics.config.get("dataplane", {}).get("global_batch_size"),
        tokens_per_s=performance.tokens_per_s,
        tokens_per_s_per_rank=performance.tokens_per_s_per_rank,
        speedup=speedup,
        efficiency=speedup * reference.num_ranks / performance.num_ranks,
        step_p50_s=performance.step_p50_s,
        step_p95_s=performance.step_p95_s,
        data_wait_share=performance.data_wait_share,
        data_wait_p99_share=performance.data_wait_p99_share,
        broadcast_p50_s=performance.broadcast_p50_s,
        broadcast_p95_s=performance.broadcast_p95_s,
        reduce_p50_s=performance.reduce_p50_s,
        reduce_p95_s=performance.reduce_p95_s,
        limits=stage_limits(metrics),
    )
