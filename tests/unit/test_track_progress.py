"""The log tells how a run goes, without drowning anybody."""

import logging

import pytest

from mixtera_hpc.track.progress import Progress

EVENT = {"loss": 3.25, "tokens_per_s": 12345.6, "step_s": 0.5, "data_wait_s": 0.001}


def test_the_first_step_the_last_and_one_every_ten_seconds_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    progress = Progress(100, clock=lambda: now)
    with caplog.at_level(logging.INFO, "mixtera_hpc.training"):
        for step in range(100):
            progress.log("steps", {**EVENT, "step": step})
            progress.log("comm", {"step": step, "reduce_s": 1.0})
            now += 1.0
    assert [int(message.split()[1]) for message in caplog.messages] == [*range(1, 101, 10), 100]
    assert caplog.messages[0] == "step 1 of 100, loss 3.2500, 12,346 tokens/s, waiting for data 0.20%"


def test_a_step_without_a_loss_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mixtera_hpc.training"):
        Progress(10).log("steps", {**EVENT, "step": 0, "loss": None})
    assert "no loss" in caplog.text
