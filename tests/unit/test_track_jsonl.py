"""Events are read as they were written, after resumes and after kills."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.track.event_reader import read_events
from mixtera_hpc.track.tracker import JsonLinesTracker

NOON = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


def write(folder: Path, attempt: int, steps: range) -> None:
    tracker = JsonLinesTracker(folder, attempt, clock=lambda: NOON)
    for step in steps:
        tracker.log("steps", {"step": step, "loss": attempt + step / 100})
    tracker.close()


def test_every_event_has_the_time_and_the_attempt(tmp_path: Path) -> None:
    write(tmp_path, 3, range(1))
    line = json.loads((tmp_path / "steps.jsonl").read_text())
    assert line == {"time": "2026-01-02T12:00:00+00:00", "attempt": 3, "step": 0, "loss": 3.0}


def test_arrays_become_lists_and_nan_becomes_null(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path, 1)
    tracker.log("steps", {"step": np.int64(7), "domain_loss": np.array([1.5, np.nan]), "tokens": np.array([3, 4])})
    tracker.close()
    (event,) = read_events(tmp_path / "steps.jsonl")
    assert (event["step"], event["domain_loss"], event["tokens"]) == (7, [1.5, None], [3, 4])


def test_an_event_is_written_before_the_tracker_is_closed(tmp_path: Path) -> None:
    tracker = JsonLinesTracker(tmp_path, 1)
    tracker.log("comm", {"step": 0, "plan_s": 0.1})
    assert len(read_events(tmp_path / "comm.jsonl")) == 1


def test_a_resumed_attempt_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    write(tmp_path, 1, range(10))
    write(tmp_path, 2, range(6, 12))
    write(tmp_path, 3, range(9, 11))
    events = read_events(tmp_path / "steps.jsonl")
    assert [e["step"] for e in events] == list(range(11))
    assert [e["attempt"] for e in events] == [1] * 6 + [2] * 3 + [3] * 2


def test_an_attempt_that_resumes_earlier_replaces_several_attempts(tmp_path: Path) -> None:
    for attempt, steps in enumerate((range(10), range(6, 12), range(3, 5)), 1):
        write(tmp_path, attempt, steps)
    assert [(e["attempt"], e["step"]) for e in read_events(tmp_path / "steps.jsonl")] == [
        *((1, 0), (1, 1), (1, 2)),
        *((3, 3), (3, 4)),
    ]


def test_an_attempt_that_starts_at_step_0_replaces_everything(tmp_path: Path) -> None:
    write(tmp_path, 1, range(10))
    write(tmp_path, 2, range(3))
    assert [e["attempt"] for e in read_events(tmp_path / "steps.jsonl")] == [2, 2, 2]
    assert len(read_events(tmp_path / "steps.jsonl", every_attempt=True)) == 13


@pytest.mark.parametrize("removed_bytes", range(1, 60, 7))
def test_a_file_cut_at_any_byte_loses_at_most_one_event(tmp_path: Path, removed_bytes: int) -> None:
    write(tmp_path, 1, range(4))
    path = tmp_path / "steps.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-removed_bytes])
    num_complete = data[:-removed_bytes].count(b"\n")
    assert [e["step"] for e in read_events(path)] == list(range(num_complete))


def test_appending_after_an_incomplete_line_does_not_join_two_events(tmp_path: Path) -> None:
    write(tmp_path, 1, range(4))
    path = tmp_path / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    write(tmp_path, 2, range(3, 6))
    assert [(e["attempt"], e["step"]) for e in read_events(path)] == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (2, 5)]


def test_an_incomplete_line_longer_than_one_search_block_is_removed(tmp_path: Path) -> None:
    write(tmp_path, 1, range(1))
    path = tmp_path / "steps.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": ' + b"1" * 200_000)
    write(tmp_path, 2, range(1, 2))
    assert [e["step"] for e in read_events(path)] == [0, 1]


def test_a_damaged_line_in_the_middle_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, range(3))
    path = tmp_path / "steps.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0\0\0", *lines[1:]]))
    assert [event["step"] for event in read_events(path)] == [0, 1, 2]
    assert "steps.jsonl line 2 is not a metric event" in caplog.text


def test_a_missing_stream_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "steps.jsonl") == []
