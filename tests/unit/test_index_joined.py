"""Several data sets in one index, and several indexes in one run."""

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import check_build
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.domains import select
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.layout import write_texts
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.open import PropertyIndex, open_index
from mixtera_hpc.index.read.verify import changed_shards, check_fresh
from mixtera_hpc.trace.list import planned_sequences


def write(path: Path, rows: int, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_of_shard = [{"text": f"{path.parent.name} {i}", "n": i, **more} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_shard))


def configured(root: Path, **more: Any) -> Config:
    data = {"properties": {"c": "c"}, "on_bad_sample": "skip"} | more.pop("data")
    return from_plain(Config, {"data": data, "index": {"path": str(root / "i.h5"), "block_rows": 4} | more})


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, str]:
    write(tmp_path / "one" / "a.jsonl", 10, c="x")
    write(tmp_path / "two" / "a.jsonl", 7, c="y")
    return {"web": str(tmp_path / "one"), "code": str(tmp_path / "two")}


def counts(index: PropertyIndex, *keys: dict[str, tuple[str | None, ...]], where: str | None = None) -> list[int]:
    chosen = select(index.tables, parse_predicate(where, index.tables.properties), list(keys), index.read_blocks)
    rows: list[int] = chosen.table.totals()[0].tolist()
    return rows


