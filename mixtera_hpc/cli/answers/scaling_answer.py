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
from mixtera_hpc.report.scaling.scaling_model import ModelConstants, ModelRow, model_constants, model_scaling
from mixtera_hpc.report.scaling.scaling_table import ScalingRow, scaling_table

__all__ = ["compare_runs", "compare_sweep", "find_sweep"]


def find_sweep(name: str, root: Path) -> SweepRecord | None:
    """Return the record of the sweep that `name` names, a run name or its folder; None if there is none."""
    for folder in (Path(name), root / name):
        record = SweepRecord(folder.absolute())
        if record.path.is_file():
            return record
    return None


def compare_sweep(
    record: SweepRecord, folder: Path | None = None, *, as_json: bool = False, model_nodes: int | None = None
) -> None:
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
    compare_runs(runs, folder or record.folder / "scaling", swept=sweep.swept, as_json=as_json, model_nodes=model_nodes)


def compare_runs(
    runs: Sequence[RunMetrics],
    folder: Path,
    *,
    swept: Sequence[str] = (),
    as_json: bool = False,
    model_nodes: int | None = None,
) -> None:
    """Print the table of the runs and their limits; write CSV and PNG into `folder`, unless `as_json`.

    Args:
        runs: the runs.
        folder: where files go.
        swept: the keys of a sweep that have several values.
        as_json: print one JSON object per row instead.
        model_nodes: also print the model of the data plane up to this number of nodes.

    Raises:
        ConfigError: runs differ in more than the swept keys.
    """
    rows = scaling_table(runs, swept)
    # The run with the most ranks is the nearest one to the jobs that are modelled.
    constants = model_constants(max(runs, key=lambda metrics: int(metrics.steps.num_ranks[-1])))
    modelled = model_scaling(constants, model_nodes) if model_nodes is not None else []
    if as_json:
        _print_json(rows, modelled)
        return
    files = _print_and_write(rows, modelled, constants, folder)
    for note in unlike_conditions(runs):
        print(f"note: {note}")
    for path in files:
        print(path)


def _print_json(rows: Sequence[ScalingRow], modelled: Sequence[ModelRow]) -> None:
    for row in rows:
        print_json({**dataclasses.asdict(row), "binding_stage": row.binding_stage})
    for model_row in modelled:
        print_json({"model": dataclasses.asdict(model_row)})


def _print_and_write(
    rows: Sequence[ScalingRow], modelled: Sequence[ModelRow], constants: ModelConstants, folder: Path
) -> list[Path]:
    """Print the tables, write the files, and return their paths."""
    # Imported here because they import matplotlib and rich, which take half a second.
    from mixtera_hpc.report.scaling.scaling_files import write_model, write_scaling_files
    from mixtera_hpc.report.scaling.scaling_text import limits_text, model_text, scaling_text

    console = open_console()
    console.print(scaling_text(rows))
    console.print(limits_text(rows))
    files = write_scaling_files(rows, folder)
    if modelled:
        console.print(model_text(modelled, constants))
        files.append(write_model(modelled, folder))
    return files


def _recorded_runs(sweep: RecordedSweep) -> list[RunMetrics]:
    """Return the metrics of the runs that have recorded steps."""
    return [load_run_metrics(run) for run in sweep.runs if _has_steps(run)]


def _has_steps(run: RunFolder) -> bool:
    path = run.metric("steps")
    return path.is_file() and path.stat().st_size > 0
