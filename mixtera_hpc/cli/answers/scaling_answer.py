"""Print and write the comparison of runs with different numbers of ranks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mixtera_hpc.cli.console import open_console, print_json
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import DataError
from mixtera_hpc.launch.sweep.sweep_record import RecordedSweep, SweepRecord
from mixtera_hpc.report.run_metrics import RunMetrics, load_run_metrics
from mixtera_hpc.report.scaling.run_groups import unlike_conditions
from mixtera_hpc.report.scaling.scaling_table import scaling_table

__all__ = ["compare_runs", "compare_sweep", "find_sweep"]


def find_sweep(name: str, root: Path) -> SweepRecord | None:
    """Return the record of the sweep that `name` names, a run name or its folder; None if there is none."""
    for folder in (Path(name), root / name):
        record = SweepRecord(folder.absolute())
        if record.path.is_file():
            return record
    return None


def compare_sweep(record: SweepRecord, folder: Path | None = None, *, as_json: bool = False) -> None:
    """Compare the runs of the newest sweep of a run name; files go to `scaling/` of that name by default.

    Raises:
        DataError: no run of the sweep has recorded a step yet.
        ConfigError: runs differ in more than the swept keys.
    """
    sweep = record.newest_sweep()
    runs = _recorded_runs(sweep) if sweep is not None else []
    if sweep is None or not runs:
        raise DataError(
            f"No run of the sweep in {record.folder} has recorded a step yet.\n  See mixtera-hpc status, and repeat "
            "the sweep to submit what has not finished."
        )
    if len(runs) < sweep.num_points and not as_json:
        print(f"{len(runs)} of {sweep.num_points} points have recorded steps.")
    compare_runs(runs, folder or record.folder / "scaling", swept=sweep.swept, as_json=as_json)


def compare_runs(runs: Sequence[RunMetrics], folder: Path, *, swept: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the table of the runs and their limits; write CSV and PNG into `folder`, unless `as_json`.

    Raises:
        ConfigError: runs differ in more than the swept keys.
    """
    rows = scaling_table(runs, swept)
    if as_json:
        for row in rows:
            print_json({**dataclasses.asdict(row), "binding_stage": row.binding_stage})
        return
    # Imported here because they import matplotlib and rich, which take half a second.
    from mixtera_hpc.report.scaling.scaling_files import write_scaling_files
    from mixtera_hpc.report.scaling.scaling_text import limits_text, scaling_text

    console = open_console()
    console.print(scaling_text(rows))
    console.print(limits_text(rows))
    for note in unlike_conditions(runs):
        print(f"note: {note}")
    for path in write_scaling_files(rows, folder):
        print(path)


def _recorded_runs(sweep: RecordedSweep) -> list[RunMetrics]:
    """Return the metrics of the runs that have recorded steps."""
    return [load_run_metrics(run) for run in sweep.runs if _has_steps(run)]


def _has_steps(run: RunFolder) -> bool:
    path = run.metric("steps")
    return path.is_file() and path.stat().st_size > 0
