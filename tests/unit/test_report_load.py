"""A record is what the metrics say, or a clear word on why there is none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import DataError, LaunchError
from mixtera_hpc.report.run_metrics import load_run_metrics

RunMaker = Callable[..., RunFolder]


def edit(path: Path, line: int, **changes: object) -> None:
    """Change fields of one event; None takes a field away."""
    lines = path.read_text().splitlines()
    event = {**json.loads(lines[line]), **changes}
    lines[line] = json.dumps({k: v for k, v in event.items() if v is not None})
    path.write_text("\n".join(lines) + "\n")


def test_every_step_is_told_once_by_the_attempt_that_did_it_last(make_run: RunMaker) -> None:
    record = load_run_metrics(make_run(["en", "de"], [(0, 10), (8, 20)]))
    assert record.steps.step.tolist() == list(range(20))
    assert record.steps.attempt.tolist() == [1] * 8 + [2] * 12
    assert record.resumed_at == [(2, 8)]
    assert record.steps.domain_loss[5].tolist() == pytest.approx([9.95, 10.95])
    assert record.mixture.step.tolist() == [0, 4, 8, 12, 16]
    assert record.domains == ("en", "de")


def test_an_attempt_that_left_nothing_is_still_an_attempt(make_run: RunMaker) -> None:
    record = load_run_metrics(make_run(["en"], [(0, 3), (0, 5)]))
    assert len(record.attempts) == 2
    assert record.resumed_at == []


def test_a_loss_that_does_not_exist_is_nan(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    path = run.metrics / "steps.jsonl"
    path.write_text(path.read_text().replace("[10.0,11.0]", "[null,11.0]"))
    loss = load_run_metrics(run).steps.domain_loss[0]
    assert np.isnan(loss[0])
    assert loss[1] == 11.0


def test_a_last_line_cut_by_a_kill_is_left_out(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    path = run.metrics / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert load_run_metrics(run).steps.step.tolist() == [0, 1, 2]


def test_without_mixture_and_communication_the_steps_remain(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    for stream in ("mixture", "comm", "attempts"):
        (run.metrics / f"{stream}.jsonl").unlink()
    record = load_run_metrics(run)
    assert record.mixture.weights.shape == (0, 2)
    assert len(record.talk.reduce[0]) == 0
    assert record.domains == ("domain 0", "domain 1")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"is not a run: it has no config\.yaml"):
        load_run_metrics(RunFolder(tmp_path))


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_run_without_steps_says_so_and_where_to_look(make_run: RunMaker, state: str) -> None:
    run = make_run(["en"], [(0, 1)])
    (run.metrics / "steps.jsonl").unlink()
    if state == "empty":
        (run.metrics / "steps.jsonl").touch()
    with pytest.raises(DataError, match=rf"has recorded no step yet: .*steps\.jsonl is {state}.*\n.*mixtera-hpc logs"):
        load_run_metrics(run)


def test_an_event_without_a_field_that_all_have_is_named(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    edit(run.metrics / "steps.jsonl", 2, tokens=None)
    with pytest.raises(DataError, match=r"steps\.jsonl: event 3 has no 'tokens'"):
        load_run_metrics(run)


@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 7.0, "low"])
def test_a_field_of_another_shape_is_named(make_run: RunMaker, value: object) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    edit(run.metrics / "steps.jsonl", 1, domain_loss=value)
    with pytest.raises(DataError, match="'domain_loss' is not the same kind of value on every line"):
        load_run_metrics(run)