class TestDataSets:
    def test_the_name_of_the_data_set_is_a_property(self, roots: dict[str, str], tmp_path: Path) -> None:
        build_index(configured(tmp_path, data={"sets": roots}))
        with open_index(tmp_path / "i.h5") as index:
            assert index.tables.properties["dataset"].values == ("code", "web")
            assert counts(index, {"dataset": ("web",)}, {"dataset": ("code",)}) == [10, 7]
            assert index.shard_paths() == [f"{roots['code']}/a.jsonl", f"{roots['web']}/a.jsonl"]
            check_fresh(index)

    def test_roots_can_be_moved_but_not_renamed(self, roots: dict[str, str], tmp_path: Path) -> None:
        build_index(configured(tmp_path, data={"sets": roots}))
        shutil.move(roots["web"], tmp_path / "elsewhere")
        with open_index(tmp_path / "i.h5", roots | {"web": str(tmp_path / "elsewhere")}) as index:
            assert changed_shards(index) == []
        with pytest.raises(PropertyIndexError, match=r"from the data sets code, web, but data\.sets names web"):
            open_index(tmp_path / "i.h5", {"web": roots["web"]})

    def test_a_refresh_distinguishes_equal_paths_of_different_data_sets(
        self, roots: dict[str, str], tmp_path: Path
    ) -> None:
        config = configured(tmp_path, data={"sets": roots})
        build_index(config)
        write(Path(roots["web"]) / "a.jsonl", 11, c="x")
        report = refresh_index(config)
        assert report.changed == ("a.jsonl",) and report.unchanged == 1
        with open_index(tmp_path / "i.h5") as index:
            assert counts(index, {"dataset": ("web",)}, {"dataset": ("code",)}) == [11, 7]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"sets": {"a": ""}}, "expected a name and a folder"),
            ({}, r"data\.root is missing"),
            (
                {"sets": {"a": "/x"}, "properties": {"dataset": "d"}},
                r"data\.properties\.dataset is the name of the data set",
            ),
            ({"root": "/x", "properties": {"c": {"kind": "number"}}}, "either a path in the row or a function"),
        ],
    )
    def test_wrong_settings_are_refused(self, data: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            check_build(configured(tmp_path, data=data))

    def test_roots_are_set_on_the_command_line(self, roots: dict[str, str], tmp_path: Path) -> None:
        words = [f"data.sets={{web: {roots['web']}, code: {roots['code']}}}", f"index.path={tmp_path}/i.h5"]
        config = compose([*words, "mixture.unit=samples"])
        assert config.data.roots() == roots and config.data.root == ""


@pytest.fixture
def two(roots: dict[str, str], tmp_path: Path) -> Config:
    """Return a configuration of `prose` with the property c and `code` with c and a number n; each has a bad row."""
    for root in roots.values():
        with (Path(root) / "a.jsonl").open("a") as file:
            file.write("{bad\n")
    prose = configured(tmp_path, data={"root": roots["web"]}, path=str(tmp_path / "prose.h5"))
    build_index(prose)
    properties = {"c": "c", "n": {"path": "n", "kind": "number"}}
    code = {"root": roots["code"], "properties": properties}
    build_index(configured(tmp_path, data=code, path=str(tmp_path / "code.h5")))
    return configured(
        tmp_path,
        data={"root": roots["web"]},
        path=str(tmp_path / "prose.h5"),
        paths=[str(tmp_path / "prose.h5"), str(tmp_path / "code.h5")],
    )


class TestIndexes:
    def test_domains_are_counted_over_all_indexes(self, two: Config) -> None:
        with open_configured(two) as index:
            assert counts(index, {"dataset": ("prose",)}, {"dataset": ("code",)}) == [10, 7]
            assert counts(index, {"c": ("x",)}, {"c": ("y",)}) == [10, 7]
            assert counts(index, {}) == [index.tables.num_samples] == [17], "bad rows of both are left out"

    def test_a_property_that_one_index_lacks_is_null_there(self, two: Config) -> None:
        with open_configured(two) as index:
            assert counts(index, {}, where="n is None") == [10]
            assert counts(index, {}, where="n >= 5") == [2]

    def test_a_run_reads_the_samples_of_all_indexes(self, two: Config) -> None:
        plain = {"unit": "samples", "group_by": ["dataset"]}
        plane = {"global_batch_size": 17, "chunk_steps": 1, "shuffle": "block"}
        config = from_plain(
            Config,
            {
                "data": {"root": two.data.root, "properties": {"c": "c"}},
                "index": {"path": two.index.path, "paths": two.index.paths},
                "mixture": plain,
                "dataplane": plane,
            },
        )
        source = open_source(config, Local())
        assert source.names == ["dataset=code", "dataset=prose"]
        (segments,) = {tuple(map(tuple, r["segments"])) for r in planned_sequences(source, 0, 1) if r["position"] == 0}
        assert Path(segments[0][0]).is_absolute()
        served = sorted(
            (Path(r["segments"][0][0]).parent.name, r["segments"][0][1]) for r in planned_sequences(source, 0, 1)
        )
        assert served == sorted([("one", i) for i in range(10)] + [("two", i) for i in range(7)])

    def test_changed_shards_of_any_index_are_named(self, two: Config, tmp_path: Path) -> None:
        (tmp_path / "two" / "a.jsonl").unlink()
        with open_configured(two) as index:
            assert [c.path for c in changed_shards(index)] == [str(tmp_path / "two" / "a.jsonl")]

    def test_a_property_of_two_kinds_is_refused_even_if_the_first_index_lacks_it(
        self, two: Config, roots: dict[str, str], tmp_path: Path
    ) -> None:
        paths = [two.index.path]
        for name, kind in (("x", "category"), ("y", "number")):
            data = {"root": roots["code"], "properties": {"n": {"path": "n", "kind": kind}}}
            paths.append(build_index(configured(tmp_path, data=data, path=str(tmp_path / f"{name}.h5"))).path)
        joined = configured(tmp_path, data={"root": roots["web"]}, path=two.index.path, paths=paths)
        with pytest.raises(PropertyIndexError, match=r"the kind of n: category in .*x\.h5, number in .*y\.h5"):
            open_configured(joined)

    def test_incompatible_indexes_are_refused(self, two: Config, roots: dict[str, str], tmp_path: Path) -> None:
        data = {"root": roots["code"], "properties": {"c": {"path": "n", "kind": "number"}}}
        build_index(configured(tmp_path, data=data, path=str(tmp_path / "code.h5")))
        with pytest.raises(PropertyIndexError, match=r"the kind of c: category in .*prose\.h5, number in .*code\.h5"):
            open_configured(two)
        twice = configured(tmp_path, data={"root": roots["web"]}, path=two.index.path, paths=[two.index.path] * 2)
        with pytest.raises(PropertyIndexError, match="have the same name"):
            open_configured(twice)


@pytest.mark.parametrize("path", ["../secret.jsonl", "/etc/passwd", "a/../../b.jsonl", ""])
def test_an_index_that_points_outside_its_root_is_refused(path: str, roots: dict[str, str], tmp_path: Path) -> None:
    build_index(configured(tmp_path, data={"root": roots["web"]}))
    with h5py.File(tmp_path / "i.h5", "r+") as file:
        del file["shards/path_utf8"], file["shards/path_end"]
        write_texts(file["shards"], "path", [path])
    with pytest.raises(PropertyIndexError, match="is outside the data root"):
        open_index(tmp_path / "i.h5")
