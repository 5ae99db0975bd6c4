"""A report names the rank, stage and node that kept the others waiting."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.report_files import write_report
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.summary import summarize_run
from mixtera_hpc.report.terminal import report_text
from mixtera_hpc.report.timing.stalls import find_stalls

RunMaker = Callable[..., RunFolder]
HOSTS = [{"attempt": 1, "hosts": [["node01", 4], ["node02", 4]]}]


def event(attempt: int = 1, step_s: float = 0.5, **stages: tuple[float, int]) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "step_s": step_s,
        "stage_max_s": {stage: seconds for stage, (seconds, _) in stages.items()},
        "stage_rank": {stage: rank for stage, (_, rank) in stages.items()},
    }


def test_the_stage_that_a_wait_was_for_is_named() -> None:
    steps = [
        event(wait=(9.0, 1), read=(9.0, 1)),  # The start of an attempt.
        event(wait=(3.0, 5), read=(2.9, 5), decode=(0.1, 2), tokenize=(0.2, 3)),
        event(wait=(1.0, 5), read=(1.2, 5)),
        event(wait=(0.01, 5), read=(9.0, 5)),  # A long read that nobody waited for.
        event(wait=(0.4, 0), tokenize=(0.1, 2)),
        event(step_s=100.0, wait=(0.4, 0), tokenize=(0.4, 2)),  # A small part of the step.
        event(broadcast=(2.0, 6), plan=(1.9, 0)),
        event(broadcast=(1.0, 7)),
    ]
    stalls = find_stalls(steps, HOSTS)
    named = [(stall.rank, stall.host, stall.stage, stall.num_steps, stall.total_s) for stall in stalls]
    assert named == [
        (5, "node02", "read", 2, 4.0),
        (0, "node01", "plan", 1, 1.9),
        (7, "node02", "broadcast", 1, 1.0),
        (0, "node01", "wait", 1, 0.4),
    ]
    assert stalls[0].longest_s == 3.0


def test_the_node_is_that_of_the_attempt() -> None:
    hosts = [*HOSTS, {"attempt": 2, "hosts": [["node09", 8]]}]
    waits = {"wait": (3.0, 5), "read": (3.0, 5)}
    steps = [event(), event(**waits), event(attempt=2), event(attempt=2, **waits), event(attempt=3), event(3, **waits)]
    assert {stall.host for stall in find_stalls(steps, hosts)} == {"node02", "node09", ""}


def test_a_report_shows_the_wait_of_the_slowest_rank(make_run: RunMaker) -> None:
    """Rank 0 waited 0.05 s of 0.5 s per step, and rank 1 for 0.4 s: a tenth would be wrong."""
    run = make_run(["en", "de"], [(0, 20)])
    path = run.metrics / "steps.jsonl"
    slow = {"stage_s": {"wait": 0.4}} | event(wait=(0.4, 1), read=(0.4, 1))
    lines = [json.loads(line) | {name: slow[name] for name in slow if name.startswith("stage")} for line in path.open()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.metrics / "hosts.jsonl").write_text('{"attempt":1,"step":0,"hosts":[["node01",1],["node\\u001b[31m02",1]]}\n')
    summary = summarize_run(load_run_metrics(run))
    assert summary.performance.data_wait_share == pytest.approx(0.8)

    report = write_report(run)
    console = Console(width=120, record=True)
    console.print(report_text(report))
    shown = console.export_text()
    row = next(line for line in shown.splitlines() if "read" in line and "node" in line)
    assert row.split()[0] == "1" and row.split()[3] == "19" and "\x1b" not in row
    assert "80" in next(line for line in shown.splitlines() if "data wait" in line)
    assert "<h2>Stalls</h2>" in report.page.read_text()
