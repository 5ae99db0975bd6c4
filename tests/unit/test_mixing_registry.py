"""Algorithms are built from written parameters; wrong input is answered with the valid values."""

import dataclasses
import inspect
from typing import Any

import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.mixing.algorithm import ALGORITHMS, make_algorithm
from mixtera_hpc.errors import ConfigError


def test_parameters_override_defaults() -> None:
    made: Any = make_algorithm("ado", {"warmup": 20, "variant": "paper", "delta_min": 0})
    assert (made.config.warmup, made.config.variant, made.config.refit_interval) == (20, "paper", 1000)
    assert made.config.delta_min == 0.0


def test_a_list_of_numbers_becomes_a_tuple() -> None:
    made: Any = make_algorithm("exponentiated-gradient", {"reference_losses": [2, 2.5]})
    assert made.config.reference_losses == (2.0, 2.5)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "adoo",
            {},
            r"mixture\.algorithm\.name is 'adoo'.*Did you mean 'ado'\?.*Valid: ado, aioli, exponentiated-.*odm",
        ),
        (
            "ado",
            {"warm_up": 5},
            r"mixture\.algorithm\.warm_up is not a parameter.*Did you mean 'warmup'\?.*refit_interval",
        ),
        ("ado", {"warmup": "5"}, r"mixture\.algorithm\.warmup is '5', expected a whole number"),
        ("ado", {"warmup": 5.0}, r"warmup is 5\.0, expected a whole number"),
        ("ado", {"warmup": True}, r"warmup is True, expected a whole number"),
        ("ado", {"warmup": -1}, r"warmup is -1, expected a number at least 0"),
        ("ado", {"refit_interval": 0}, r"refit_interval is 0, expected a number at least 1"),
        ("ado", {"credit_rate": 1.5}, r"credit_rate is 1\.5, expected a number between 0 and 1"),
        ("ado", {"delta_min": float("nan")}, r"delta_min is nan, expected"),
        (
            "ado",
            {"variant": "papper"},
            r"variant is 'papper'\. Did you mean 'paper'\? Valid: authors, authors-first, default, mixtera",
        ),
        ("odm", {"decay": 2}, r"decay is 2\.0, expected a number between 0 and 1"),
        ("exponentiated-gradient", {"smoothing": -1}, r"smoothing is -1\.0, expected a number between 0 and 1"),
        ("exponentiated-gradient", {"reference_losses": 2.0}, r"expected a list of numbers.*reference_losses=\[2\.0\]"),
        (
            "exponentiated-gradient",
            {"reference_losses": [1.0, "x"]},
            r"reference_losses\[1\] is 'x', expected a number",
        ),
    ],
)
def test_wrong_input_is_answered_with_the_valid_values(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_algorithm(name, parameters)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_parameter_has_a_description(name: str) -> None:
    config = ALGORITHMS[name].Config
    lines = [line.strip() for line in inspect.getsource(config).splitlines()]
    for field in dataclasses.fields(config):
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
        assert lines[number + 1].startswith('"""'), f"{name}.{field.name} has no documentation"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_defaults_are_valid(name: str) -> None:
    assert make_algorithm(name, {}).name == name


@pytest.mark.parametrize("written", ["ado", {"name": "ado"}])
def test_an_algorithm_may_be_only_its_name(written: Any) -> None:
    mixture = from_plain(MixtureConfig, {"kind": "dynamic", "algorithm": written}, "mixture")
    assert mixture.algorithm == {"name": "ado"}
