"""A fraction of a domain: a fixed part of its training samples, served like a smaller domain."""

from collections.abc import Callable
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.selection import select_domains

RUN = ["dataplane.global_batch_size=1", "dataplane.chunk_steps=50"]
ONCE = {"unit": "samples", "on_exhausted": "redistribute", "max_epochs": 1.0}
RANGES: list[dict[str, Any]] = [
    {"key": {"size": {"min": 600}, "source": ["argparse", "ast"]}},
    {"key": {"size": {"below": 600}, "source": ["argparse", "difflib"]}},
    {"key": {"source": ["argparse", "ast", "difflib"]}},
]
"""Domains that share samples, so that numbers and the order of the keys decide."""


def configured(collection: list[str], mixture: dict[str, Any], held_out: float = 0.0, **plane: Any) -> Config:
    words = [word for word in collection if not word.startswith("mixture")]
    plain = compose_plain([*words, *RUN, f"query.holdout.fraction={held_out}"])
    changed = {"mixture": {**plain["mixture"], **mixture}, "dataplane": {**plain["dataplane"], **plane}}
    return from_plain(Config, {**plain, **changed})


def limited(fractions: list[float | None]) -> list[dict[str, Any]]:
    return [{**domain, "fraction": fraction} for domain, fraction in zip(RANGES, fractions, strict=True)]


def served(config: Config, split: Any = "train") -> dict[str, set[int]]:
    """Return domain → the ids of the samples that one epoch serves."""
    ids: dict[str, set[int]] = {}
    with DataPlane.open(config, Local(), split=split) as plane:
        for batch in plane:
            for domain, payload in zip(batch.domain_ids.tolist(), batch.payloads or [], strict=True):
                ids.setdefault(plane.domain_names[domain], set()).add(payload["meta"]["id"])
    return ids


@pytest.mark.parametrize("held_out", [0.0, 0.2])
@pytest.mark.parametrize("remainder", [None, {"fraction": 0.5}])
def test_each_domain_serves_a_fixed_part_of_its_own_samples(
    collection: list[str], held_out: float, remainder: dict[str, Any] | None
) -> None:
    mixture = {**ONCE, "remainder": remainder}
    whole = served(configured(collection, {**mixture, "domains": RANGES, "remainder": remainder and {}}, held_out))
    half = served(configured(collection, {**mixture, "domains": limited([0.5, None, 0.3])}, held_out))
    less = served(configured(collection, {**mixture, "domains": limited([0.2, 1.0, 0.3])}, held_out))
    # What a fraction leaves out moves to no other domain, and a domain without a fraction keeps everything.
    names = open_source(configured(collection, {**mixture, "domains": RANGES}, held_out), Local()).names
    first, second, third = names[:3]
    for name in names:
        assert half[name] <= whole[name]
    assert half[second] == less[second] == whole[second]
    assert less[first] < half[first] < whole[first]
    assert half[third] == less[third] < whole[third]
    if remainder is not None:
        assert half["remainder"] < whole["remainder"]
    share = len(half[first]) / len(whole[first])
    assert abs(share - 0.5) < 4 * 0.5 / len(whole[first]) ** 0.5


def test_held_out_samples_do_not_depend_on_the_fraction(collection: list[str]) -> None:
    whole = configured(collection, {**ONCE, "group_by": ["source"]}, 0.3)
    part = configured(collection, {**ONCE, "group_by": ["source"], "fraction": 0.5}, 0.3)
    held_out = served(whole, "validation")
    assert served(part, "validation") == held_out
    assert not set.union(*served(part).values()) & set.union(*held_out.values())


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_counts_of_the_index_are_those_that_a_run_serves(collection: list[str], held_out: float) -> None:
    config = configured(collection, {**ONCE, "domains": limited([0.4, 0.7, None]), "remainder": {}}, held_out)
    ids = served(config)
    with open_configured(config) as index:
        selected = select_domains(config, index)
    counts = dict(zip(selected.names, selected.selection.table.totals()[0].tolist(), strict=True))
    assert counts == {name: len(of_domain) for name, of_domain in ids.items()}


@pytest.mark.parametrize(
    "mixture",
    [
        {"group_by": ["source"], "fraction": 0.5},
        {"domains": limited([0.5, 0.3, None]), "remainder": {"fraction": 0.4}},
        {"group_by": ["source"], "fraction": 0.5, "unit": "samples", "kind": "dynamic", "algorithm": {"name": "odm"}},
    ],
    ids=["all", "ranges", "learned samples"],
)
def test_a_limited_run_resumes_on_other_ranks_and_is_proven(
    collection: list[str], mixture: dict[str, Any], prove_run: Callable[[Config], int]
) -> None:
    words = [word for word in collection if not word.startswith("mixture")]
    words += [
        "dataplane.global_batch_size=6",
        "dataplane.chunk_steps=2",
        "dataplane.seq_len=32",
        "dataplane.audit=true",
    ]
    plain = compose_plain([*words, "dataplane.audit=true", "training.num_steps=9", "query.holdout.fraction=0.2"])
    assert prove_run(from_plain(Config, {**plain, "mixture": {**plain["mixture"], **mixture}})) == 54


def test_epochs_of_a_small_budget_are_those_of_the_full_run(collection: list[str]) -> None:
    mixture = {"group_by": ["source"]}
    full = open_source(configured(collection, mixture), Local()).layout.epoch_items().sum()
    tenth = open_source(configured(collection, {**mixture, "fraction": 0.1}), Local()).layout.epoch_items().sum()
    assert tenth / full == pytest.approx(0.1, rel=0.5)


def test_the_fraction_belongs_to_the_identity_of_a_run(collection: list[str]) -> None:
    config = configured(collection, {"group_by": ["source"]})
    with DataPlane.open(config, Local()) as plane:
        state = plane.state_dict()
    other = configured(collection, {"group_by": ["source"], "fraction": 0.5})
    with DataPlane.open(other, Local()) as plane, pytest.raises(ConfigError, match="fraction"):
        plane.load_state_dict(state)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"group_by": ["source"], "fraction": 0.0}, "mixture.fraction is 0.0, expected a share above 0 and at most 1"),
        ({"group_by": ["source"], "fraction": 1.5}, "mixture.fraction is 1.5, expected"),
        ({"domains": limited([-0.1, None, None])}, r"mixture.domains\[0\].fraction is -0.1, expected"),
        ({"domains": limited([float("nan"), None, None])}, r"mixture.domains\[0\].fraction is nan, expected"),
    ],
)
def test_a_wrong_fraction_is_refused(collection: list[str], mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(configured(collection, mixture))


def test_a_fraction_without_samples_is_refused_or_said(collection: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MixtureError, match=r"The fraction 0.0001 holds none of the .* training samples of "):
        open_source(configured(collection, {"domains": limited([0.0001, None, None])}), Local())
    # Values of a property that are as rare are no mistake of the user's.
    source = open_source(configured(collection, {"group_by": ["source"], "fraction": 0.5}), Local())
    empty = [name for name, items in zip(source.names, source.layout.epoch_items(), strict=True) if not items]
    assert empty and all(name in caplog.text for name in empty)


def test_plan_names_the_fractions(collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *collection, *RUN, "mixture.fraction=0.9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Fraction of the training samples: all domains 0.9." in out
