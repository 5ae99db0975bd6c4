"""Group runs, and refuse to compare runs that differ in more than their numbers of nodes and ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from mixtera_hpc.config.convert import leaves
from mixtera_hpc.config.files.journal_start import EARLIER_LANES
from mixtera_hpc.config.files.json_text import parse_json
from mixtera_hpc.config.job_shape import SCALE_KEYS
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.report.run_metrics import RunMetrics

__all__ = ["check_comparable", "group_runs", "unlike_conditions"]

IGNORED = (
    *("run", "plan", "track", "sweep", "swarm"),
    *("job.name", "job.time", "job.account", "job.qos", "job.reservation", "job.comment", "job.dependency"),
    *("job.max_attempts", "job.heartbeat_s", "job.signal_lead_s", "job.exclude"),
)
"""Keys and groups that do not change the throughput."""

MAX_NAMED = 8
"""Number of different keys that a message lists."""


def group_runs(runs: Sequence[RunMetrics], swept: Sequence[str]) -> dict[str, list[RunMetrics]]:
    """Return the runs by their values of the swept keys other than the scale, as `dataplane.seed=1`.

    Args:
        runs: the runs.
        swept: keys that have several values in a sweep. Without any, all runs form one group.
    """
    others = [key for key in swept if key not in SCALE_KEYS]
    groups: dict[str, list[RunMetrics]] = {}
    for metrics in runs:
        words = _overrides(metrics.run)
        label = " ".join(words[key] for key in others if key in words)
        groups.setdefault(label, []).append(metrics)
    return groups


def check_comparable(runs: Sequence[RunMetrics]) -> None:
    """Refuse runs that differ in more than nodes and ranks, and a batch that is proportional to one of these.

    Raises:
        ConfigError: runs differ; the message names every key and its values.
    """
    settings = [dict(leaves(metrics.config)) for metrics in runs]
    keys = sorted({key for setting in settings for key in setting if not _is_ignored(key)})
    different = {key: [setting.get(key) for setting in settings] for key in keys}
    different = {key: values for key, values in different.items() if any(value != values[0] for value in values)}
    if "dataplane.global_batch_size" in different and _is_batch_per_node(runs, settings):
        del different["dataplane.global_batch_size"]
    # The default, as runs of this and of earlier releases record it.
    if {None, EARLIER_LANES}.issuperset(different.get("dataplane.lanes", [])):
        different.pop("dataplane.lanes", None)
    if not different:
        return
    named = [f"\n  - {key}: {_values_text(runs, values)}" for key, values in list(different.items())[:MAX_NAMED]]
    more = f"\n  and {len(different) - MAX_NAMED} more" if len(different) > MAX_NAMED else ""
    raise ConfigError(
        "Throughput can be compared between runs that differ in nothing but job.nodes and job.ranks_per_node (and a "
        f"batch per node), but these runs differ in:{''.join(named)}{more}\n"
        "  Compare fewer runs, or the runs of a sweep over these keys: mixtera-hpc report --scaling <run name>"
    )


def unlike_conditions(runs: Sequence[RunMetrics]) -> list[str]:
    """Return a sentence for every fact beside the settings that differs between the runs: commit and device."""
    facts = [_conditions(metrics) for metrics in runs]
    names = sorted({name for fact in facts for name in fact})
    notes = []
    for name in names:
        values = [fact.get(name) for fact in facts]
        if any(value != values[0] for value in values):
            notes.append(f"The runs differ in {name}: {_values_text(runs, values)}")
    return notes


def _conditions(metrics: RunMetrics) -> dict[str, Any]:
    """Return the device and the commit of a run, as far as they were recorded."""
    newest = metrics.attempts[-1] if metrics.attempts else {}
    # A device is named with its number, such as `cpu × 4`, which follows the number of ranks.
    conditions: dict[str, Any] = {"device": str(newest.get("device", "")).partition(" × ")[0]}
    try:
        manifest = parse_json(metrics.run.manifest.read_text())
    except (OSError, ValueError):
        return conditions
    git = manifest.get("git") or {}
    conditions["commit"] = f"{str(git.get('commit'))[:10]}{' with changes' if git.get('dirty') else ''}"
    return conditions


def _is_batch_per_node(runs: Sequence[RunMetrics], settings: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if the global batch is proportional to the nodes, or to the ranks."""
    batches = [int(setting.get("dataplane.global_batch_size") or 0) for setting in settings]
    nodes = [int(setting.get("job.nodes") or 1) for setting in settings]
    ranks = [int(metrics.steps.num_ranks[-1]) for metrics in runs]
    return any(
        all(batch * counts[0] == batches[0] * count for batch, count in zip(batches, counts, strict=True))
        for counts in (nodes, ranks)
    )


def _values_text(runs: Sequence[RunMetrics], values: Sequence[Any]) -> str:
    """Return each distinct value with the first run that has it."""
    texts: dict[str, str] = {}
    for metrics, value in zip(runs, values, strict=True):
        texts.setdefault(str(value), metrics.run.run_id)
    return ", ".join(f"{value} ({run_id})" for value, run_id in texts.items())


def _is_ignored(key: str) -> bool:
    return key in SCALE_KEYS or any(key == name or key.startswith(f"{name}.") for name in IGNORED)


def _overrides(run: RunFolder) -> dict[str, str]:
    """Return key → the last override of that key."""
    lines = run.overrides.read_text().splitlines() if run.overrides.is_file() else []
    return {line.partition("=")[0].lstrip("+~"): line for line in lines}
