"""The conformance suite of the trainer examples: same stream, exact resume, feedback, clean ends.

A test file of a trainer subclasses `TrainerConformance` and names its example. Tests marked `full` belong to
`make integrations-full`; the others take about six launches, most of them two ranks under torchrun.

What an example must do, beyond the command line and the record of `examples/trainers/command_line.py`:

- The gradient of an optimizer step does not depend on the number of ranks and micro-batches: the sum of the counted
  losses of the **global** batch, divided by their number or by a constant.
- It exits with 0, or with 75 after a stop that was requested.
- `OUT` is the folder of the run (`RunFolder(out)`); `OUT/control/stop` stops it.
"""

import contextlib
import io
import signal
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mixtera_hpc import RunFolder
from mixtera_hpc.cli.main import main
from mixtera_hpc.dataplane.recording.journal import read_lines

from .failing_rank import FAILED_AT
from .launching import LAUNCHERS, Example, Finished, start
from .served_stream import Recorded, ServedStream, mean_losses, read_records, trained_digests

__all__ = ["Runs", "TrainerConformance"]

NUM_STEPS = 8
SAVED_STEPS = 4
MANY_STEPS = 2000
"""More steps than a job takes until it is asked to stop."""

FAILURE_LIMIT_S = 20.0
LOSS_TOLERANCE = 1e-4
"""Relative. Sums of different ranks are added in different orders."""

SMALL = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "dataplane.audit=true",
    "query.holdout.fraction=0.2",
    "training.validate_steps=2",
]
LEARNING = [
    "mixture=ado",
    "mixture.group_by=[source]",
    "mixture.algorithm.warmup=2",
    "mixture.algorithm.refit_interval=1",
    "dataplane.chunk_steps=1",
]
LEARNING_STEPS = 12


def full_unless(short: Sequence[object], every: Sequence[Sequence[object]]) -> list[Any]:
    """Return the parameters of a test, of which only `short` belongs to the short suite."""
    return [pytest.param(*values, marks=[] if list(values) == list(short) else pytest.mark.full) for values in every]


EVERY_LAUNCH = list(product(LAUNCHERS, (1, 2)))
EVERY_LAUNCHER = [[launcher] for launcher in LAUNCHERS]
SEVERAL_RANKS = [["torchrun"], ["mpiexec"]]


class Runs:
    """The runs of one example, each launched once, when a test first asks for it."""

    def __init__(self, example: Example, overrides: Sequence[str], root: Path) -> None:
        self.overrides = [*overrides, *SMALL]
        self.learning = [*(word for word in self.overrides if not word.startswith("mixture")), *LEARNING]
        self.stream = ServedStream.of(self.overrides, NUM_STEPS)
        self._example = example
        self._root = root
        self._finished: dict[str, Path] = {}

    def new_folder(self, name: str) -> Path:
        out = self._root / name
        out.mkdir(parents=True)
        return out

    def command(
        self, launcher: str, out: Path, *options: object, learning: bool = False, fails: bool = False
    ) -> list[str]:
        overrides = self.learning if learning else self.overrides
        words = ["--overrides", *overrides, "--out", str(out), *map(str, options)]
        return [*self._example.command(launcher, fails=fails), *words]

    def launch(self, launcher: str, out: Path, *options: object, learning: bool = False) -> Finished:
        """Run the example to its end; every rank must exit with 0."""
        log = out / f"log_{len(list(out.glob('log_*')))}.txt"
        with start(self.command(launcher, out, *options, learning=learning), log) as job:
            finished = job.wait()
        assert finished.code == 0, finished.output[-6000:]
        return finished

    def whole(self, launcher: str, accumulate: int) -> Path:
        """Return the folder of a run of `NUM_STEPS` steps in one job."""
        name = f"whole-{launcher}-{accumulate}"
        if name not in self._finished:
            out = self._finished[name] = self.new_folder(name)
            self.launch(launcher, out, "--steps", NUM_STEPS, "--accumulate", accumulate)
        return self._finished[name]

    def split(self, launcher: str, accumulate: int) -> Path:
        """Return the folder of the same run in two jobs, with a checkpoint between them."""
        name = f"split-{launcher}-{accumulate}"
        if name not in self._finished:
            out = self._finished[name] = self.new_folder(name)
            options = ["--steps", NUM_STEPS, "--accumulate", accumulate]
            self.launch(launcher, out, *options, "--save-at", SAVED_STEPS, "--stop-after", SAVED_STEPS)
            assert {record.step for record in read_records(out)} == set(range(SAVED_STEPS))
            self.launch(launcher, out, *options, "--resume")
        return self._finished[name]


