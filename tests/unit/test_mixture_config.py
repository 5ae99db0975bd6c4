"""Mixtures in the configuration: domain_ids, and messages about mistakes."""

import re
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.mixture.check_mixture import mixture_problems
from mixtera_hpc.config.mixture.domain_tree import domain_entries
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.dataplane.mixing.configured_weights import config_bounds, config_weights
from mixtera_hpc.dataplane.mixing.context import DomainSizes
from mixtera_hpc.errors import ConfigError, MixtureError

NESTED = [
    {
        "key": {"lang": "en"},
        "weight": 0.8,
        "domains": [{"key": {"source": "web"}, "weight": 0.75}, {"key": {"source": "books"}, "weight": 0.25}],
    },
    {"key": {"lang": "de"}, "weight": 0.1},
]


def mixture(**plain: Any) -> MixtureConfig:
    return from_plain(MixtureConfig, plain, "mixture")


def weights(config: MixtureConfig, *sizes: int, budget: int = 1000) -> list[float]:
    assert not mixture_problems(config)
    result: list[float] = config_weights(config, config, domain_sizes(config, *sizes, budget=budget)).tolist()
    return result


def domain_sizes(config: MixtureConfig, *sizes: int, budget: int = 1000) -> DomainSizes:
    keys = tuple(entry.key for entry in domain_entries(config))
    return DomainSizes(keys=keys, sizes=np.array(sizes), budget=budget)


def at(kind: str, weight: float | None = None, **more: Any) -> dict[str, Any]:
    return {"key": {"source": kind}, "weight": weight, **more}


def test_domains_of_groups_come_in_written_order_and_the_remainder_last() -> None:
    config = mixture(kind="hierarchical", domains=NESTED, remainder={"weight": 0.1})
    names = ["lang=en source=web", "lang=en source=books", "lang=de", "remainder"]
    assert [entry.name for entry in domain_entries(config)] == names
    assert weights(config, 1, 1, 1, 1) == pytest.approx([0.6, 0.2, 0.1, 0.1])


def test_stages_name_domains_in_the_order_they_are_first_named() -> None:
    stages = [
        {"start": 0, "domains": [at("b", 1.0)]},
        {"start": 5, "domains": [at("a", 0.5), at("b", 0.5)]},
    ]
    config = mixture(kind="schedule", schedule={"stages": stages})
    assert [entry.name for entry in domain_entries(config)] == ["source=b", "source=a"]
    assert weights(config, 10, 10) == [1.0, 0.0]


def test_natural_weights_are_of_the_named_domains_only() -> None:
    stages = [{"start": 0, "kind": "natural", "domains": [at("a"), at("c")]}]
    config = mixture(kind="schedule", domains=[at("a"), at("b"), at("c")], schedule={"stages": stages})
    assert weights(config, 30, 40, 10) == pytest.approx([0.75, 0, 0.25])


def test_a_dynamic_mixture_begins_with_written_or_natural_weights() -> None:
    assert weights(mixture(kind="dynamic", domains=[at("a", 0.9), at("b", 0.1)]), 5, 5) == pytest.approx([0.9, 0.1])
    assert weights(mixture(kind="dynamic", domains=[at("a"), at("b")]), 30, 10) == pytest.approx([0.75, 0.25])
    tempered = mixture(kind="dynamic", domains=[at("a"), at("b")], temperature=2.0)
    assert weights(tempered, 90, 10) == pytest.approx([0.75, 0.25])


def test_unimax_distributes_the_budget_of_the_whole_run() -> None:
    assert weights(mixture(unimax_epochs=2.0, domains=[at("a"), at("b")]), 10, 1000, budget=100) == [0.2, 0.8]


def test_the_floor_and_cap_of_a_domain_override_those_of_the_mixture() -> None:
    config = mixture(floor=0.1, cap=0.6, domains=[at("a", floor=0.3), at("b", cap=0.9), at("c")])
    bounds = config_bounds(config, domain_sizes(config, 5, 5, 0))
    assert bounds is not None
    assert [side.tolist() for side in bounds] == [[0.3, 0.1, 0.0], [0.6, 0.9, 0.0]]
    assert config_bounds(mixture(domains=[at("a")]), DomainSizes(keys=({},), sizes=np.array([1]), budget=1)) is None


def test_bounds_that_leave_no_mixture_are_refused() -> None:
    config = mixture(cap=0.4, domains=[at("a"), at("b")])
    with pytest.raises(MixtureError, match=r"their caps to 0\.8"):
        config_bounds(config, domain_sizes(config, 5, 5))


