"""Events of many domains are recorded in few bytes, and read back as they were logged."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.statistics import STAGES
from mixtera_hpc.track.event_reader import read_events
from mixtera_hpc.track.tracker import JsonLinesTracker

NUM_DOMAINS = 1000
NAMES = [f"source=module_{number}" for number in range(NUM_DOMAINS)]
CHUNK_STEPS = 8


class Run:
    """Events of a run with 64 sequences per step, and what a reader must return."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._cursors = np.zeros(NUM_DOMAINS, np.int64)
        self._epochs_per_sequence = self._rng.random(NUM_DOMAINS) / 1e4

    def chunk(self, chunk: int, is_static: bool = False) -> dict[str, Any]:
        weights = np.full(NUM_DOMAINS, 1 / NUM_DOMAINS) if is_static else self._rng.dirichlet(np.ones(NUM_DOMAINS))
        return {
            "step": chunk * CHUNK_STEPS,
            "chunk": chunk,
            "domains": NAMES,
            "weights": weights,
            "served": self._cursors / max(int(self._cursors.sum()), 1),
            "cursors": self._cursors.copy(),
            "epochs": self._cursors * self._epochs_per_sequence,
            "learned_loss": np.where(self._cursors > 0, weights * 3, np.nan),
        }

    def step(self, step: int) -> dict[str, Any]:
        sequences = np.bincount(self._rng.integers(0, NUM_DOMAINS, 64), minlength=NUM_DOMAINS)
        self._cursors += sequences
        losses = (self._rng.random(NUM_DOMAINS) * 10).tolist()
        times = dict.fromkeys(STAGES, 0.00123)
        return {
            "step": step,
            "num_steps": 1,
            "loss": 2.123456789012345,
            "tokens": 64 * 4096,
            "tokens_per_s": 123456.78901234,
            "step_s": 0.12345678901234,
            "data_wait_s": 0.00012345678901,
            "num_ranks": 16384,
            "num_nonfinite": 0,
            "learning_rate": 0.00012345678901,
            "stage_s": times,
            "stage_max_s": times,
            "stage_rank": dict.fromkeys(STAGES, 16383),
            "domain_loss": [loss if n else None for loss, n in zip(losses, sequences.tolist(), strict=True)],
            "scalar_entropy": [loss / 2 if n else None for loss, n in zip(losses, sequences.tolist(), strict=True)],
            "scalar_entropy_out_of_range": 3,
            "domain_tokens": (4096 * sequences).tolist(),
            "domain_sequences": sequences.tolist(),
        }


def check_same(logged: dict[str, Any], read: dict[str, Any]) -> None:
    for name, value in logged.items():
        expected = value
        if isinstance(value, np.ndarray):
            expected = [None if item != item else item for item in value.tolist()]
        if name in ("domain_loss", "scalar_entropy", "epochs", "served"):
            assert [item is None for item in expected] == [item is None for item in read[name]]
            known = [item for item in read[name] if item is not None]
            assert known == pytest.approx([item for item in expected if item is not None], rel=1e-6)
        else:
            assert read[name] == expected, name


def test_events_of_many_domains_are_read_back(tmp_path: Path) -> None:
    run = Run(0)
    chunks, steps = [], []
    for attempt, first in ((1, 0), (2, 70)):
        tracker = JsonLinesTracker(tmp_path, attempt)
        for chunk in range(first, first + 70):
            chunks.append(run.chunk(chunk, is_static=chunk % 3 > 0))
            tracker.log("mixture", chunks[-1])
            steps.append(run.step(chunk * CHUNK_STEPS))
            tracker.log("steps", steps[-1])
        validation = {"step": 3, "loss": None, "domain_loss": [None] * NUM_DOMAINS, "domain_tokens": [0] * NUM_DOMAINS}
        tracker.log("validation", validation)
        tracker.close()
    for logged, stream in ((chunks, "mixture"), (steps, "steps"), ([validation], "validation")):
        read = read_events(tmp_path / f"{stream}.jsonl")
        assert len(read) == len(logged)
        for first, second in zip(logged, read, strict=True):
            check_same(first, second)


def test_a_step_takes_a_kilobyte_and_12_bytes_per_domain_present(tmp_path: Path) -> None:
    run = Run(1)
    tracker = JsonLinesTracker(tmp_path, 1)
    steps = [run.step(step) for step in range(CHUNK_STEPS)]
    for step in steps:
        del step["scalar_entropy"]
    for chunk in range(3):
        tracker.log("mixture", run.chunk(chunk))
        for step in steps:
            tracker.log("steps", step)
            run.step(0)
    tracker.close()
    lines = (tmp_path / "steps.jsonl").read_bytes().splitlines()
    present = [np.count_nonzero(step["domain_tokens"]) for step in steps]
    allowed = [1000 + 12 * count for count in present]
    sizes = [len(line) for line in lines[:CHUNK_STEPS]]
    assert all(size <= limit for size, limit in zip(sizes, allowed, strict=True)), (sizes, allowed)

    # Of a chunk: the weights once, and what was served since the last one. Names are not repeated.
    chunk = (tmp_path / "mixture.jsonl").read_bytes().splitlines()[1]
    event = json.loads(chunk)
    arrays = [len(event[name]["float64"]) for name in ("weights", "learned_loss")]
    assert max(arrays) <= 11 * NUM_DOMAINS and len(chunk) - sum(arrays) <= 1000 + 12 * CHUNK_STEPS * 64
    assert NAMES[5].encode() not in chunk


def test_a_damaged_line_of_a_chunk_costs_only_what_it_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(2)
    chunks = []
    tracker = JsonLinesTracker(tmp_path, 1)
    for chunk in range(130):
        chunks.append(run.chunk(chunk))
        tracker.log("mixture", chunks[-1])
        run.step(0)
    tracker.close()
    path = tmp_path / "mixture.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][:200] + b"\xff" + lines[3][201:]
    path.write_bytes(b"".join(lines))
    with caplog.at_level(logging.WARNING):
        read = read_events(path)
    assert "line 4 is not a metric event" in caplog.text
    assert [event["chunk"] for event in read] == [0, 1, 2, *range(4, 130)]
    # Everything is recorded again from time to time.
    for logged, event in zip(chunks[64:], read[63:], strict=True):
        check_same(logged, event)


def test_few_domains_stay_readable(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path, 1)
    tracker.log("steps", {"step": 0, "domain_loss": [1.5, None], "domain_tokens": [3, 0]})
    tracker.close()
    event = json.loads((tmp_path / "steps.jsonl").read_bytes())
    assert (event["domain_loss"], event["domain_tokens"]) == ([1.5, None], [3, 0])
