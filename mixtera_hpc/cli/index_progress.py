"""Show the progress of all ranks of an index build, on standard error of rank 0."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mixtera_hpc.cli.safe_output import terminal
from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.errors import pluralize
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback, ScanProgress

__all__ = ["show_progress"]

LINE_EVERY_S = 10.0


@contextlib.contextmanager
def show_progress(comm: Communicator) -> Iterator[ProgressCallback | None]:
    """Yield a callback that shows a bar on a terminal, and prints a line every ten seconds elsewhere.

    Ranks other than 0 get None.
    """
    if comm.rank > 0:
        yield None
    elif not sys.stderr.isatty():
        yield _ProgressLines(comm.size)
    else:
        yield from _progress_bar(comm.size)


class _ProgressLines:
    """Prints progress as lines, for batch logs."""

    def __init__(self, num_ranks: int) -> None:
        self._ranks = pluralize(num_ranks, "rank")
        self._began_s: float | None = None
        self._printed_s = 0.0

    def __call__(self, state: ScanProgress) -> None:
        now = time.monotonic()
        if self._began_s is None:
            self._began_s = now
            self._printed_s = now
        if now - self._printed_s < LINE_EVERY_S:
            return
        self._printed_s = now
        rate = state.bytes_done / (now - self._began_s)
        remaining_s = (state.bytes_total - state.bytes_done) / rate if rate else 0.0
        fraction = state.bytes_done / max(state.bytes_total, 1)
        sys.stderr.write(
            f"{time.strftime('%H:%M:%S')} {fraction:4.0%} of {state.bytes_total / 1e9:,.1f} GB, {state.rows:,} rows, "
            f"{rate / 1e6:,.0f} MB/s on {self._ranks}, {remaining_s / 60:,.1f} minutes left\n"
        )
        sys.stderr.flush()


def _progress_bar(num_ranks: int) -> Iterator[ProgressCallback]:
    on_ranks = f" on {num_ranks} ranks" if num_ranks > 1 else ""
    rows = TextColumn("{task.fields[rows]:,} rows" + on_ranks)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), rows, TimeRemainingColumn())
    with Progress(*columns, console=Console(file=terminal(sys.stderr)), transient=True) as bar:
        task = bar.add_task("scan", total=None, rows=0)

        def show(state: ScanProgress) -> None:
            bar.update(task, completed=state.bytes_done, total=state.bytes_total, rows=state.rows)

        yield show
