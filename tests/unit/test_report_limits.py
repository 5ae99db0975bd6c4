"""A report says how fast each stage of a run could be, and which one binds."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.report_files import write_report
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.timing.stage_limits import StageLimit, limit_cells, stage_limits, wait_notices

RunMaker = Callable[..., RunFolder]


def limits_with(run: RunFolder, stages: Mapping[str, float]) -> dict[str, StageLimit]:
    """Return the limits of `run` after each of its steps got the times of `stages`."""
    path: Path = run.metric("steps")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**event, "stage_s": dict(stages)}) + "\n" for event in events))
    return {limit.stage: limit for limit in stage_limits(load_run_metrics(run))}


def test_the_trainer_binds_where_reading_is_faster(make_run: RunMaker) -> None:
    """A step of 0.5 s waits 0.05 s for data; 200 tokens per step."""
    limits = limits_with(make_run(["en", "de"], [(0, 8)]), {"read": 0.1, "tokenize": 0.1})
    assert limits["trainer"].limit == pytest.approx(200 / 0.45)
    assert limits["reading"].limit == pytest.approx(200 / 0.2)
    assert [limit.stage for limit in limits.values() if limit.binds] == ["trainer"]
    assert limits["trainer"].measured == pytest.approx(400)
    assert limits["reading"].headroom == pytest.approx(2.5)
    assert limits["reading"].detail == "read 50 %, tokenize 50 %"


def test_reading_binds_where_the_trainer_waits_for_it(make_run: RunMaker) -> None:
    limits = limits_with(make_run(["en", "de"], [(0, 8)]), {"wait": 0.4, "decode": 0.5})
    assert [limit.stage for limit in limits.values() if limit.binds] == ["reading"]
    assert limits["trainer"].limit == pytest.approx(200 / 0.1)
    assert limits["reading"].limit == pytest.approx(limits["reading"].measured)


def test_a_reduction_that_is_waited_for_binds(make_run: RunMaker) -> None:
    limits = limits_with(make_run(["en", "de"], [(0, 8)]), {"reduce": 0.2})
    assert limits["reduction"].seconds == pytest.approx(0.45)
    assert [limit.stage for limit in limits.values() if limit.binds] == ["reduction"]
    assert "reduction" not in limits_with(make_run(["en", "de"], [(0, 8)]), {})


def test_the_row_of_a_stage_names_rate_limit_and_headroom(make_run: RunMaker) -> None:
    limits = limits_with(make_run(["en", "de"], [(0, 8)]), {"read": 0.2})
    assert limit_cells(limits["reading"]) == (
        "reading (read 100 %)",
        "0.200 s",
        "400 tokens/s",
        "1.00 k tokens/s",
        "2.50 ×",
        "",
    )
    assert limit_cells(limits["trainer"])[-1] == "binds"


def test_a_report_warns_of_long_waits_and_names_the_cure(make_run: RunMaker) -> None:
    """One step of a hundred waits for a tenth of its time."""
    run = make_run(["en"], [(0, 8)])
    slow_reading = limits_with(run, {"wait": 0.4, "decode": 0.5}).values()
    assert "dataplane.workers" in wait_notices(list(slow_reading), 0.1)[0]
    fast_reading = limits_with(run, {"wait": 0.05, "decode": 0.01}).values()
    assert "10.0 % of its time" in wait_notices(list(fast_reading), 0.1)[0]
    assert "dataplane.prefetch_batches" in wait_notices(list(fast_reading), 0.1)[0]
    assert wait_notices(list(fast_reading), 0.01) == []


def test_the_page_shows_limits_and_long_waits(make_run: RunMaker) -> None:
    run = make_run(["en"], [(0, 8)])
    limits_with(run, {"read": 0.2})
    page = write_report(run).page.read_text()
    assert "<h2>Limits</h2>" in page
    assert "<td>reading (read 100 %)</td>" in page
    assert "One of 100 steps waits for data for 10.0 %" in page
