"""Every registered mixing algorithm, in all its variants, passes the conformance suite."""

from collections.abc import Callable
from typing import Any

import pytest

from mixtera_hpc.core.mixing.algorithm import ALGORITHMS, MixingAlgorithm, make_algorithm
from mixtera_hpc.testing.mixing import CHECKS

pytestmark = pytest.mark.slow
"""Every algorithm passes every check."""

QUICK = {"warmup": 40, "refit_interval": 15}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ado": ("ado", QUICK),
    "ado-paper": ("ado", {**QUICK, "variant": "paper"}),
    "ado-authors": ("ado", {**QUICK, "variant": "authors"}),
    "ado-mixtera": ("ado", {**QUICK, "variant": "mixtera"}),
    "ado-demo": ("ado", {"warmup": 20, "refit_interval": 10}),
    "odm": ("odm", {}),
    "doremi": ("exponentiated-gradient", {"eta": 0.01}),
    "sheared-llama": ("exponentiated-gradient", {"variant": "sheared-llama", "eta": 0.01}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_every_algorithm_conforms_to_its_protocol(check: Callable[[MixingAlgorithm[Any]], None], case: str) -> None:
    name, parameters = CASES[case]
    check(make_algorithm(name, parameters))


def test_every_registered_algorithm_is_tested() -> None:
    assert {name for name, _ in CASES.values()} == set(ALGORITHMS)
