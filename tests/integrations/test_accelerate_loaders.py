"""`PlaneDataset` in loaders of accelerate: served as without it, or refused with the correct set-up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("accelerate_program.py")
WORDS = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2"]
CURE = "do not pass it to Accelerator.prepare()"

pytestmark = pytest.mark.integrations


def answers(collection: list[str], ranks: int) -> list[dict[str, Any]]:
    """Return the answer of every rank to every setting."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, PROGRAM, *collection, *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def alone(collection: list[str]) -> dict[str, Any]:
    (answer,) = answers(collection, 1)
    return answer


def test_one_process_may_prepare_a_loader_that_fetches_one_batch_ahead(alone: dict[str, Any]) -> None:
    assert [step for step, _, _ in alone["unprepared"]] == list(range(6))
    assert alone["dispatch_batches=False"] == alone["unprepared"]
    assert "dispatch_batches=True" in alone["dispatch_batches=True"]
    assert "use_stateful_dataloader=True" in alone["use_stateful_dataloader=True"]


def test_two_ranks_are_refused_with_the_correct_set_up(collection: list[str], alone: dict[str, Any]) -> None:
    first, second = answers(collection, 2)
    assert [position for _, position, _ in second["unprepared"]] == [4] * 6
    sums = [a[2] + b[2] for a, b in zip(first["unprepared"], second["unprepared"], strict=True)]
    assert sums == [total for _, _, total in alone["unprepared"]]
    for rank in (first, second):
        assert CURE in rank["dispatch_batches=True"]
        assert "only the first rank would ask for batches" in rank["dispatch_batches=True"]
        assert CURE in rank["dispatch_batches=False"]
        assert "a part of its own part" in rank["dispatch_batches=False"]
        assert CURE in rank["use_stateful_dataloader=True"]