MISTAKES = {
    "groups sum to 1": (
        {"kind": "hierarchical", "domains": [{**NESTED[0], "weight": 1, "domains": [at("a", 0.5), at("b", 0.6)]}]},
        r"mixture.domains\[0\].domains sum to 1.1, expected 1 .* mixture.normalize=true",
    ),
    "the whole sums to 1": ({"kind": "static", "domains": [at("a", 0.5)]}, "sum to 0.5"),
    "the remainder counts": (
        {"kind": "static", "domains": [at("a", 0.5)], "remainder": {"weight": 0.6}},
        "mixture.domains and its remainder sum to 1.1",
    ),
    "the remainder has a share": (
        {"kind": "static", "domains": [at("a", 1.5)], "remainder": {"weight": -0.5}},
        "mixture.remainder.weight is -0.5, expected a number of at least 0",
    ),
    "weights are shares": (
        {"kind": "static", "domains": [at("a", -1.0)]},
        r"^mixture.domains\[0\].weight is -1.0, expected a number of at least 0",
    ),
    "the remainder has no key": (
        {"kind": "static", "domains": [at("a", 0.5)], "remainder": at("b", 0.5)},
        "mixture.remainder has a key",
    ),
    "a remainder needs keys": ({"remainder": {}, "group_by": ["source"]}, "Give mixture.domains"),
    "groups are hierarchical": ({"kind": "static", "domains": NESTED}, "Set mixture.kind=hierarchical"),
    "a group's key is its members'": (
        {"kind": "hierarchical", "domains": [at("a", 1.0, domains=[at("b", 1.0)])]},
        r"domains\[0\].domains\[0\].key names 'source', as the group",
    ),
    "natural has no weights": (
        {"domains": [at("a", 0.9), at("b", 0.1)]},
        r"mixture.domains\[0\].weight is 0.9, but mixture.kind=natural",
    ),
    "a natural stage has none either": (
        {"kind": "schedule", "schedule": {"stages": [{"start": 0, "kind": "natural", "domains": [at("a", 1.0)]}]}},
        r"stages\[0\].domains\[0\].weight is 1",
    ),
    "no domain twice": (
        {"domains": [at("a"), {"key": {"source": ["a"]}}]},
        r"domains\[1\].key equals that of mixture.domains\[0\]",
    ),
    "all weights or none": ({"domains": [at("a", 1.0), at("b")]}, "some domains have a weight"),
    "floors fit": ({"domains": [at("a", floor=0.7), at("b", floor=0.7)]}, "sum to 1.4"),
    "floor below cap": ({"floor": 0.5, "domains": [at("a", cap=0.2)]}, "the floor 0.5 is above the cap 0.2"),
    "shares": ({"cap": 1.5}, "mixture.cap is 1.5"),
    "epochs": ({"domains": [at("a", max_epochs=0.0)]}, "max_epochs is 0.0"),
    "limits are of domains": (
        {"kind": "hierarchical", "domains": [{**NESTED[0], "weight": 1, "cap": 0.5}]},
        "on a group",
    ),
    "temperature shapes natural weights": (
        {"kind": "static", "domains": [at("a", 1.0)], "temperature": 2.0},
        "mixture.temperature shapes natural weights",
    ),
    "temperature is positive": ({"temperature": 0.0}, "above 0"),
    "one way to shape": ({"temperature": 2.0, "unimax_epochs": 1.0}, "Set one of them"),
    "arbitrary has no domains": ({"kind": "arbitrary", "domains": [at("a")]}, "mixture.domains is set"),
    "stages belong to a schedule": ({"schedule": {"stages": [{"start": 0}]}}, "Set mixture.kind=schedule"),
    "a schedule has stages": ({"kind": "schedule"}, "needs mixture.schedule.stages"),
    "the first stage starts": (
        {"kind": "schedule", "schedule": {"stages": [{"start": 1, "kind": "natural"}]}},
        r"stages\[0\].start is 1",
    ),
    "stages ascend": (
        {"kind": "schedule", "schedule": {"stages": [{"start": s, "kind": "natural"} for s in (0, 5, 5)]}},
        r"stages\[2\].start is 5, expected more than 5",
    ),
    "samples have no tokens": (
        {
            "kind": "schedule",
            "unit": "samples",
            "schedule": {"unit": "tokens", "stages": [{"start": 0, "kind": "natural"}]},
        },
        "counts no tokens",
    ),
    "a stage's domains are the run's": (
        {
            "kind": "schedule",
            "domains": [at("apple"), at("pear")],
            "schedule": {"stages": [{"start": 0, "domains": [at("aple", 1.0)]}]},
        },
        "Did you mean 'source=apple'",
    ),
    "limits hold for the whole run": (
        {"kind": "schedule", "schedule": {"stages": [{"start": 0, "domains": [at("a", 1.0, max_epochs=1.0)]}]}},
        "holds for the whole run",
    ),
    "a stage has weights": ({"kind": "schedule", "schedule": {"stages": [{"start": 0}]}}, "has no weights"),
    "a stage's algorithm": (
        {"kind": "schedule", "schedule": {"stages": [{"start": 0, "kind": "dynamic", "algorithm": {"name": "adoo"}}]}},
        r"stages\[0\]: .*Did you mean 'ado'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_has_exactly_one_message(name: str) -> None:
    plain, message = MISTAKES[name]
    (problem,) = mixture_problems(mixture(**plain))
    assert re.search(message, problem), problem


NEEDS = {
    "static": ["mixture.domains=[{key: {source: a}, weight: 1}]"],
    "hierarchical": ["mixture.domains=[{key: {source: a}, weight: 1, domains: [{key: {tags: b}}]}]"],
    "arbitrary": ["dataplane.shuffle=none"],
}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (conf_dir() / "mixture").glob("*.yaml")))
def test_every_preset_composes_with_the_keys_that_its_comment_asks_for(preset: str) -> None:
    plain = ["data.root=/data", "index.path=index.h5", "dataplane.tokenizer=t.json", f"mixture={preset}"]
    compose([*plain, *NEEDS.get(preset, [])])
    if preset in NEEDS:
        with pytest.raises(ConfigError, match=f"mixture.kind={preset}"):
            compose(plain)
