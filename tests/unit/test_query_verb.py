"""`mixtera-hpc query` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.tokens.bpe_training import train_bpe

pytestmark = pytest.mark.slow
"""Runs whole verbs."""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an index of 30 samples: sources C4 (20), Book (8) and null (2), a year, tags, and quality 0.0 to 0.29."""
    root = tmp_path_factory.mktemp("data")
    sources = ["C4"] * 20 + ["Book"] * 8 + [None] * 2
    rows = [
        {
            "text": "word " * (i % 3 + 1),
            "source": sources[i],
            "year": 2020 + i % 2,
            "tags": ["spam"] if i % 5 == 0 else [],
            "quality": i / 100,
        }
        for i in range(30)
    ]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_bpe(["word word"] * 5, 262, root / "tokenizer.json")
    properties = "{source:source,year:year,tags:{path:tags,kind:categories},quality:{path:quality,kind:number}}"
    argv = [
        f"data.root={root}",
        "index.block_rows=8",
        f"+data.properties={properties}",
        f"dataplane.tokenizer={tokenizer}",
    ]
    assert main(["index", "build", *argv]) == 0
    return root / "index.h5"


def ask(capsys: pytest.CaptureFixture[str], index: Path, *overrides: str) -> dict[str, Any]:
    code, out, err = run(capsys, "query", "--json", f"index.path={index}", *overrides)
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_without_domains_everything_is_one_domain(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, index)
    (domain,) = answer["domains"]
    assert domain["key"] == {} and domain["domain_id"] == 0 and domain["weight"] == 1.0
    assert domain["samples"] == answer["selected"]["samples"] == 30
    assert domain["tokens"] == answer["selected"]["tokens"] > 0
    assert answer["left_out"] == {"samples": 0, "tokens": 0} and answer["overlaps"] == []


