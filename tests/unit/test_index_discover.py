"""Files that are discovered as shards."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.config.schema import DataConfig, DataSetConfig
from mixtera_hpc.errors import ConfigError, DataError, UserError
from mixtera_hpc.index.build.discover import discover_shards
from mixtera_hpc.index.shards import fingerprint_of_shard


def discovered(root: Path, **settings: Any) -> list[str]:
    return [shard.path for shard in discover_shards(DataConfig(root=str(root), **settings))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    names = [
        "b/2.jsonl",
        "b/10.jsonl",
        "a.jsonl",
        "b/c/x.parquet",
        "z.jsonl.zst",
        "notes.txt",
        "index.h5",
        "b/data.json",
    ]
    for name in [*names, ".hidden.jsonl", ".cache/y.jsonl", "b/.z/w.jsonl"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_exactly_the_data_files_are_discovered_in_a_fixed_order(tree: Path) -> None:
    assert discovered(tree) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/c/x.parquet", "z.jsonl.zst"]
    assert [s.format for s in discover_shards(DataConfig(root=str(tree)))] == [
        "jsonl",
        "jsonl",
        "jsonl",
        "parquet",
        "jsonl.zst",
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], ["a.jsonl", "z.jsonl.zst"]),
        (["b/*"], [], ["b/10.jsonl", "b/2.jsonl"]),
        (["**/*.jsonl"], [], ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]),
        (["**/*.jsonl", "a.jsonl", "b/**/*"], [], ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/c/x.parquet"]),
        (["**/*"], ["b/**"], ["a.jsonl", "z.jsonl.zst"]),
        (["**/*.jsonl"], ["**/1*"], ["a.jsonl", "b/2.jsonl"]),
        (["[ab].jsonl"], [], ["a.jsonl"]),
        (["**/*.json*"], ["**/*.json"], ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "z.jsonl.zst"]),
    ],
)
def test_include_and_exclude_select_files(
    include: list[str], exclude: list[str], expected: list[str], tree: Path
) -> None:
    assert discovered(tree, include=include, exclude=exclude) == expected


def test_a_json_file_is_a_shard_only_if_a_glob_names_it(tree: Path) -> None:
    assert "b/data.json" not in discovered(tree)
    (shard,) = discover_shards(DataConfig(root=str(tree), include=["b/*.json"]))
    assert (shard.path, shard.format) == ("b/data.json", "json")


def test_plain_text_is_a_shard_only_if_a_glob_or_the_format_names_it(tree: Path) -> None:
    assert "notes.txt" not in discovered(tree)
    assert discovered(tree, include=["*.txt"]) == ["notes.txt"]
    assert "notes.txt" in discovered(tree, include=["*"], format="text")


def test_a_sidecar_is_not_a_shard(tree: Path) -> None:
    (tree / "x.sidecar.jsonl").write_text("{}")
    assert "x.sidecar.jsonl" not in discovered(tree)


def test_a_configured_format_reads_any_file(tree: Path) -> None:
    (shard,) = discover_shards(DataConfig(root=str(tree), include=["b/*.json"], format="jsonl"))
    assert (shard.path, shard.format) == ("b/data.json", "jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["*.h5"]}, r"'\*\.h5', which matches 'index\.h5', a file of unknown format(.|\n)*\.parquet"),
        ({"include": ["none/*.jsonl"]}, r"'none/\*\.jsonl', which matches no file below"),
        ({"include": ["a.jsonl", "/etc/*.jsonl"]}, r"expected a glob below data\.root"),
        ({"include": ["../*.jsonl"]}, r"expected a glob below data\.root"),
        ({"exclude": ["/x"]}, r"data\.exclude has '/x', expected a glob below data\.root"),
        ({"include": ["b/c/*"], "exclude": ["b/c/*"]}, r"No data file below"),
        ({"format": "jsonlines"}, r"data\.format is 'jsonlines', which is not a format"),
    ],
)
def test_a_wrong_glob_or_format_is_refused(settings: dict[str, Any], message: str, tree: Path) -> None:
    with pytest.raises(UserError, match=message):
        discovered(tree, **settings)


def test_a_root_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in ("none", "file"):
        with pytest.raises(DataError, match=rf"data\.root is '.*{root}', which is not a folder"):
            discovered(tmp_path / root)


def test_links_to_folders_are_followed_and_duplicates_refused(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "o.jsonl").write_text("{}")
    (tree / "link").symlink_to(other)
    assert "link/o.jsonl" in discovered(tree)
    (tree / "twin").symlink_to(other)
    with pytest.raises(DataError, match=r"'link/o\.jsonl' and 'twin/o\.jsonl' are the same file"):
        discovered(tree)
    assert discovered(tree, exclude=["twin/**"]) == discovered(tree, exclude=["twin/*"])


def test_a_loop_of_links_is_refused(tree: Path) -> None:
    (tree / "b" / "loop").symlink_to(tree)
    with pytest.raises(DataError, match="are the same file"):
        discovered(tree)


def test_a_name_that_is_not_utf8_is_refused(tree: Path) -> None:
    Path(os.fsdecode(bytes(tree) + b"/\xff.jsonl")).write_text("{}")
    with pytest.raises(DataError, match="is not UTF-8"):
        discovered(tree)
    with pytest.raises(ConfigError):
        discovered(tree, include=["**/*.h5"])


@pytest.mark.parametrize("year", [2400, 1500])
def test_a_modification_time_that_the_index_cannot_hold_is_refused(
    year: int, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def of_another_year(path: Any, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        is_shard = str(path).endswith("a.jsonl")
        other = {"st_mtime_ns": (year - 1970) * 365 * 86_400 * 10**9}
        return os.stat_result(found, {**_named(found), **other}) if is_shard else found

    monkeypatch.setattr(os, "stat", of_another_year)
    with pytest.raises(DataError, match=r"modification time of 'a\.jsonl' is outside .*\n  Set it: touch FILE"):
        discovered(tree)


@pytest.mark.parametrize("exclude", [[], ["a.jsonl"]])
def test_a_path_that_no_call_takes_is_named(exclude: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def too_long(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("a.jsonl"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", too_long)
    if exclude:
        assert "a.jsonl" not in discovered(tree, exclude=exclude)
    else:
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read: File name too long\.\n .*data\.exclude"):
            discovered(tree)


def _named(status: os.stat_result) -> dict[str, Any]:
    return {name: getattr(status, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}


def test_the_fingerprint_of_a_shard_changes_with_its_ends_and_size(tmp_path: Path) -> None:
    def fingerprint(content: bytes) -> str:
        (tmp_path / "s").write_bytes(content)
        return fingerprint_of_shard(tmp_path / "s", len(content))

    middle = b"x" * (3 << 20)
    contents = [
        b"",
        b"a" + middle + b"b",
        b"b" + middle + b"b",
        b"a" + middle + b"a",
        b"a" + middle + b"xb",
        b"a",
        b"b",
    ]
    assert len({fingerprint(c) for c in contents}) == len(contents)
    assert fingerprint(b"a") == fingerprint(b"a")


def test_names_may_contain_newlines_quotes_and_spaces(tmp_path: Path) -> None:
    names = ["a\nb.jsonl", "c d.jsonl", "e'f.jsonl", "g\\h.jsonl", "漢.jsonl"]
    for name in names:
        (tmp_path / name).write_text('{"text": "x"}')
    assert sorted(shard.path for shard in discover_shards(DataConfig(root=str(tmp_path)))) == sorted(names)


def test_pipes_and_folders_never_match(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert [shard.path for shard in discover_shards(DataConfig(root=str(tmp_path)))] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("link", "target", "include"),
    [
        ("dead.jsonl", "gone", "**/*"),
        ("dead.jsonl", "gone", "*.jsonl"),
        ("dead.jsonl", "gone", "dead.jsonl"),
        ("self.jsonl", "self.jsonl", "*"),
        ("domain", "/gone/domain", "**/*.jsonl"),
        ("domain", "/gone/domain", "*/*.jsonl"),
    ],
)
def test_a_link_that_leads_nowhere_is_refused(link: str, target: str, include: str, tree: Path) -> None:
    (tree / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"{link} is a link to '{target}', which does not exist(.|\n)*data\.exclude"):
        discovered(tree, include=[include])
    assert discovered(tree, include=["*", include], exclude=[link])
    (tree / link).rename(tree / f".{link}")
    assert discovered(tree), "hidden files never match"


def test_a_link_that_no_glob_matches_is_ignored(tree: Path) -> None:
    (tree / "dead.parquet").symlink_to("gone")
    assert discovered(tree, include=["*.jsonl", "b/**/*.jsonl"]) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("**/*.{jsonl,jsonl.zst}", ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "z.jsonl.zst"]),
        ("**/*.{jsonl.gz,jsonl.zst}", ["z.jsonl.zst"]),
        ("{b,none}/*.{jsonl,c{x,y}}", ["b/10.jsonl", "b/2.jsonl"]),
    ],
)
def test_braces_stand_for_alternatives(include: str, expected: list[str], tree: Path) -> None:
    assert discovered(tree, include=[include]) == expected


def test_braces_without_a_comma_are_part_of_a_name(tree: Path) -> None:
    (tree / "{x}.jsonl").write_text("{}")
    assert discovered(tree, include=["{x}.jsonl"]) == ["{x}.jsonl"]


def collection(tmp_path: Path, include: list[str]) -> DataConfig:
    """Return two data sets: a compressed one and a plain one."""
    for name in ("packed/a.jsonl.zst", "plain/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = ("packed", "plain")
    return DataConfig(sets={name: DataSetConfig(root=str(tmp_path / name), include=include) for name in names})


def test_a_glob_must_match_below_one_of_the_roots(tmp_path: Path) -> None:
    globs = ["*.jsonl", "*.jsonl.zst"]
    assert [(shard.dataset, shard.path) for shard in discover_shards(collection(tmp_path, globs))] == [
        ("packed", "a.jsonl.zst"),
        ("plain", "a.jsonl"),
    ]
    with pytest.raises(DataError, match=r"'\*\.pq', which matches no file below .*packed, .*plain"):
        discover_shards(collection(tmp_path, [*globs, "*.pq"]))


def test_a_data_set_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sets\.packed: no data file below .*packed"):
        discover_shards(collection(tmp_path, ["*.jsonl"]))


@pytest.mark.parametrize("name", ["auto", "megatron"])
@pytest.mark.parametrize("include", ["**/*", "d0*", "*.{bin,idx}"])
def test_the_companions_of_a_shard_are_not_shards(name: str, include: str, tmp_path: Path) -> None:
    for file in ("d0.bin", "d0.idx", "d0.sidecar.jsonl"):
        (tmp_path / file).write_text("{}")
    shards = discover_shards(DataConfig(root=str(tmp_path), include=[include], format=name))
    assert [(shard.path, shard.format) for shard in shards] == [("d0.bin", "megatron")]


def test_an_idx_file_without_its_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d0.idx").write_text("")
    with pytest.raises(DataError, match=r"d0\.idx describes d0\.bin, which is not beside it"):
        discovered(tmp_path, format="megatron")


def test_a_file_that_two_globs_match_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    data = DataConfig(root=str(tmp_path), include=["*.jsonl", "a*", "**/*"])
    assert len(discover_shards(data)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named_before_anything_is_scanned(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied"):
        discover_shards(DataConfig(root=str(tmp_path)))


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that makes listing a folder fail, for root as well."""
    real_scandir = os.scandir

    def make(locked: Path) -> None:
        def scandir(path: Any) -> Any:
            if Path(path) == locked:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real_scandir(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return make


@pytest.mark.parametrize("include", ["*", "**/*", "**"])
def test_a_root_that_cannot_be_listed_is_named(include: str, tree: Path, lock: Callable[[Path], None]) -> None:
    lock(tree)
    with pytest.raises(DataError, match=rf"{tree} cannot be read: Permission denied"):
        discovered(tree, include=[include])


@pytest.mark.parametrize("include", [["**/*"], ["**"], ["a.jsonl", "b/c/*.parquet"], ["*/*/*"]])
def test_a_folder_that_cannot_be_listed_is_named(include: list[str], tree: Path, lock: Callable[[Path], None]) -> None:
    lock(tree / "b/c")
    with pytest.raises(DataError, match=r"b/c cannot be read: Permission denied\.\n.*data\.exclude"):
        discovered(tree, include=include)
    assert discovered(tree, include=["b/c/x.parquet"]) == ["b/c/x.parquet"]
    assert discovered(tree, include=["*.jsonl", "b/*.jsonl"]) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert discovered(tree, exclude=["b/c/**"]) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "z.jsonl.zst"]
