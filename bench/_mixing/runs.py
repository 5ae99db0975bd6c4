"""Train one run of `python -m bench mixing`, unless it is finished already."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench._mixing.corpora import Corpus
from mixtera_hpc.cli import main as command_line
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.track.event_reader import read_events

__all__ = ["Result", "Runs"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """The measurements of a finished run."""

    loss: NDArray[np.float64]
    """Held-out loss of every domain at the end, nats; shape (num_domains,)."""
    weights: NDArray[np.float64]
    """Share of the sequences that every domain was served; shape (num_domains,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """The folder of all runs."""

    root: Path

    def folder(self, corpus: Corpus, mixture: str, seed: int) -> RunFolder:
        """Return the folder of one run."""
        words = mixture.replace(",", "").replace(" ", "-")
        return RunFolder(self.root / corpus.name / f"{words}-{seed}")

    def train(self, corpus: Corpus, mixture: str, overrides: Sequence[str], seed: int) -> float:
        """Train a run and return its CPU seconds; 0 if it is finished and was started with the same overrides.

        Raises:
            SystemExit: the run failed; its output is beside its folder.
        """
        folder = self.folder(corpus, mixture, seed)
        words = [
            *corpus.overrides,
            *overrides,
            f"dataplane.seed={seed}",
            f"training.seed={seed}",
            f"training.num_steps={corpus.num_steps}",
            f"training.validate_every={corpus.num_steps}",
            f"run.root={self.root}",
            f"run.name={corpus.name}",
            f"run.id={folder.run_id}",
        ]
        if self._is_finished(folder, words, corpus.num_steps):
            return 0.0
        # A run that was ended in the middle starts again: it takes less than a minute.
        shutil.rmtree(folder.path, ignore_errors=True)
        started = time.process_time()
        log = folder.path.with_suffix(".log")
        run_verb(["run", *words], log)
        return time.process_time() - started

    def result(self, corpus: Corpus, mixture: str, seed: int) -> Result | None:
        """Return the result of a run; None if it is not finished."""
        folder = self.folder(corpus, mixture, seed)
        validations = read_events(folder.metric("validation")) if folder.metric("validation").exists() else []
        if not validations or validations[-1]["step"] != corpus.num_steps:
            return None
        steps = read_events(folder.metric("steps"))
        served = np.sum([step["domain_tokens"] for step in steps], axis=0, dtype=np.float64)
        return Result(
            loss=np.array(validations[-1]["domain_loss"], np.float64),
            weights=served / served.sum(),
        )

    def _is_finished(self, folder: RunFolder, words: Sequence[str], num_steps: int) -> bool:
        if not folder.overrides.exists() or folder.overrides.read_text().split("\n")[: len(words)] != list(words):
            return False
        return num_steps in folder.checkpoint_steps()


def run_verb(words: Sequence[str], log: Path) -> None:
    """Run a verb of the command line in this process; append what it prints to `log`.

    Raises:
        SystemExit: the verb failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = command_line.main(list(words))
    if code:
        raise SystemExit(f"mixtera-hpc {words[0]} ended with exit code {code}; see {log}.")
