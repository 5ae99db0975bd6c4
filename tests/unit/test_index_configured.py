"""The indexes that a configuration reads, their generations, and the places of their shards."""

import json
import os
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.read.configured import check_stored_roots, open_configured
from mixtera_hpc.trace.list import planned_sequences

pytestmark = pytest.mark.slow
"""Builds and opens many indexes."""

SAMPLES = ["mixture.unit=samples", "mixture.group_by=[dataset]", "dataplane.global_batch_size=4"]


def write_shard(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{path} {i}"}) + "\n" for i in range(rows)))


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Return two indexes, `prose.h5` over 10 samples and `code.h5` over 7."""
    paths = []
    for name, rows in (("prose", 10), ("code", 7)):
        write_shard(tmp_path / name / "a.jsonl", rows)
        path = f"{tmp_path}/{name}.h5"
        build_index(compose([f"data.root={tmp_path / name}", f"index.path={path}", "mixture.unit=samples"]))
        paths.append(path)
    return paths


def reads(paths: list[str], *more: str) -> list[str]:
    return [f"index.paths=[{','.join(paths)}]", *SAMPLES, *more]


@pytest.fixture
def as_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


class TestPaths:
    def test_index_paths_are_read_in_their_order(self, paths: list[str]) -> None:
        for order in (paths, paths[::-1]):
            with open_configured(compose(reads(order))) as index:
                assert [source.path for source in index.sample_sources()] == order

    def test_index_path_is_not_read_when_index_paths_are_given(self, paths: list[str], tmp_path: Path) -> None:
        config = compose(reads(paths[1:], f"index.path={tmp_path}/not-built-yet.h5"))
        with open_configured(config) as index:
            assert index.tables.num_samples == 7

    def test_a_data_root_that_no_index_uses_is_refused(self, paths: list[str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"data\.root gives the shards of index\.path=.*other\.h5, but runs read"):
            open_configured(compose(reads(paths, f"data.root={tmp_path}", f"index.path={tmp_path}/other.h5")))

    def test_without_any_path_the_missing_key_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"index\.path is missing: without data\.root it has no default"):
            compose(["mixture.unit=samples"])


class TestGenerations:
    def test_a_refresh_of_one_of_several_indexes_does_not_change_a_run(self, paths: list[str], tmp_path: Path) -> None:
        before = open_source(compose(reads(paths)), Local())
        expected = list(planned_sequences(before, 0, 4))
        write_shard(tmp_path / "code" / "b.jsonl", 5)
        refresh_index(compose([f"data.root={tmp_path}/code", f"index.path={paths[1]}", "mixture.unit=samples"]))

        newest = open_source(compose(reads(paths)), Local())
        assert newest.identity()["index"][0] == before.identity()["index"][0]
        assert newest.identity()["index"][1] != before.identity()["index"][1]

        generations = f"index.generations=[{','.join(before.identity()['index'])}]"
        again = open_source(compose(reads(paths, generations)), Local())
        assert again.identity() == before.identity()
        assert list(planned_sequences(again, 0, 4)) == expected

    def test_an_empty_generation_is_the_newest_state(self, paths: list[str]) -> None:
        with open_configured(compose(reads(paths))) as index:
            newest = index.fingerprints
        with open_configured(compose(reads(paths, f"index.generations=['',{newest[1][:12]}]"))) as index:
            assert index.fingerprints == newest

    def test_every_index_needs_its_generation(self, paths: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"index\.generations has 1 entries, but 2 indexes are read"):
            compose(reads(paths, "index.generations=[abc]"))


class TestStoredDataRoot:
    def test_plan_works_without_a_data_root(
        self, paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", f"index.path={paths[0]}", "mixture.unit=samples", "dataplane.global_batch_size=4"]) == 0
        assert "served" in capsys.readouterr().out

    def test_the_stored_root_is_logged_once(
        self, paths: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO", logger="mixtera_hpc"):
            for _ in range(3):
                open_configured(compose([f"index.path={paths[0]}", *SAMPLES])).close()
        assert caplog.messages == [f"data.root is {tmp_path}/prose, as stored in {paths[0]}"]

    @pytest.mark.usefixtures("as_another_user")
    def test_an_index_of_another_user_needs_a_data_root_or_trust(self, paths: list[str], tmp_path: Path) -> None:
        words = [f"index.path={paths[0]}", *SAMPLES]
        with pytest.raises(PropertyIndexError, match=rf"Set data\.root={tmp_path}/prose, or add the folder to"):
            open_configured(compose(words))
        with pytest.raises(PropertyIndexError, match=r"below one of index\.trusted_roots"):
            open_configured(compose([*words, f"index.trusted_roots=[{tmp_path}/pro]"]))
        for cure in (f"data.root={tmp_path}/prose", f"index.trusted_roots=[{tmp_path}]"):
            open_configured(compose([*words, cure])).close()

    @pytest.mark.usefixtures("as_another_user")
    def test_trust_depends_on_the_stored_root_and_not_on_the_place_of_the_index(
        self, paths: list[str], tmp_path: Path
    ) -> None:
        shared = tmp_path / "shared"
        shared.mkdir()
        published = Path(paths[0]).rename(shared / "prose.h5")
        words = [f"index.path={published}", *SAMPLES]
        with pytest.raises(PropertyIndexError, match="belongs to another user"):
            open_configured(compose([*words, f"index.trusted_roots=[{shared}]"]))
        open_configured(compose([*words, f"index.trusted_roots=[{tmp_path}/prose]"])).close()

    @pytest.mark.usefixtures("as_another_user")
    def test_a_stored_root_that_is_a_link_out_of_a_trusted_folder_is_refused(
        self, paths: list[str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        private = (tmp_path / "prose").rename(tmp_path_factory.mktemp("private") / "prose")
        (tmp_path / "prose").symlink_to(private)
        with pytest.raises(PropertyIndexError, match="belongs to another user"):
            open_configured(compose([f"index.path={paths[0]}", *SAMPLES, f"index.trusted_roots=[{tmp_path}]"]))

    @pytest.mark.usefixtures("as_another_user")
    def test_each_of_several_indexes_is_checked(self, paths: list[str], tmp_path: Path) -> None:
        with pytest.raises(PropertyIndexError, match=r"prose\.h5, which belongs to another user"):
            open_configured(compose(reads(paths, f"index.trusted_roots=[{tmp_path}/code]")))
        open_configured(compose(reads(paths, f"index.trusted_roots=[{tmp_path}]"))).close()

    @pytest.mark.usefixtures("as_another_user")
    def test_an_index_of_which_only_tables_are_read_needs_no_trust(
        self, paths: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["query", f"index.path={paths[0]}", "mixture.unit=samples"]) == 0
        assert main(["index", "inspect", f"index.path={paths[0]}"]) == 0
        assert main(["index", "verify", f"index.path={paths[0]}"]) == 2
        assert "index.trusted_roots" in capsys.readouterr().err

    @pytest.mark.usefixtures("as_another_user")
    def test_submit_checks_before_the_job_starts(self, paths: list[str], tmp_path: Path) -> None:
        with pytest.raises(PropertyIndexError, match=r"index\.trusted_roots"):
            check_stored_roots(compose([f"index.path={paths[0]}", *SAMPLES]))
        check_stored_roots(compose([f"index.path={paths[0]}", f"data.root={tmp_path}/prose", *SAMPLES]))
        check_stored_roots(compose([f"index.path={tmp_path}/not-built-yet.h5", *SAMPLES]))

    def test_derive_reads_documents_below_the_stored_root(self, paths: list[str]) -> None:
        function = "mixtera_hpc.index.document_functions.length_bucket"
        derived = f"data.properties.size={{function:{function},kind:category}}"
        report = derive_properties(compose([f"index.path={paths[0]}", derived, *SAMPLES]))
        assert report.samples == 10

    def test_build_and_refresh_need_a_data_root(self, paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        for action in ("build", "refresh"):
            assert main(["index", action, f"index.path={paths[0]}"]) == 2
            assert "data.root is missing; it is the folder that the index is built from" in capsys.readouterr().err
