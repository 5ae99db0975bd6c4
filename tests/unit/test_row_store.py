"""`data.materialize` with `mixture.unit=samples`: rows of compressed files are written once more, domain by domain."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.residency.decode_cost import decode_cost
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.row_store.row_files import RowStoreFiles, RowStoreHeader
from mixtera_hpc.index.row_store.row_job import write_rows
from mixtera_hpc.testing.writers import write_compressed
from mixtera_hpc.tokens.bpe_training import train_bpe
from tests.unit.file_times import make_old

ENDINGS = ("zst", "gz", "bz2", "xz")


def make_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Return rows of three sources, with nested values and numbers of all kinds."""
    random = np.random.Generator(np.random.Philox(seed))
    return [
        {
            "text": f"row {i} of {seed}: naïve\n\t{random.bytes(int(random.integers(0, 1500))).hex()}",
            "meta": {"source": "abc"[int(random.integers(0, 3))], "list": [i, None, 1e300, True]},
            "large": 10**30 + i,
        }
        for i in range(count)
    ]


def add_shard(root: Path, number: int) -> None:
    folder = root / "data" / str(number)
    folder.mkdir(parents=True)
    write_compressed(folder, make_rows(number, 150), ending=ENDINGS[number % len(ENDINGS)])
    lines = [json.dumps(row) for row in make_rows(100 + number, 40)]
    lines[7] = "{damaged"
    (folder / "plain.jsonl").write_text("\n".join(lines))


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Return overrides for shards of all compressions beside plain ones, and a run over them."""
    for number in range(len(ENDINGS)):
        add_shard(tmp_path, number)
    return [
        f"data.root={tmp_path / 'data'}",
        "data.on_bad_sample=skip",
        "data.properties.source=meta.source",
        f"index.path={tmp_path / 'i.h5'}",
        "mixture.unit=samples",
        "mixture.group_by=[source]",
        "mixture.on_exhausted=stop",
        "mixture.max_epochs=2",
        "dataplane.global_batch_size=16",
        "dataplane.audit=true",
        "dataplane.workers=0",
    ]


def served(overrides: list[str], *more: str) -> list[Any]:
    """Return all that a run serves."""
    with DataPlane.open(compose([*overrides, *more]), comm=Local()) as plane:
        batches = [(batch.digests, batch.domain_ids.tolist(), batch.tokens.tolist(), batch.payloads) for batch in plane]
    assert len(batches) > 10
    return batches


def header_of(root: Path) -> RowStoreHeader:
    header = RowStoreFiles.of_index(root / "i.h5").read_header()
    assert header is not None and header.complete
    return header


def decodes(overrides: list[str], *more: str) -> bool:
    """Return whether a run decodes more than it serves."""
    source = open_source(compose([*overrides, *more]), Local())
    return decode_cost(source, np.full(source.num_domains, 10.0), JobShape.of_job(source, 1, 1)) is not None


def test_rows_are_served_in_the_same_order(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "build", *overrides, "--json"]) == 0
    output = capsys.readouterr()
    assert "Rows are written to" in output.err
    assert json.loads(output.out)["row_store"]["units_written"] == len(ENDINGS)
    for more in ([], ["query.where=source != 'b'"], ["mixture.group_by=[]", "dataplane.shuffle=none"]):
        assert served(overrides, *more) == served(overrides, *more, "data.materialize=never")
        assert not decodes(overrides, *more)
        assert decodes(overrides, *more, "data.materialize=never")
    # With little memory, frames are decoded several times.
    assert served(overrides, "data.cache_bytes=65536") == served(overrides)


def test_documents_without_a_token_store_come_from_rows(overrides: list[str], tmp_path: Path) -> None:
    tokenizer = train_bpe(["row of naïve xxxx " * 9], 300, tmp_path / "tokenizer.json")
    build = [*overrides, f"dataplane.tokenizer={tokenizer}"]
    assert main(["index", "build", *build]) == 0
    assert not (tmp_path / "i.h5.tokens").exists()
    run = [*build, "mixture.unit=tokens", "dataplane.seq_len=512"]
    assert not decodes(run)
    assert served(run) == served(run, "data.materialize=never")
    # A template of several fields needs whole rows.
    text = "data.text='{meta.source}: {text}'"
    assert main(["index", "build", *build, text]) == 0
    assert served(run) == served(run, "data.materialize=never")


def test_a_refresh_extends_the_store(overrides: list[str], tmp_path: Path) -> None:
    assert main(["index", "build", *overrides]) == 0
    first = header_of(tmp_path)
    stream = served(overrides)
    sizes = {path: path.stat().st_size for path in (tmp_path / "i.h5.rows").glob("rows-*.zst")}
    add_shard(tmp_path, 4)
    assert main(["index", "refresh", *overrides, "data.materialize=never"]) == 0
    with pytest.raises(ConfigError, match=r"was made from index \w{12}, but the index is \w{12} now"):
        served(overrides)
    assert main(["index", "refresh", *overrides]) == 0
    assert header_of(tmp_path).kept_blocks > 0
    assert all(path.stat().st_size == size for path, size in sizes.items())
    assert not decodes(overrides)
    assert served(overrides) == served(overrides, "data.materialize=never")
    assert served(overrides, f"index.generations=[{first.index}]") == stream


def test_a_store_that_is_written_anew_has_other_files(overrides: list[str], tmp_path: Path) -> None:
    """A run that is active would take them for those it has the places of."""
    assert main(["index", "build", *overrides]) == 0
    before = {path.name for path in (tmp_path / "i.h5.rows").glob("rows-*.zst")}
    shutil.rmtree(tmp_path / "data/1")
    assert main(["index", "refresh", *overrides]) == 0
    assert header_of(tmp_path).kept_blocks == 0
    assert not before & {path.name for path in (tmp_path / "i.h5.rows").glob("rows-*.zst")}
    assert served(overrides) == served(overrides, "data.materialize=never")


def test_a_store_that_changes_under_a_run_ends_it(overrides: list[str], tmp_path: Path) -> None:
    assert main(["index", "build", *overrides]) == 0
    header = header_of(tmp_path)
    files = RowStoreFiles.of_index(tmp_path / "i.h5")
    saved = tmp_path / "saved"
    shutil.copytree(files.folder, saved)

    def write_again() -> None:
        """Replace all files: those of a store that is removed and built again may have the names of before."""
        # One by one: a file that is missing for a moment would be another problem.
        for path in saved.iterdir():
            shutil.copy(path, tmp_path / "copy")
            (tmp_path / "copy").replace(files.folder / path.name)

    def begin_another() -> None:
        files.write_header(msgspec.structs.replace(header, index="f" * 32, places="places-f.bin", complete=False))

    for damage, problem in (
        (write_again, "it was written again"),
        (begin_another, "it is being written again"),
        (files.header.unlink, "cannot be found"),
        ((files.folder / header.places).unlink, "cannot be found"),
    ):
        with DataPlane.open(compose(overrides), Local()) as plane:
            batches = iter(plane)
            next(batches)
            damage()
            with pytest.raises(DataError, match=f"has changed while the run reads it: .*{problem}"):
                list(batches)
        write_again()


def test_a_run_continues_while_a_refresh_extends_its_row_store(overrides: list[str], tmp_path: Path) -> None:
    assert main(["index", "build", *overrides]) == 0
    stream = [digests for digests, *_ in served(overrides)]
    with DataPlane.open(compose(overrides), Local()) as plane:
        batches = iter(plane)
        digests = [next(batches).digests]
        add_shard(tmp_path, 4)
        assert main(["index", "refresh", *overrides]) == 0
        assert header_of(tmp_path).kept_blocks > 0
        assert digests + [batch.digests for batch in batches] == stream


def test_an_interrupted_store_is_continued(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The index is small enough, the rows of all files are not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (160_000, hard))
    try:
        assert main(["index", "build", *overrides]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"The row store cannot be written to {tmp_path}/i.h5.rows: File too large." in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is incomplete"):
        served(overrides)
    assert main(["index", "build", *overrides, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["resumed_units"] == report["units"]
    assert 0 < report["row_store"]["units_written"] < len(ENDINGS)
    assert served(overrides) == served(overrides, "data.materialize=never")


def test_places_that_do_not_fit_are_not_taken_for_complete(tmp_path: Path) -> None:
    # The places take 80 kB, the compressed rows less than 1 kB.
    (tmp_path / "data").mkdir()
    write_compressed(tmp_path / "data", [{"text": ""}] * 5000, ending="gz")
    paths = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}"]
    config = compose([*paths, "mixture.unit=samples", "data.materialize=never"])
    build_index(config)
    write_rows(config, Local(), lambda plan: None, None)
    RowStoreFiles.of_index(tmp_path / "i.h5").write_header(msgspec.structs.replace(header_of(tmp_path), complete=False))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"The row store cannot be written to .*: File too large"):
            write_rows(config, Local(), lambda plan: None, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_changes_while_its_rows_are_written_is_refused(overrides: list[str], tmp_path: Path) -> None:
    config = compose([*overrides, "data.materialize=never"])
    build_index(config)
    shard = tmp_path / "data" / "0" / "shard.jsonl.zst"
    make_old(shard)
    with pytest.raises(PropertyIndexError, match=r"(?s)is stale: 1 of .* not what was indexed:\n +0/shard.jsonl.zst"):
        write_rows(config, Local(), lambda plan: None, None)


def test_damage_is_reported(overrides: list[str], tmp_path: Path) -> None:
    assert main(["index", "build", *overrides]) == 0
    (rows,) = (tmp_path / "i.h5.rows").glob("rows-*.zst")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2 :: 997] = b"\0" * len(content[len(content) // 2 :: 997])
    rows.write_bytes(content)
    with pytest.raises(DataError, match=r"The row store .* is damaged"):
        served(overrides)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_decoded(overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "data/long"
    folder.mkdir()
    write_compressed(folder, [{"text": "x" * 200_000, "meta": {"source": "web"}}], ending="zst")
    assert main(["index", "build", *overrides]) == 0
    served(overrides)
    with pytest.raises(DataError, match=r"a frame decodes to 2\d\d\d\d\d bytes, but data\.max_block_bytes is 65536"):
        served(overrides, "data.max_block_bytes=65536")
