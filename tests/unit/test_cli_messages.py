"""Messages on the command line: printed once, plainly, on standard error; errors of the machine have a cure."""

import argparse
import errno
import logging

import pytest

from mixtera_hpc.cli.logging_setup import messages_on_stderr
from mixtera_hpc.cli.main import main
from mixtera_hpc.cli.verbs import status

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


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "No space left on device.\n  Make room"),
        (errno.EACCES, "Permission denied.\n  Make it accessible"),
        (errno.EMFILE, "Too many open files.\n  Raise the limit of open files"),
        (errno.ENAMETOOLONG, "File name too long.\n  Choose a shorter name."),
        (errno.ESTALE, "Stale file handle.\n  Check the file system"),
    ],
)
def test_an_error_of_the_machine_is_a_message_with_a_cure(
    number: int, cure: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise OSError(number, "not shown", "/data/file")

    monkeypatch.setattr(status, "run", fail)
    assert main(["status"]) == 2
    assert f"/data/file: {cure}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_limit_of_the_job_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(status, "run", fail)
    assert main(["status"]) == 2
    assert "Raise the limits of memory and processes of the job" in capsys.readouterr().err


def test_a_missing_file_that_no_verb_expects_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/data/file")

    monkeypatch.setattr(status, "run", fail)
    with pytest.raises(FileNotFoundError):
        main(["status"])
