"""Show a run on the whole terminal and renew the view until the run ends; print one view where there is no terminal."""

import contextlib
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TextIO

from mixtera_hpc.cli.run_arguments import find_run
from mixtera_hpc.cli.safe_output import terminal
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.status import RunStatus, run_statuses
from mixtera_hpc.report.live.event_tail import EventTail
from mixtera_hpc.report.live.run_view import RunView
from mixtera_hpc.report.live.screen import Headline, screen_lines

__all__ = ["watch"]

STREAMS = ("attempts", "hosts", "steps", "mixture", "validation")
PIPE_COLUMNS = 100
QUERY_INTERVAL_S = 10.0
"""Time between two questions to Slurm."""

OPEN_SCREEN = "\033[?1049h\033[?25l"
"""Switch to the alternate screen and hide the cursor; `CLOSE_SCREEN` restores the terminal's content."""
CLOSE_SCREEN = "\033[?25h\033[?1049l"
HOME = "\033[H"
END_OF_LINE = "\033[K"
END_OF_SCREEN = "\033[J"


class _Watched:
    """A run with its recorded events and the state of its job."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._view = RunView()
        self._tails = {stream: EventTail(folder.metric(stream)) for stream in STREAMS}
        self._queried_s = float("-inf")
        self.status: RunStatus
        self.renew()

    def renew(self) -> None:
        """Read new events, and ask for the state if some time has passed."""
        for stream, tail in self._tails.items():
            self._view.add(stream, tail.new_events())
        if time.monotonic() - self._queried_s >= QUERY_INTERVAL_S:
            self.status = run_statuses([self._folder], datetime.now(UTC))[0]
            self._queried_s = time.monotonic()

    def lines(self, columns: int, rows: int | None) -> list[str]:
        """Return the view as lines."""
        status = self.status
        headline = Headline(
            run=f"{status.name}/{status.run_id}",
            state=str(status.state),
            reason=status.reason,
            job_id=status.job_id,
            elapsed_s=status.elapsed_s,
        )
        return screen_lines(headline, self._view.snapshot(), columns=columns, rows=rows)


def watch(args: Namespace) -> None:
    """Show the run that RUN names."""
    watched = _Watched(find_run(args))
    if args.once or not sys.stdout.isatty():
        print("\n".join(watched.lines(PIPE_COLUMNS, None)))
        return
    with _whole_screen(terminal(sys.stdout)) as screen:
        while True:
            columns, rows = shutil.get_terminal_size()
            _draw(screen, watched.lines(columns, rows))
            if not watched.status.state.active and not watched.status.may_be_active:
                break
            time.sleep(args.interval)
            watched.renew()
    print("\n".join(watched.lines(shutil.get_terminal_size().columns, None)))


def _draw(screen: TextIO, lines: list[str]) -> None:
    # One write, and nothing is cleared before it is written over: the view does not flicker.
    screen.write(HOME + f"{END_OF_LINE}\n".join(lines) + END_OF_LINE + END_OF_SCREEN)
    screen.flush()


@contextlib.contextmanager
def _whole_screen(screen: TextIO) -> Iterator[TextIO]:
    """Switch to the alternate screen for the block, and restore the terminal afterwards. Ctrl-C ends the block."""
    screen.write(OPEN_SCREEN)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield screen
    finally:
        screen.write(CLOSE_SCREEN)
        screen.flush()
