"""Reading the metrics of a run, and the error messages for missing or damaged ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.errors import DataError, LaunchError
from mixtera_hpc.report.run_metrics import load_run_metrics

RunMaker = Callable[..., RunFolder]


def edit(path: Path, line: int, **changes: object) -> None:
    """Change fields of one event; None removes a field."""
    lines = path.read_text().splitlines()
    event = {**json.loads(lines[line]), **changes}
    lines[line] = json.dumps({k: v for k, v in event.items() if v is not None})
    path.write_text("\n".join(lines) + "\n")


def test_a_repeated_step_is_taken_from_the_last_attempt(make_run: RunMaker) -> None:
    metrics = load_run_metrics(make_run(["en", "de"], [(0, 10), (8, 20)]))
    assert metrics.steps.step.tolist() == list(range(20))
    assert metrics.steps.attempt.tolist() == [1] * 8 + [2] * 12
    assert metrics.resumed_attempts == [(2, 8)]
    assert metrics.steps.domain_loss[5].tolist() == pytest.approx([9.95, 10.95])
    assert metrics.mixture.step.tolist() == [0, 4, 8, 12, 16]
    assert metrics.domains == ("en", "de")


def test_an_attempt_whose_steps_were_all_repeated_still_counts(make_run: RunMaker) -> None:
    metrics = load_run_metrics(make_run(["en"], [(0, 3), (0, 5)]))
    assert len(metrics.attempts) == 2
    assert metrics.resumed_attempts == []


def test_a_null_loss_is_nan(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    path = run.metrics / "steps.jsonl"
    path.write_text(path.read_text().replace("[10.0,11.0]", "[null,11.0]"))
    loss = load_run_metrics(run).steps.domain_loss[0]
    assert np.isnan(loss[0])
    assert loss[1] == 11.0


def test_an_incomplete_last_line_is_ignored(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    path = run.metrics / "steps.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert load_run_metrics(run).steps.step.tolist() == [0, 1, 2]


def test_mixture_comm_and_attempts_files_are_optional(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    for stream in ("mixture", "comm", "attempts"):
        (run.metrics / f"{stream}.jsonl").unlink()
    metrics = load_run_metrics(run)
    assert metrics.mixture.weights.shape == (0, 2)
    assert len(metrics.comm.reduce.step) == 0
    assert metrics.domains == ("domain 0", "domain 1")


def test_a_folder_that_is_not_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"is not a run folder: it has no config\.yaml"):
        load_run_metrics(RunFolder(tmp_path))


@pytest.mark.parametrize("state", ["missing", "empty"])
def test_a_run_without_steps_names_the_command_to_run(make_run: RunMaker, state: str) -> None:
    run = make_run(["en"], [(0, 1)])
    (run.metrics / "steps.jsonl").unlink()
    if state == "empty":
        (run.metrics / "steps.jsonl").touch()
    with pytest.raises(
        DataError, match=rf"has not recorded any step yet: .*steps\.jsonl is {state}.*\n.*mixtera-hpc logs"
    ):
        load_run_metrics(run)


def test_an_event_without_a_required_field_is_named(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    edit(run.metrics / "steps.jsonl", 2, tokens=None)
    with pytest.raises(DataError, match=r"steps\.jsonl: event 3 has no 'tokens'"):
        load_run_metrics(run)


@pytest.mark.parametrize("value", [[1.0, 2.0, 3.0], 7.0, "low"])
def test_a_field_with_varying_shape_is_named(make_run: RunMaker, value: object) -> None:
    run = make_run(["en", "de"], [(0, 4)])
    edit(run.metrics / "steps.jsonl", 1, domain_loss=value)
    with pytest.raises(DataError, match="'domain_loss' must have the same type and length on every line"):
        load_run_metrics(run)


@pytest.mark.parametrize("value", ["null", "[null,100]", "99.5", '"100"', "[100.5,100]"])
@pytest.mark.parametrize("field", ["tokens", "domain_tokens", "num_nonfinite"])
def test_a_count_that_is_null_or_no_integer_is_named(make_run: RunMaker, field: str, value: str) -> None:
    run = make_run(["en", "de"], [(0, 1)])
    path = run.metrics / "steps.jsonl"
    path.write_text(re.sub(rf'("{field}"):(\d+|\[[^\]]*\])', rf"\1:{value}", path.read_text()))
    with pytest.raises(DataError, match=f"'{field}' must have the same type and length on every line"):
        load_run_metrics(run)


def test_a_large_count_keeps_all_its_digits(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    edit(run.metrics / "steps.jsonl", 2, tokens=2**53 + 1)
    assert load_run_metrics(run).steps.tokens[2] == 2**53 + 1


@pytest.mark.parametrize(("stream", "field"), [("mixture", "weights"), ("validation", "domain_loss")])
def test_a_stream_with_another_number_of_domains_than_the_steps_is_named(
    make_run: RunMaker, stream: str, field: str
) -> None:
    run = make_run(["en", "de"], [(0, 8)], validated_at=(3,))
    for line in range(len((run.metrics / f"{stream}.jsonl").read_text().splitlines())):
        edit(run.metrics / f"{stream}.jsonl", line, **{field: [1.0, 2.0, 3.0]})
    with pytest.raises(DataError, match=rf"{stream}\.jsonl: '{field}' must have the same type and length"):
        load_run_metrics(run)


def test_a_damaged_timing_is_named(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 4)])
    edit(run.metrics / "comm.jsonl", 0, plan_s="low")
    with pytest.raises(DataError, match=r"comm\.jsonl: 'plan_s' must have the same type"):
        load_run_metrics(run)
