"""Prepare the folder of a point for its next job, and undo that if no job follows."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.files.write_errors import explain_write_errors
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.prepare import prepare_run, replace_config, restore_config
from mixtera_hpc.launch.submit import undo_on_error
from mixtera_hpc.launch.sweep.sweep_plan import SweepPoint

__all__ = ["NOTHING_SUBMITTED", "prepared_point"]

NOTHING_SUBMITTED = "The points that were not submitted are as they were."


@contextmanager
def prepared_point(point: SweepPoint) -> Iterator[RunFolder]:
    """Create and record the run folder of a new point, or replace the configuration in the folder of a known one.

    If the block fails, the new folder is removed, or the configuration is restored.
    """
    folder = point.folder or prepare_run(point.config, point.overrides, datetime.now(UTC))
    undo = _restoration(folder) if point.folder else lambda: shutil.rmtree(folder.path)
    with undo_on_error(undo):
        with explain_write_errors(folder.path, NOTHING_SUBMITTED):
            _record(point, folder)
        yield folder


def _record(point: SweepPoint, folder: RunFolder) -> None:
    if point.folder is None:
        point.record.add_run(point.fingerprint, folder.run_id, point.overrides)
    else:
        config = replace(point.config, run=replace(point.config.run, id=folder.run_id))
        replace_config(folder, to_plain(config), point.overrides)


def _restoration(folder: RunFolder) -> Callable[[], None]:
    """Return a function that restores what `replace_config` changes."""
    config = folder.config.read_text()
    overrides_size = folder.overrides.stat().st_size if folder.overrides.exists() else 0
    copy = folder.replaced_config(max(folder.attempts(), default=0))
    copy_existed = copy.exists()

    def restore() -> None:
        if not copy_existed:
            copy.unlink(missing_ok=True)
        if folder.overrides.exists():
            os.truncate(folder.overrides, overrides_size)
        restore_config(folder, config)

    return restore
