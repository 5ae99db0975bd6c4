"""The live view of a run: its state from its events, and the lines that are shown."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.cells import cell_len

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.attempts import ExitRecord, JobRecord, create_attempt, end_attempt, record_start
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.report.live.event_tail import EventTail
from mixtera_hpc.report.live.run_view import WINDOW, RunView, Snapshot
from mixtera_hpc.report.live.screen import Headline, screen_lines

HEADLINE = Headline(run="trial/1", state="RUNNING", reason=None, job_id="4711", elapsed_s=65)


def step_event(step: int, loss: float = 2.0) -> dict:
    return {
        "step": step,
        "attempt": 1,
        "loss": loss,
        "tokens": 100,
        "tokens_per_s": 1000.0,
        "step_s": 0.5,
        "data_wait_s": 0.05,
        "num_ranks": 4,
        "domain_loss": [loss, None],
        "domain_tokens": [100, 0],
        "stage_s": {"read": 0.02, "reduce": 0.001},
        "stage_rank": {"read": 3, "reduce": 0},
    }


def watched(num_steps: int = 2 * WINDOW) -> RunView:
    view = RunView()
    view.add("attempts", [{"step": 0, "attempt": 1, "num_steps": 100, "domains": ["web", "code"]}])
    view.add("hosts", [{"step": 0, "attempt": 1, "hosts": [["nid1", 2], ["nid2", 2]]}])
    view.add("mixture", [{"chunk": 7, "domains": ["web", "code"], "weights": [0.75, 0.25], "served": [0.7, 0.3]}])
    view.add("steps", [step_event(step, 3.0 if step < WINDOW else 2.0) for step in range(num_steps)])
    return view


def test_a_snapshot_has_speed_time_left_and_the_slowest_rank() -> None:
    snapshot = watched().snapshot()

    assert (snapshot.steps_done, snapshot.num_steps, snapshot.attempt) == (40, 100, 1)
    assert (snapshot.tokens_per_s, snapshot.step_s, snapshot.remaining_s) == (1000.0, 0.5, 30.0)
    assert snapshot.wait_share == pytest.approx(0.1)
    slowest = snapshot.slowest[0]
    assert (slowest.stage, slowest.rank, slowest.host, slowest.seconds) == ("read", 3, "nid2", pytest.approx(0.02))


def test_a_snapshot_has_the_mixture_and_how_losses_change() -> None:
    web, code = watched().snapshot().domains

    assert (web.name, web.weight, web.served) == ("web", 0.75, 0.7)
    assert (web.loss, web.loss_before) == (2.0, 3.0)
    assert (code.loss, code.loss_before) == (None, None)


def test_a_run_without_steps_is_shown() -> None:
    lines = screen_lines(HEADLINE, RunView().snapshot(), columns=80, rows=24)

    assert lines[0] == "trial/1 · RUNNING · job 4711 · runs for 65 s"
    assert "No step has been recorded yet." in lines


@pytest.mark.parametrize("columns", [20, 47, 80, 200])
@pytest.mark.parametrize("rows", [3, 8, 24, None])
def test_lines_fit_into_the_terminal(columns: int, rows: int | None) -> None:
    lines = screen_lines(HEADLINE, watched().snapshot(), columns=columns, rows=rows)

    assert max(map(cell_len, lines)) <= columns
    assert rows is None or len(lines) <= rows


def test_names_cannot_control_the_terminal() -> None:
    view = watched()
    view.add("mixture", [{"chunk": 8, "domains": ["\x1b[2Jweb", "日本語"], "weights": [0.5, 0.5], "served": [0, 0]}])

    text = "\n".join(screen_lines(HEADLINE, view.snapshot(), columns=80, rows=None))

    assert "\x1b" not in text
    assert "\\u001b[2Jweb" in text


def test_a_snapshot_of_nothing_has_no_numbers() -> None:
    assert RunView().snapshot() == Snapshot()


def test_events_are_read_once_and_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    tail = EventTail(path)
    assert tail.new_events() == []

    path.write_text('{"step": 0}\nnot json\n{"step": 1}\n{"ste')
    assert [event["step"] for event in tail.new_events()] == [0, 1]
    with path.open("a") as file:
        file.write('p": 2}\n')
    assert [event["step"] for event in tail.new_events()] == [2]
    assert tail.new_events() == []


def test_the_verb_prints_one_view_where_there_is_no_terminal(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("run.name=seen")
    folder = prepare_run(config, [], datetime.now(UTC))
    record_start(folder, create_attempt(folder), JobRecord.slurm(config, "4711"))
    end_attempt(folder, 1, ExitRecord(exit_code=0, elapsed_s=9))
    write(folder, "steps", [step_event(step) for step in range(5)])
    write(folder, "mixture", [{"step": 0, "chunk": 0, "domains": ["a", "b"], "weights": [0.5, 0.5], "served": [0, 0]}])

    assert main(["watch", str(folder.path)]) == 0

    text = capsys.readouterr().out
    assert "COMPLETED" in text and "step 5" in text and "50.0 %" in text


def write(folder: RunFolder, stream: str, events: list[dict]) -> None:
    folder.metrics.mkdir(exist_ok=True)
    folder.metric(stream).write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize("seconds", ["0", "x", "nan", "1e9"])
def test_a_wrong_interval_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["watch", "run", "--interval", seconds])

    assert error.value.code == 2
    assert "0.1 to 3600" in capsys.readouterr().err