@pytest.mark.integrations
class TrainerConformance:
    """Base class of the tests of one example."""

    example: ClassVar[Example]
    ranks_share_sequences: ClassVar[bool] = False
    """True if ranks of one model-parallel group train on the same sequences."""

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
        return Runs(cls.example, collection, tmp_path_factory.mktemp("runs"))

    @pytest.mark.parametrize(("launcher", "accumulate"), full_unless(("torchrun", 1), EVERY_LAUNCH))
    def test_two_jobs_with_a_checkpoint_between_them_serve_the_bare_stream(
        self, launcher: str, accumulate: int, runs: Runs
    ) -> None:
        out = runs.split(launcher, accumulate)

        self.assert_records_are_whole(read_records(out), LAUNCHERS[launcher], range(NUM_STEPS))
        assert trained_digests(read_records(out)) == runs.stream.digests
        assert_verified(out)

    @pytest.mark.parametrize(("launcher", "accumulate"), full_unless(("python", 1), EVERY_LAUNCH))
    def test_one_job_serves_the_bare_stream(self, launcher: str, accumulate: int, runs: Runs) -> None:
        out = runs.whole(launcher, accumulate)

        self.assert_records_are_whole(read_records(out), LAUNCHERS[launcher], range(NUM_STEPS))
        assert trained_digests(read_records(out)) == runs.stream.digests
        assert_verified(out)

    @pytest.mark.parametrize(("launcher", "accumulate"), full_unless(("torchrun", 1), EVERY_LAUNCH))
    def test_losses_depend_neither_on_the_ranks_nor_on_a_resume(
        self, launcher: str, accumulate: int, runs: Runs
    ) -> None:
        expected = mean_losses(read_records(runs.whole("python", 1)), runs.stream)
        resumed = mean_losses(read_records(runs.split(launcher, accumulate)), runs.stream)

        np.testing.assert_allclose(resumed, expected, rtol=LOSS_TOLERANCE)

    @pytest.mark.full
    @pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
    def test_steps_after_the_checkpoint_are_trained_again(self, launcher: str, runs: Runs) -> None:
        out = runs.new_folder(f"repeated-{launcher}")
        options = ["--steps", NUM_STEPS]
        runs.launch(launcher, out, *options, "--save-at", SAVED_STEPS, "--stop-after", SAVED_STEPS + 2)
        runs.launch(launcher, out, *options, "--resume")

        records = read_records(out)
        repeated = [*range(SAVED_STEPS + 2), *range(SAVED_STEPS, NUM_STEPS)]
        assert [record.step for record in records if record.rank == 0] == repeated
        assert trained_digests(records) == runs.stream.digests
        assert_verified(out)

    @pytest.mark.parametrize("launcher", full_unless(("torchrun",), EVERY_LAUNCHER))
    def test_losses_reach_the_mixing_algorithm_and_the_log_of_the_trainer(self, launcher: str, runs: Runs) -> None:
        out = runs.new_folder(f"learning-{launcher}")
        runs.launch(launcher, out, "--steps", LEARNING_STEPS, "--accumulate", 2, learning=True)

        self.assert_records_are_whole(read_records(out), LAUNCHERS[launcher], range(LEARNING_STEPS))
        weights = [line["weights"] for line in read_lines(RunFolder(out).journal) if line["kind"] == "chunk"]
        assert weights[0] != weights[-1]
        assert_verified(out)
        logged = what_the_trainer_logged(out)
        for metric in ("train_loss", "held_out_loss", "weight"):
            assert any(f"{metric}/{name}".encode() in logged for name in runs.stream.domain_names), metric

    @pytest.mark.parametrize("launcher", full_unless(("torchrun",), SEVERAL_RANKS))
    def test_an_exception_in_rank_1_ends_every_rank_and_names_it(self, launcher: str, runs: Runs) -> None:
        out = runs.new_folder(f"failing-{launcher}")
        with start(runs.command(launcher, out, "--steps", MANY_STEPS, fails=True), out / "log_0.txt") as job:
            finished = job.wait()

        assert finished.code != 0
        assert (out / FAILED_AT).exists(), finished.output[-6000:]
        assert finished.ended_at - float((out / FAILED_AT).read_text()) < FAILURE_LIMIT_S
        assert "[rank 1 on" in finished.output
        assert "ValueError: broken on purpose" in finished.output

    @pytest.mark.parametrize("launcher", full_unless(("torchrun",), EVERY_LAUNCHER))
    def test_a_stop_file_ends_the_run_resumably(self, launcher: str, runs: Runs) -> None:
        out = runs.new_folder(f"stop-file-{launcher}")
        with start(runs.command(launcher, out, "--steps", MANY_STEPS), out / "log_0.txt") as job:
            job.wait_for_lines(out / "rank_0.jsonl", 3)
            RunFolder(out).control.mkdir(exist_ok=True)
            RunFolder(out).stop_request.touch()
            finished = job.wait()

        assert not RunFolder(out).stop_request.exists()
        self.assert_ended_resumably(launcher, out, finished, runs)

    @pytest.mark.full
    @pytest.mark.parametrize("launcher", list(LAUNCHERS))
    def test_sigterm_ends_the_run_resumably(self, launcher: str, runs: Runs) -> None:
        out = runs.new_folder(f"sigterm-{launcher}")
        with start(runs.command(launcher, out, "--steps", MANY_STEPS), out / "log_0.txt") as job:
            job.wait_for_lines(out / "rank_0.jsonl", 3)
            job.signal_ranks(signal.SIGTERM)
            finished = job.wait()

        self.assert_ended_resumably(launcher, out, finished, runs)

    def assert_ended_resumably(self, launcher: str, out: Path, finished: Finished, runs: Runs) -> None:
        """Check that a run was saved when it was asked to stop, and that it continues with the next step."""
        assert finished.ended_cleanly, finished.output[-6000:]
        # torchrun prints a traceback of its own for any exit code but 0.
        assert launcher == "torchrun" or "Traceback" not in finished.output, finished.output[-6000:]
        end = 1 + max(record.step for record in read_records(out))
        assert end < MANY_STEPS

        runs.launch(launcher, out, "--steps", end + 2, "--resume")
        records = read_records(out)
        self.assert_records_are_whole(records, LAUNCHERS[launcher], range(end + 2))
        assert trained_digests(records) == ServedStream.of(runs.overrides, end + 2).digests
        assert_verified(out)

    def assert_records_are_whole(self, records: list[Recorded], num_ranks: int, steps: range) -> None:
        """Check that every rank wrote one line per step, in order, and that ranks shared the work as announced."""
        assert {record.rank for record in records} == set(range(num_ranks))
        for rank in range(num_ranks):
            assert [record.step for record in records if record.rank == rank] == list(steps)
        if not self.ranks_share_sequences:
            trained = sum(len(record.digests) for record in records)
            assert trained == len(trained_digests(records)), "two ranks trained on the same sequence"


def assert_verified(out: Path) -> None:
    """Check that `mixtera-hpc trace OUT --verify` confirms every sequence of the run."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(["trace", str(out), "--verify"])
    assert code == 0, output.getvalue()


def what_the_trainer_logged(out: Path) -> bytes:
    """Return everything that is in the folder of a run, without the files of the data plane."""
    folder = RunFolder(out)
    own = {folder.config, folder.journal, folder.decisions}
    own_folders = {folder.metrics, out / "attempts"}
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not own_folders & set(path.parents)]
    return b"\n".join(path.read_bytes() for path in files if path not in own)
