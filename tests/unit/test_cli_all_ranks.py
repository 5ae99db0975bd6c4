"""Verbs that every rank executes: an error that all ranks have is reported once."""

import pytest

from mixtera_hpc.cli.all_ranks import run_on_all_ranks
from mixtera_hpc.errors import ConfigError


def refuse() -> int:
    raise ConfigError("job.nodes is 0, but at least 1 is required.")


def test_the_first_rank_reports_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(ConfigError):
        run_on_all_ranks(refuse)


def test_other_ranks_return_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "3")
    assert run_on_all_ranks(refuse) == 2


def test_a_single_process_reports_the_error() -> None:
    with pytest.raises(ConfigError):
        run_on_all_ranks(refuse)


def test_the_exit_code_of_the_verb_is_returned() -> None:
    assert run_on_all_ranks(lambda: 75) == 75
