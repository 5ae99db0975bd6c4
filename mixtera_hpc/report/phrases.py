"""Phrases and suggested commands that the HTML page and the terminal share."""

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import pluralize
from mixtera_hpc.report.number_format import format_count, format_duration, format_seconds
from mixtera_hpc.report.projection import RunProjection
from mixtera_hpc.report.safe_text import escape_controls
from mixtera_hpc.report.summary import DataEnd, RunPerformance, RunSummary
from mixtera_hpc.report.timing.stalls import Stall

__all__ = [
    "MAX_STALLS",
    "SILENT_MIXTURE",
    "describe_data_end",
    "describe_progress",
    "describe_ranks",
    "describe_remaining",
    "median_and_p95",
    "next_commands",
    "stall_cells",
]

MAX_STALLS = 8
"""Rows of the table of stalls."""

SILENT_MIXTURE = "dynamic, but no losses were recorded in the last chunks, so it does not change"


def describe_progress(summary: RunSummary) -> str:
    """Return `20 of 30 steps · 2 attempts · 2 ranks on 1 node`."""
    steps = f"{format_count(summary.steps, 4)} steps"
    if summary.num_steps:
        steps = f"{format_count(summary.steps, 4)} of {format_count(summary.num_steps, 4)} steps"
    return f"{steps} · {pluralize(summary.num_attempts, 'attempt')} · {describe_ranks(summary.performance)}"


def describe_ranks(performance: RunPerformance) -> str:
    """Return `2 ranks on 1 node`, or `2 ranks` if the number of nodes is unknown."""
    ranks = pluralize(performance.num_ranks, "rank")
    if performance.num_nodes is None:
        return ranks
    return f"{ranks} on {pluralize(performance.num_nodes, 'node')}"


def describe_remaining(projection: RunProjection) -> str:
    """Return `Remaining: 80 steps, about 40 s at the median step time. Total at the end: 20.0 k tokens.`"""
    if projection.remaining_steps == 0:
        return "All steps are finished."
    return (
        f"Remaining: {pluralize(projection.remaining_steps, 'step')}, about {format_duration(projection.remaining_s)} "
        f"at the median step time. Total at the end: {format_count(projection.total_tokens)} tokens."
    )


def median_and_p95(median: float | None, p95: float | None) -> str:
    """Return `2.00 ms, p95 3.10 ms`."""
    return f"{format_seconds(median)}, p95 {format_seconds(p95)}"


def describe_data_end(end: DataEnd) -> str:
    """Return `3 sequences, too few for a global batch and not served; 17 tokens, …`."""
    noun = "sequence" if end.unit == "tokens" else "sample"
    fate = "served with padding" if end.is_padded else "too few for a global batch and not served"
    parts = [f"{pluralize(end.sequences, noun)}, {fate}"] if end.sequences else []
    if end.tokens:
        parts.append(f"{pluralize(end.tokens, 'token')}, too few for a sequence of their domain and not served")
    return "; ".join(parts) or "nothing"


def next_commands(run: RunFolder, summary: RunSummary) -> list[tuple[str, str]]:
    """Return commands that make sense for the state of the run, each with its purpose."""
    last_step = max(summary.steps - 1, 0)
    commands = [
        (f"mixtera-hpc trace {run.run_id} --step {last_step}", "list the samples of the last step"),
        (f"mixtera-hpc report --scaling {run.run_id} OTHER_RUN", "compare the throughput with other runs"),
        (f"mixtera-hpc report {run.run_id} --json", "print these numbers as JSON"),
    ]
    remaining_steps = summary.num_steps - summary.steps
    if remaining_steps > 0:
        commands.insert(
            0, (f"mixtera-hpc resume {run.run_id}", f"train the remaining {pluralize(remaining_steps, 'step')}")
        )
    return commands


def stall_cells(stall: Stall) -> list[str]:
    """Return one row of the table of stalls; see `STALL_COLUMNS`."""
    return [
        str(stall.rank),
        escape_controls(stall.host),
        stall.stage,
        format_count(stall.num_steps, 4),
        format_seconds(stall.total_s),
        format_seconds(stall.longest_s),
    ]
