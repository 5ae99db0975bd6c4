"""Reports on a mixture that learns, and the warnings of `plan` before a run."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.mixture.learning import learning_warnings
from mixtera_hpc.dataplane.mixing.dynamic_mixer import MixingProblem
from mixtera_hpc.dataplane.mixing.learning_event import LearningEvent, LearningLog
from mixtera_hpc.report.mixing.learned_mixture import learned_notices, learned_rows, learned_section, read_learned

NAMES = ("a", "b", "c")
LAWS: dict[str, Any] = {
    "weights": [0.4, 0.3, 0.3],
    "speed": [1e-5, 2e-6, None],
    "credit": [0.4, 0.6, None],
    "epsilon": [1.0, 0.0, None],
    "beta": [6.0, 9.0, None],
    "alpha": [0.3, 0.8, None],
    "residual": [0.004, 0.06, None],
    "law_status": [1, 2, None],
    "law_bounds": [0, 8, None],
}
ADO = {"mixture": {"kind": "dynamic", "algorithm": {"name": "ado", "warmup": 120}}}


def test_the_report_shows_laws_and_flags_those_on_a_bound() -> None:
    learned = read_learned([LAWS, {"weights": [0.5, 0.2, 0.3], "credit": [0.5, 0.5, None]}], NAMES, ADO)
    headings, rows = learned_rows(learned)
    by_name = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    assert by_name["a"]["law"] == "fitted"
    assert by_name["a"]["credit"] == "0.5", "the newest value of each field counts"
    assert by_name["b"]["law"] == "alpha at its upper bound (older)"
    assert by_name["b"]["residual"] == "6.00%"
    assert by_name["c"]["law"] == "none"
    assert "alpha at its upper bound" in learned_section(learned, [1, 0, 2])
    notices = learned_notices(learned, 320)
    assert any("The laws of b lie on a bound" in notice for notice in notices)
    averaged = read_learned([{**LAWS, "alpha": [0.3, 0.6, None], "best_alpha": [0.3, 0.8, None]}], NAMES, ADO)
    headings, rows = learned_rows(averaged)
    assert dict(zip(headings, rows[1], strict=True))["alpha, best fit"] == "0.8", "a flagged bound is in the table"
    assert "describe the best fit" in learned_section(averaged, [0, 1, 2])
    assert any("The losses of b scatter by more than 5%" in notice for notice in notices)
    assert not any("never changes" in notice for notice in notices)


def test_the_report_says_why_a_mixture_did_not_change() -> None:
    events = [{"weights": [0.4, 0.3, 0.3], "num_failed_updates": 3, "problem": "ValueError: a bug"}]
    failed, warmup = learned_notices(read_learned(events, NAMES, ADO), 100)
    assert failed == "3 updates of the mixing algorithm failed, and the weights before stayed: ValueError: a bug"
    assert "warmup is 120, and the run has 100 steps: the mixture never changes" in warmup
    assert learned_section(read_learned([], NAMES, {}), [0, 1, 2]) == ""


def test_an_array_is_recorded_when_it_changes() -> None:
    log = LearningLog()
    first = LearningEvent(hears_losses=True, described={"alpha": np.ones(2), "credit": np.ones(2)}, problem=None)
    assert set(log.fields(first)) == {"alpha", "credit", "hears_losses"}
    problem = MixingProblem(step=3, count=2, message="ValueError: x")
    later = LearningEvent(hears_losses=None, described={"alpha": np.ones(2), "credit": np.zeros(2)}, problem=problem)
    fields = log.fields(later)
    assert set(fields) == {"credit", "num_failed_updates", "problem"}
    assert log.new_problem(later) == problem
    assert log.new_problem(later) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixture.algorithm.warmup=500"], "warmup is 500, and the run has 100 steps: the mixture never changes"),
        (["mixture.algorithm={name: skill-it}"], "training.validate_every is 0: the reference trainer never validates"),
    ],
)
def test_a_run_that_will_not_learn_is_named_before_it_starts(words: list[str], message: str) -> None:
    config = compose(["mixture=ado", "training.num_steps=100", "data.root=/data", "dataplane.vocab_size=9", *words])
    (warning,) = learning_warnings(config)
    assert message in warning
    assert (
        learning_warnings(
            compose(["mixture=natural", "training.num_steps=100", "data.root=/data", "dataplane.vocab_size=9"])
        )
        == []
    )
