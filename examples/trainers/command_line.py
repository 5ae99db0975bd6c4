"""The command line that the trainer examples share, and the record that each rank writes of what it trained on."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mixtera_hpc.dataplane.steps.digests import sequence_digest

__all__ = ["TrainingRecord", "parse_arguments"]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return `overrides`, `steps`, `save_at`, `stop_after`, `resume`, `out` and `accumulate`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--overrides", nargs="*", default=[], help="Hydra overrides, e.g. experiment=demo")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of the whole run")
    parser.add_argument("--save-at", type=int, help="save a checkpoint after this many steps")
    parser.add_argument("--stop-after", type=int, help="leave after this many steps, as if the job ended there")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of one optimizer step")
    return parser.parse_args(argv)


class TrainingRecord:
    """`OUT/rank_R.jsonl`: one line per optimizer step, with the sequences that reached the model and their mean loss.

    A line holds the `step`, the `positions` of the sequences in the global batch, the `digests` of their tokens, and
    the mean `loss` of the counted tokens.
    """

    def __init__(self, out: Path, rank: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / f"rank_{rank}.jsonl"
        self._log = out / "log.jsonl" if rank == 0 else None
        self._clear()

    def add(self, positions: torch.Tensor, tokens: torch.Tensor, loss: torch.Tensor, counted: torch.Tensor) -> None:
        """Add a micro-batch: positions (B,), tokens (B, T + 1), the loss of every token and which count (B, T)."""
        self._positions += positions.tolist()
        self._digests += [sequence_digest(row) for row in tokens.cpu().numpy()]
        self._loss_sum += float(loss.detach()[counted].sum())
        self._num_tokens += int(counted.sum())

    def end_step(self, step: int) -> None:
        """Write the line of an optimizer step."""
        line = {
            "step": step,
            "positions": self._positions,
            "digests": self._digests,
            "loss": self._loss_sum / max(self._num_tokens, 1),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._clear()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append metrics to `OUT/log.jsonl`, on rank 0; for loops without a trainer that has a log."""
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _clear(self) -> None:
        self._positions: list[int] = []
        self._digests: list[str] = []
        self._loss_sum = 0.0
        self._num_tokens = 0
