"""Messages of the library on the command line: printed once, plainly, on standard error."""

import logging

import pytest

from mixtera_hpc.cli.logging_setup import messages_on_stderr

LOGGER = logging.getLogger("mixtera_hpc")


def test_progress_is_printed_plainly_and_warnings_with_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_on_stderr():
        LOGGER.info("%d samples are dropped.", 7)
        LOGGER.warning("The data ended early.")
    assert capsys.readouterr().err == "7 samples are dropped.\nwarning: The data ended early.\n"


def test_a_verb_inside_a_verb_prints_a_message_once(capsys: pytest.CaptureFixture[str]) -> None:
    with messages_on_stderr(), messages_on_stderr():
        LOGGER.info("once")
    assert capsys.readouterr().err == "once\n"


def test_the_logger_is_as_before_afterwards() -> None:
    before = (LOGGER.level, list(LOGGER.handlers))
    with messages_on_stderr():
        assert LOGGER.handlers != before[1]
    assert (LOGGER.level, list(LOGGER.handlers)) == before
