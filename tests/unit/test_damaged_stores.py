"""Damaged files beside the shards: headers of stores, and an index that a build replaces."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import DataError, UserError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.row_store.row_files import RowStoreFiles
from mixtera_hpc.index.token_store.store_files import StoreFiles

TOKENS = {
    "version": 2,
    "index": "ab",
    "tokenizer": "cd",
    "dtype": "<u2",
    "rows": 5,
    "tokens": 9,
    "kept_blocks": 1,
    "kept_tokens": 1,
    "starts": "starts-0123abcd.bin",
    "complete": True,
}
ROWS = {"version": 1, "index": "ab", "rows": 5, "kept_blocks": 1, "places": "places-0123abcd.bin", "complete": True}
STORES: dict[str, tuple[type[StoreFiles] | type[RowStoreFiles], dict[str, Any]]] = {
    "tokens": (StoreFiles, TOKENS),
    "rows": (RowStoreFiles, ROWS),
}


@pytest.mark.parametrize("kind", STORES)
def test_any_damage_of_the_header_of_a_store_names_the_file(kind: str, tmp_path: Path) -> None:
    files_type, header = STORES[kind]
    files = files_type(tmp_path)
    whole = json.dumps(header).encode()
    files.header.write_bytes(whole)
    assert files.read_header() is not None

    deep = b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    contents = [b"", b"\xff", deep, *(whole[:cut] for cut in range(len(whole)))]
    contents += [whole[:i] + b"\xff" + whole[i + 1 :] for i in range(len(whole))]
    for content in contents:
        files.header.write_bytes(content)
        try:
            files.read_header()
            # The name of a key that has a default may be damaged.
            assert b"\xff" in content[1:], content
        except DataError as error:
            assert "store.json is damaged" in str(error)


WRONG_VALUES = {
    "rows": [-1, "5", 1.5, None],
    "tokens": [-1],
    "kept_blocks": [-1],
    "kept_tokens": [-1],
    "dtype": ["", "<u", "<u8", "<u21", "O", "garbage"],
    "starts": ["", "../starts-ab.bin", "/etc/passwd", "starts-.bin", "starts-\0.bin", "starts-ab/../../x.bin"],
    "places": ["", "../places-ab.bin", "/etc/passwd", "places-ab.bin.bin"],
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("key", WRONG_VALUES)
def test_a_header_with_values_that_nobody_writes_is_refused(kind: str, key: str, tmp_path: Path) -> None:
    """The names of files must not lead out of the folder, and the type of tokens is one of two."""
    files_type, header = STORES[kind]
    files = files_type(tmp_path)
    for value in WRONG_VALUES[key] if key in header else []:
        files.header.write_text(json.dumps(header | {key: value}))
        with pytest.raises(DataError, match=r"store\.json is damaged"):
            files.read_header()


def test_a_changed_byte_in_a_row_store_is_never_served(tmp_path: Path) -> None:
    """A frame without a checksum would decode to another text."""
    (tmp_path / "data").mkdir()
    lines = b"".join(json.dumps({"text": f"{number * 7919 % 9973:x}" * 9}).encode() + b"\n" for number in range(200))
    (tmp_path / "data/a.jsonl.gz").write_bytes(gzip.compress(lines))
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}", "mixture.unit=samples"]
    words += ["dataplane.global_batch_size=100", "dataplane.workers=0", "dataplane.audit=true", "mixture.max_epochs=1"]
    config = compose(words)
    assert main(["index", "build", *words]) == 0

    def served() -> list[list[str] | None]:
        with DataPlane.open(config, Local()) as plane:
            return [batch.digests for batch in itertools.islice(plane, 2)]

    expected = served()
    (rows,) = (tmp_path / "i.h5.rows").glob("rows-*.zst")
    whole = rows.read_bytes()
    for position in range(20, len(whole), len(whole) // 12):
        rows.write_bytes(whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
        try:
            assert served() == expected, position
        except UserError as error:
            assert "i.h5.rows" in str(error)


def test_a_build_replaces_an_index_that_is_damaged_anywhere(tmp_path: Path) -> None:
    """HDF5 raises errors of many types; a build that looks for an index to replace explains or accepts them all."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text('{"text": "x"}\n')
    index = tmp_path / "i.h5"
    config = compose([f"data.root={tmp_path / 'data'}", f"index.path={index}", "mixture.unit=samples"])
    build_index(config)
    whole = index.read_bytes()
    for position in range(8, 400, 16):
        index.write_bytes(whole[:position] + b"\xff\x00\xff\x00" + whole[position + 4 :])
        try:
            assert build_index(config).samples == 1, position
        except UserError as error:
            assert "i.h5" in str(error)
