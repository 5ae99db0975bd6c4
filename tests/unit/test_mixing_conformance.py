"""Every registered mixing algorithm, in all its variants, passes the conformance suite."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.core.mixing.algorithm import ALGORITHMS, make_algorithm
from mixtera_hpc.testing.mixing import CHECKS, AlgorithmOrFactory

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

pytestmark = pytest.mark.slow
"""Every algorithm passes every check."""

QUICK = {"warmup": 40, "refit_interval": 15}
EXAMPLE = "mixing_algorithm.LossTilt"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ado": ("ado", QUICK),
    "ado-paper": ("ado", {**QUICK, "variant": "paper"}),
    "ado-authors": ("ado", {**QUICK, "variant": "authors"}),
    "ado-authors-first": ("ado", {**QUICK, "variant": "authors-first"}),
    "ado-mixtera": ("ado", {**QUICK, "variant": "mixtera"}),
    "ado-demo": ("ado", {"warmup": 20, "refit_interval": 10}),
    "odm": ("odm", {}),
    "odm-released": ("odm", {"variant": "released"}),
    "loss-proportional": ("loss-proportional", {}),
    "loss-softmax": ("loss-proportional", {"temperature": 0.5}),
    "skill-it": ("skill-it", {}),
    "aioli": ("aioli", {"round_updates": 10}),
    "own": (EXAMPLE, {}),
    "doremi": ("exponentiated-gradient", {"eta": 0.01}),
    "sheared-llama": ("exponentiated-gradient", {"variant": "sheared-llama", "eta": 0.01}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_every_algorithm_conforms_to_its_protocol(check: Callable[[AlgorithmOrFactory], None], case: str) -> None:
    name, parameters = CASES[case]
    if name == "exponentiated-gradient":
        check(lambda num_domains: make_algorithm(name, {**parameters, "reference_losses": [0.0] * num_domains}))
    elif name == "aioli":
        check(lambda num_domains: make_algorithm(name, {"round_updates": 2 * num_domains + 1}))
    else:
        check(make_algorithm(name, parameters))


def test_every_registered_algorithm_is_tested() -> None:
    assert {name for name, _ in CASES.values()} == {*ALGORITHMS, EXAMPLE}