def test_where_selects_samples(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(capsys, index, "query.where=\"'spam' not in tags and quality >= 0.1\"")
    assert answer["selected"]["samples"] == 16


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_natural_weights_are_proportional_to_the_unit(
    unit: str, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, index, "mixture.group_by=[source]", f"mixture.unit={unit}")
    assert [d["key"] for d in answer["domains"]] == [{"source": "Book"}, {"source": "C4"}, {"source": None}]
    assert [d["samples"] for d in answer["domains"]] == [8, 20, 2]
    total = sum(d[unit] for d in answer["domains"])
    assert [d["weight"] for d in answer["domains"]] == pytest.approx([d[unit] / total for d in answer["domains"]])


def test_static_weights_are_the_configured_ones(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = "mixture.domains=[{key:{source:[C4,Book]},weight:3},{key:{tags:spam},weight:1}]"
    answer = ask(capsys, index, "mixture=static", "mixture.normalize=true", domains)
    assert [d["weight"] for d in answer["domains"]] == [0.75, 0.25]
    assert answer["domains"][0]["key"] == {"source": ["C4", "Book"]}
    assert [d["samples"] for d in answer["domains"]] == [28, 0]
    assert answer["overlaps"] == [{"domain_id": 0, "also_matches": 1, "samples": 6}]
    assert answer["left_out"]["samples"] == 2


def test_dynamic_weights_start_as_configured_or_natural(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "mixture.domains=[{key:{source:C4},weight:0.1},{key:{source:Book},weight:0.9}]"
    assert [d["weight"] for d in ask(capsys, index, "mixture=ado", given)["domains"]] == [0.1, 0.9]
    natural = ask(capsys, index, "mixture=ado", "mixture.group_by=[source]", "mixture.unit=samples")
    assert [d["weight"] for d in natural["domains"]] == pytest.approx([8 / 30, 20 / 30, 2 / 30])


@pytest.mark.parametrize(
    ("value", "samples"), [("2020", 15), ("'2020'", 15), ("[2020,2021]", 30), ("null", 0), ("[null,2021]", 15)]
)
def test_key_values_of_every_yaml_type_match_as_text(
    value: str, samples: int, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ask(capsys, index, f"mixture.domains=[{{key:{{year:{value}}}}}]")
    assert answer["domains"][0]["samples"] == samples


def test_text_output_names_domains_overlaps_and_unassigned_samples(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = "mixture.domains=[{key:{source:[C4,null]}},{key:{tags:spam}}]"
    code, out, _ = run(capsys, "query", f"index.path={index}", domains)
    assert code == 0
    assert "source=C4|null" in out and "tags=spam" in out
    assert "selected: 30 samples" in out and "in no domain: 6 samples" in out
    assert "4 samples of source=C4|null also match tags=spam" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("query.where=qality>1", "ConfigError: query.where names 'qality'"),
        ("mixture.group_by=[sorce]", "MixtureError: A domain key names 'sorce'"),
        ("mixture.domains=[{key:{source:c4}}]", "MixtureError: A domain key names source = 'c4'"),
        ("index.path=/none.h5", "PropertyIndexError: There is no property index at /none.h5"),
        ("mixture.kind=static", "ConfigError: mixture.kind=static needs mixture.domains"),
        ("data.rot=x", "ConfigError: data.rot is not a known key"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(
    override: str, message: str, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "query", f"index.path={index}", override)
    assert code == 2 and message in err and out == ""


def test_an_index_without_token_counts_shows_none(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "i.h5"
    assert run(capsys, "index", "build", f"data.root={index.parent}", f"index.path={path}")[0] == 0
    (domain,) = ask(capsys, path)["domains"]
    assert domain["samples"] == 30 and domain["tokens"] is None and domain["weight"] is None
    assert ask(capsys, path, "mixture.unit=samples")["domains"][0]["weight"] == 1.0
    assert run(capsys, "query", f"index.path={path}")[0] == 0


def test_explain_puts_every_block_in_one_count(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of 8: C4 in the first three, quality ascending."""
    explain = ask(capsys, index, "--explain", "query.where=\"source == 'C4' and quality >= 0.1\"")["explain"]
    assert explain["numbers"] == ["quality"] and explain["blocks"] == 4 and explain["samples"] == 30
    assert [explain[k] for k in ("pruned_by_histogram", "pruned_by_zones", "whole", "scanned")] == [1, 1, 1, 1]
    assert explain["samples_scanned"] == 8 and 8 * 8 < explain["bytes_read"] < 8 * 16
    assert all(explain[f"{stage}_s"] >= 0 for stage in ("open", "parse", "count", "read"))


def test_a_query_over_categories_reads_no_samples(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain = ask(capsys, index, "--explain", "query.where=\"matches(source, 'B.*')\"")["explain"]
    assert explain["pruned_by_histogram"] == 2 and explain["whole"] == 2
    assert explain["scanned"] == explain["samples_scanned"] == explain["bytes_read"] == 0


def test_explain_is_printed_only_on_request(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "explain" not in ask(capsys, index)


def test_explain_prints_how_blocks_were_pruned(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "query", "--explain", f"index.path={index}", 'query.where="quality < 0.05"')
    assert code == 0 and "pruned by zones" in out and "read quality of 8 of 30 samples" in out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.text=content", "data.text is 'content', the index has 'text'"),
        ("data.properties.year={path:year,kind:number}", "data.properties.year is 'number path:year', the index has"),
        ("data.properties.source=meta.source", "'category path:meta.source', the index has 'category path:source'"),
    ],
)
def test_settings_that_differ_from_the_build_are_refused(
    override: str, named: str, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "query", f"index.path={index}", override)
    assert code == 2
    assert named in err


def test_settings_of_the_build_may_be_repeated(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(capsys, index, "data.text=text", "data.properties.source=source")["selected"]["samples"] == 30


def test_long_names_and_names_with_brackets_are_printed_in_full(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern = "B[bold]ok|" + "x" * 80
    domains = f"mixture.domains=[{{key:{{source:{{matches:'{pattern}'}}}}}},{{key:{{source:C4}}}}]"
    code, out, err = run(capsys, "query", f"index.path={index}", domains)
    assert code == 0, err
    assert pattern in out


def test_the_validation_split_without_a_holdout_is_refused(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "query", f"index.path={index}", "--split", "validation")
    assert code == 2 and "nothing is held out.\n  Set query.holdout.fraction" in err
