"""The step log pairs each timing with the losses of its step."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.steps.step_log import StepLog, StepTiming


class Recorder:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def log(self, stream: str, event: Mapping[str, Any]) -> None:
        assert stream == "steps"
        self.events.append(dict(event))

    def close(self) -> None:
        return None


def timing(step: int) -> StepTiming:
    return StepTiming(step=step, step_s=0.5, data_wait_s=0.1 * step, learning_rate=1e-3 * step)


def statistics(step: int, loss_sum: list[float], num_tokens: list[int]) -> DomainStatistics:
    return DomainStatistics(
        step=step,
        loss_sum=np.array(loss_sum),
        num_tokens=np.array(num_tokens),
        num_sequences=np.array([2, 1]),
        num_nonfinite=np.array([0, 1]),
    )


def test_an_event_pairs_a_step_with_its_own_losses_even_if_they_are_late() -> None:
    recorder = Recorder()
    log = StepLog(recorder, num_ranks=4, log_every=1)
    log.add_timing(timing(0))
    log.add_timing(timing(1))
    assert recorder.events == []
    log.add_statistics([statistics(0, [30.0, 0.0], [10, 0])])
    (event,) = recorder.events
    assert event == {
        "step": 0,
        "num_steps": 1,
        "loss": 3.0,
        "tokens": 10,
        "tokens_per_s": 20.0,
        "step_s": 0.5,
        "data_wait_s": 0.0,
        "learning_rate": 0.0,
        "num_ranks": 4,
        "num_nonfinite": 1,
        "domain_loss": [3.0, None],
        "domain_tokens": [10, 0],
        "domain_sequences": [2, 1],
    }


def test_an_event_over_several_steps_weighs_losses_by_tokens() -> None:
    recorder = Recorder()
    log = StepLog(recorder, num_ranks=1, log_every=2)
    log.add_timing(timing(0))
    log.add_timing(timing(1))
    log.add_statistics([statistics(0, [10.0, 0.0], [10, 0]), statistics(1, [90.0, 8.0], [30, 4])])
    (event,) = recorder.events
    assert (event["step"], event["num_steps"], event["tokens"]) == (1, 2, 44)
    assert event["loss"] == pytest.approx(108 / 44)
    assert event["domain_loss"] == [2.5, 2.0]
    assert event["data_wait_s"] == pytest.approx(0.05)


def test_flushing_before_a_checkpoint_counts_every_step_once() -> None:
    recorder = Recorder()
    log = StepLog(recorder, num_ranks=1, log_every=4)
    for step in range(8):
        log.add_timing(timing(step))
        log.add_statistics([statistics(step, [1.0, 1.0], [1, 1])])
        if step == 4:
            log.flush()
            log.flush()
    assert [(e["step"], e["num_steps"]) for e in recorder.events] == [(3, 4), (4, 1), (7, 3)]


def test_a_step_without_counted_tokens_has_a_null_loss() -> None:
    recorder = Recorder()
    log = StepLog(recorder, num_ranks=1, log_every=1)
    log.add_timing(timing(0))
    log.add_statistics([statistics(0, [0.0, 0.0], [0, 0])])
    assert recorder.events[0]["loss"] is None
    assert recorder.events[0]["domain_loss"] == [None, None]
