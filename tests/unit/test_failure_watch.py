"""The failure watch of a single process: no sentinel, and the first failure is recorded."""

import json
from pathlib import Path

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.comm.failure_watch import start_failure_watch
from mixtera_hpc.errors import SavedAndStopped


def test_a_failure_of_a_single_process_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="truncated"), start_failure_watch(Local(), tmp_path / "failure.json") as watch:
        watch.step(7)
        raise ValueError("a shard is truncated\nsecond line")

    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["step"] == 7
    assert failure["reason"] == "ValueError: a shard is truncated"


def test_a_later_failure_does_not_replace_the_first(tmp_path: Path) -> None:
    watch = start_failure_watch(Local(), tmp_path / "failure.json")
    watch.record_failure(ValueError("first"))
    watch.record_failure(ValueError("second"))

    assert json.loads((tmp_path / "failure.json").read_text())["reason"] == "ValueError: first"


@pytest.mark.parametrize("end", [SavedAndStopped("saved"), SystemExit(0), SystemExit(75)])
def test_a_clean_exit_is_not_a_failure(end: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(end)), start_failure_watch(Local(), tmp_path / "failure.json"):
        raise end

    assert not (tmp_path / "failure.json").exists()
