"""Domains by ranges of a number: configuration, counts, whole runs."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.check import check_data
from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domain_keys import NumberRange, domain_key_to_plain, domain_name, parse_domain_key
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.selection import select_domains
from mixtera_hpc.testing.writers import write_arrow, write_compressed, write_parquet

RUN = ["dataplane.seq_len=32", "dataplane.global_batch_size=6", "dataplane.audit=true"]


def configured(collection: list[str], mixture: dict[str, Any]) -> Config:
    words = [word for word in collection if not word.startswith("mixture")]
    plain = compose_plain([*words, *RUN])
    return from_plain(Config, {**plain, "mixture": {**plain["mixture"], **mixture}})


def sizes(collection: list[str]) -> list[float | None]:
    """Return the number `size` of every sample."""
    with open_configured(compose(collection)) as index:
        blocks = range(len(index.tables.blocks))
        values = [v for b in blocks for v in index.read_block(b).numbers["size"].tolist()]
    return [None if value != value else value for value in values]


@pytest.mark.parametrize(
    ("plain", "name", "inside", "outside"),
    [
        ({"min": 0.5}, "q=[0.5,inf)", [0.5, 9.0], [0.4999]),
        ({"max": 1}, "q=[-inf,1]", [1.0, -3.0], [1.0000001]),
        ({"min": 0, "below": 0.3}, "q=[0,0.3)", [0.0, 0.29], [0.3, -0.1]),
        ({"min": 2, "max": 2}, "q=[2,2]", [2.0], [1.9, 2.1]),
        ([{"min": 1, "below": 2}, None], "q=[1,2)|null", [1.0], [2.0]),
    ],
)
def test_a_range_holds_its_numbers_and_reads_back(
    plain: Any, name: str, inside: list[float], outside: list[float]
) -> None:
    key = parse_domain_key({"q": plain})
    assert domain_name(key) == name
    assert parse_domain_key(domain_key_to_plain(key)) == key
    (number_range,) = (value for value in key["q"] if isinstance(value, NumberRange))
    low, high = number_range.cuts
    assert all(low <= number < high for number in inside)
    assert not any(low <= number < high for number in outside)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"domains": [{"key": {"size": {"min": 1, "below": 1}}}]}, "holds no number"),
        ({"domains": [{"key": {"size": {"min": "a"}}}]}, "'a', expected a finite number"),
        ({"domains": [{"key": {"size": {"max": 1, "below": 1}}}]}, "max and below"),
        ({"domains": [{"key": {"size": {"min": 1, "over": 1}}}]}, "'over'; it takes min"),
        ({"group_by": [{"size": {"buckets": [1]}}]}, r"group_by\[0\]\.size\.buckets is \[1\], expected at least two"),
        ({"group_by": [{"size": {"buckets": [1, 1]}}]}, "expected ascending"),
        ({"group_by": [{"size": {"bins": [1, 2]}}]}, r"or a number with buckets: \{quality"),
        ({"group_by": [7]}, "is 7, expected the name of a property"),
        ({"group_by": ["a", "a"]}, "names 'a' twice"),
        ({"group_by": ["source"], "remainder": {}}, r"mixture\.domains is not"),
        ({"group_by": [{"size": {"buckets": [0, 1]}}], "remainder": {"floor": 0.1}}, "has settings"),
    ],
)
def test_wrong_ranges_are_refused(collection: list[str], mixture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_data(configured(collection, mixture))


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"domains": [{"key": {"source": {"min": 1}}}]}, "a range of 'source', which is a category"),
        ({"domains": [{"key": {"siz": {"min": 1}}}]}, r"'siz', which is not a number property .*Did you mean 'size'"),
        ({"domains": [{"key": {"size": 3}}]}, r"but a number\.\n  Write a range: size: \{min"),
        ({"group_by": [{"source": {"buckets": [0, 1]}}]}, "buckets of 'source', which is not a number"),
        (
            {"group_by": [{"size": {"buckets": list(range(2000))}}]},
            "into 2,002 combinations of buckets, at most 1,024 are allowed",
        ),
    ],
)
def test_ranges_that_do_not_fit_the_index_are_refused(
    collection: list[str], mixture: dict[str, Any], message: str
) -> None:
    config = configured(collection, mixture)
    with open_configured(config) as index, pytest.raises(MixtureError, match=message):
        select_domains(config, index)


BUCKETS = {"group_by": [{"size": {"buckets": [0, 200, 600, 1000]}}], "remainder": {}}


def test_buckets_become_domains_and_the_rest_goes_to_the_remainder(collection: list[str]) -> None:
    config = configured(collection, BUCKETS)
    with open_configured(config) as index:
        selected = select_domains(config, index)
    known = [size for size in sizes(collection) if size is not None]
    expected = [sum(low <= s < high for s in known) for low, high in ((0, 200), (200, 600))]
    expected.append(sum(600 <= s <= 1000 for s in known))
    rest = len(sizes(collection)) - sum(expected)
    assert selected.names == ("size=[0,200)", "size=[200,600)", "size=[600,1000]", "remainder")
    assert selected.selection.table.totals()[0].tolist() == [*expected, rest]
    assert min(expected) > 0 and rest > 0


DOMAINS: list[dict[str, Any]] = [
    {"key": {"size": {"min": 600}, "source": ["argparse", "ast"]}, "weight": 0.5},
    {"key": {"size": {"below": 600}}, "weight": 0.3},
]


@pytest.mark.parametrize(
    "mixture",
    [
        {"kind": "static", "domains": DOMAINS, "remainder": {"weight": 0.2}},
        {"group_by": ["source", {"size": {"buckets": [0, 200, 600, 1000]}}]},
        {**BUCKETS, "kind": "dynamic", "unit": "samples", "algorithm": {"name": "odm"}},
    ],
    ids=["ranges", "buckets", "learned"],
)
@pytest.mark.parametrize("query", [{}, {"where": "size >= 100 or size is None", "holdout": {"fraction": 0.2}}])
def test_a_run_resumes_on_other_ranks_and_is_proven(
    collection: list[str], mixture: dict[str, Any], query: dict[str, Any], prove_run: Callable[[Config], int]
) -> None:
    config = configured(collection, mixture)
    plain = {**compose_plain([word for word in collection if not word.startswith("mixture")] + RUN), "query": query}
    assert prove_run(from_plain(Config, {**plain, "mixture": {**plain["mixture"], **mixture}})) == 54
    assert config.mixture.group_by == mixture.get("group_by", [])


def test_plan_prints_what_counting_costs(collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in collection if not word.startswith("mixture")]
    assert main(["plan", *words, *RUN, "mixture.group_by=[{size: {buckets: [0, 200, 600, 1000]}}]"]) == 0
    out = capsys.readouterr().out
    assert "size=[200,600)" in out
    assert "Counting domains by size read 480 of 480 samples" in " ".join(out.split())
    assert main(["plan", *words, *RUN, "mixture.group_by=[source]"]) == 0
    assert "Counting domains" not in capsys.readouterr().out


def test_query_names_ranges_as_they_are_written(collection: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in collection if not word.startswith("mixture")]
    domains = "mixture.domains=[{key: {size: {min: 600}}}, {key: {size: {max: 599}}}]"
    assert main(["query", *words, domains, "--json", "--explain", "query.where=bytes is None or bytes > 0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["explain"]["numbers"] == ["bytes", "size"]
    assert [d["key"] for d in answer["domains"]] == [{"size": {"min": 600.0}}, {"size": {"max": 599.0}}]
    assert answer["left_out"]["samples"] == sum(size is None for size in sizes(collection))


class TestSizes:
    def test_queries_and_buckets_use_the_tokens_and_bytes_of_samples(
        self, collection: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [word for word in collection if not word.startswith("mixture")]
        with open_configured(compose(collection)) as index:
            blocks = [index.read_block(b) for b in range(len(index.tables.blocks))]
        tokens = [n for block in blocks for n in block.tokens.tolist()]
        lengths = [n for block in blocks for n in block.length.tolist()]
        expected = {
            "tokens >= 50": sum(n >= 50 for n in tokens),
            "bytes < 300 and tokens < 50": sum(0 < n < 300 and t < 50 for n, t in zip(lengths, tokens, strict=True)),
            "bytes is not None": sum(n > 0 for n in lengths),
        }
        for where, count in expected.items():
            assert main(["query", *words, f"query.where={where}", "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["selected"]["samples"] == count > 0
        assert expected["bytes is not None"] == 480, "also in formats whose rows have no place of their own"
        assert main(["query", *words, "mixture.group_by=[{tokens: {buckets: [0, 50, 1000000]}}]", "--json"]) == 0
        domains = json.loads(capsys.readouterr().out)["domains"]
        assert [d["samples"] for d in domains] == [480 - expected["tokens >= 50"], expected["tokens >= 50"]]

    def test_a_run_over_sizes_is_proven(self, collection: list[str], prove_run: Callable[[Config], int]) -> None:
        words = [word for word in collection if not word.startswith("mixture")]
        buckets = "mixture.group_by=[{tokens: {buckets: [1, 50, 1000000]}}]"
        assert prove_run(compose([*words, *RUN, buckets, "query.where=bytes is None or bytes > 100"])) == 54

    def test_joined_indexes_have_sizes(self, own_collection: list[str]) -> None:
        config = compose(own_collection)
        copy = config.index.path.replace("index.h5", "copy.h5")
        Path(copy).write_bytes(Path(config.index.path).read_bytes())
        joined = compose([*own_collection, f"index.paths=[{config.index.path},{copy}]", "query.where=tokens >= 50"])
        alone = compose([*own_collection, "query.where=tokens >= 50"])
        with open_configured(joined) as both, open_configured(alone) as one:
            selected = [select_domains(c, i).selection.selected for c, i in ((joined, both), (alone, one))]
        assert selected[0] == (2 * selected[1][0], 2 * selected[1][1])

    def test_derived_buckets_of_sizes_equal_those_of_a_build(self, own_collection: list[str]) -> None:
        size = "data.properties.length={number: tokens, buckets: [0, 50, 1000000]}"
        config = compose([*own_collection, size, "data.properties.b={number: bytes, buckets: [0, 300]}"])
        report = derive_properties(config)
        assert report.bytes_read == 0 and report.derived == ("b", "length")
        assert build_index(config).fingerprint == report.fingerprint

    @pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl.gz"])
    def test_rows_without_a_place_have_the_bytes_of_their_document(
        self, suffix: str, tmp_path: Path, tiny_tokenizer: str
    ) -> None:
        rows = [{"text": "é" * i, "n": i} for i in range(1, 9)]
        writers = {"parquet": write_parquet, "arrow": write_arrow, "jsonl.gz": partial(write_compressed, ending="gz")}
        (path,) = writers[suffix](tmp_path, rows)
        words = [f"data.root={tmp_path}", f"data.include=[{path.name}]", "data.properties.n={path: n, kind: number}"]
        build_index(compose([*words, f"dataplane.tokenizer={tiny_tokenizer}"]))
        counted = compose([*words, "query.where=bytes is None or bytes < 8", "mixture.unit=samples"])
        with open_configured(counted) as index:
            assert index.read_block(0).length.tolist() == [2 * i for i in range(1, 9)]
            assert select_domains(counted, index).selection.selected[0] == 3
        build_index(compose([*words, "mixture.unit=samples"]))
        with open_configured(counted) as index:
            assert select_domains(counted, index).selection.selected[0] == 8, "null without counted tokens"

    def test_their_names_are_taken(self) -> None:
        with pytest.raises(ConfigError, match="tokens is a built-in number of every sample"):
            compose(["data.root=/d", "data.properties.tokens=n", "mixture.unit=samples"])

    def test_tokens_that_were_not_counted_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
        config = compose([f"data.root={tmp_path}", "mixture.unit=samples", "query.where=tokens > 1"])
        build_index(config)
        with open_configured(config) as index, pytest.raises(ConfigError, match="'tokens', which is not a property"):
            select_domains(config, index)
