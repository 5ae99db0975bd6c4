"""`examples/vlm/train.py`: samples, two unlike data sets, ADO, and an exact resume on another number of ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples" / "vlm" / "train.py")
MPIEXEC = str(Path(sys.executable).with_name("mpiexec"))


def run(out: Path, *arguments: str, num_ranks: int = 1) -> None:
    launcher = [MPIEXEC, "-n", str(num_ranks)] if num_ranks > 1 else []
    command = [*launcher, sys.executable, EXAMPLE, "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def verify(out: Path) -> str:
    command = [sys.executable, "-m", "mixtera_hpc", "trace", str(out), "--verify"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout


def digests(out: Path) -> dict[tuple[int, int], str]:
    found = {}
    for path in out.glob("rank_*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for position, digest in zip(line["positions"], line["digests"], strict=True):
                assert found.setdefault((line["step"], position), digest) == digest
    return found


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_and_one_rank_train_on_the_same_samples(tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    run(alone, "--steps", "200")
    assert "verified: 4,800 sequences of 200 steps" in verify(alone)

    # Captions of other pictures cannot be predicted.
    held_out = log(alone)[-1]
    losses = {key.rpartition("=")[2]: loss for key, loss in held_out.items() if key.startswith("held_out_loss/")}
    assert losses["noisy"] > 2 * max(losses["captions"], losses["instruct"])
    changes = [json.loads(line) for line in (alone / "metrics" / "mixture.jsonl").read_text().splitlines()]
    weights = np.array([change["weights"] for change in changes])
    assert np.abs(weights[-1] - weights[0]).max() > 0.05

    # Begin on two ranks, continue on one, with micro-batches.
    shared = tmp_path / "shared"
    run(shared, "--steps", "12", "--save-at", "6", "--stop-after", "6", num_ranks=2)
    run(shared, "--steps", "12", "--resume", "--accumulate", "3")
    assert digests(shared) == {key: digest for key, digest in digests(alone).items() if key[0] < 12}
    assert "verified: 288 sequences of 12 steps" in verify(shared)
