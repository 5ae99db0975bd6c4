"""MDS shards and folders with one fault: fault × {plain, compressed} × {build, verify, query, run, samples}."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.formats.codecs.mds_samples import MdsColumn, MdsSampleDecoder
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.testing.mds import write_mds

Answers = Callable[..., dict[str, str]]
Sample = dict[str, bytes]
ENCODINGS = {"text": "str", "meta": "json", "n": "int"}
SAMPLES: list[Sample] = [{"text": b"row %d" % i, "meta": b'{"s": "a"}', "n": struct.pack("<q", i)} for i in range(4)]
COMPRESSIONS = [None, "zstd"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("data_format", ["auto", "mds"])
def test_good_shards_are_built_and_served(
    data_format: str, compression: str | None, data: Path, answers: Answers
) -> None:
    write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]], compression)
    properties = {"s": "meta.s", "n": {"path": "n", "kind": "number"}}
    assert answers(format=data_format, properties=properties) == {
        "build": "7 samples, 0 bad rows, 0 damaged",
        "tokens": "35",
        "verify": "fresh",
        "query": "7 samples",
        "run": "10 served",
        "samples": "7 served",
    }


# Fault → the bad sample, and what the message says.
FAULTS: dict[str, tuple[Sample, str]] = {
    "invalid UTF-8": (SAMPLES[0] | {"text": b"\xff"}, "column 'text': 'utf-8' codec can't decode"),
    "NaN": (SAMPLES[0] | {"meta": b'{"v": NaN}'}, "column 'meta': "),
    "malformed JSON": (SAMPLES[0] | {"meta": b"{"}, "column 'meta': Input data was truncated"),
    "a number in place of the object": (SAMPLES[0] | {"n": b"\0" * 7}, "the sample has"),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_sample_is_named_or_skipped_alone(
    fault: str, compression: str | None, data: Path, answers: Answers
) -> None:
    sample, message = FAULTS[fault]
    write_mds(data, ENCODINGS, [[SAMPLES[0], sample, *SAMPLES[1:]]], compression)
    refused = answers()["build"]
    assert f"row=1: {message}" in refused and "row=2" not in refused
    assert answers(on_bad_sample="skip") == {
        "build": "4 samples, 1 bad rows, 0 damaged",
        "tokens": "20",
        "verify": "fresh",
        "query": "4 samples",
        "run": "5 served",
        "samples": "4 served",
    }


def cut_off(folder: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-5])


def cut_header(folder: Path, shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:9])


def other_count(folder: Path, shard: Path) -> None:
    rewrite_index(folder, lambda index: index["shards"][0].update(samples=9))


def other_size(folder: Path, shard: Path) -> None:
    rewrite_index(folder, lambda index: index["shards"][0]["raw_data"].update(bytes=9))


def other_columns(folder: Path, shard: Path) -> None:
    rewrite_index(folder, lambda index: index["shards"][0].update(column_names=["a", "b", "c"]))


def other_file(folder: Path, shard: Path) -> None:
    data = b"plain bytes, which are no shard" * 9
    shard.write_bytes(zstandard.compress(data) if shard.suffix == ".zstd" else data)


DAMAGES = {
    cut_off: {None: "but its header describes", "zstd": "ends inside a compressed frame"},
    cut_header: {None: "is not a whole MDS shard: 9 bytes are too few", "zstd": "cannot be decompressed"},
    other_count: "has samples 4, but index.json says 9",
    other_size: "but index.json says 9: one of the two was cut off or replaced",
    other_columns: "has columns ['meta', 'n', 'text'], but index.json says ['a', 'b', 'c']",
    other_file: "is not a whole MDS shard",
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_shard_is_refused_or_counted(
    damage: Callable[[Path, Path], None], compression: str | None, data: Path, answers: Answers
) -> None:
    shards = write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]], compression)
    damage(data, shards[0])
    expected = DAMAGES[damage]
    refused = answers()["build"]
    assert refused.startswith("DataError") and shards[0].name in refused
    assert (expected if isinstance(expected, str) else expected[compression]) in refused
    skipped = answers(on_bad_sample="skip")
    assert skipped["build"] == "3 samples, 0 bad rows, 1 damaged"
    assert (skipped["verify"], skipped["samples"]) == ("fresh", "3 served")


def test_a_missing_shard_is_named(data: Path, answers: Answers) -> None:
    shards = write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]])
    shards[1].unlink()
    for on_bad_sample in ("fail", "skip"):
        refused = answers(on_bad_sample=on_bad_sample)["build"]
        assert "index.json lists shard.00001.mds, which is not in the folder" in refused
        assert "remove its entry from index.json" in refused
    rewrite_index(data, lambda index: index["shards"].pop())
    assert answers()["samples"] == "4 served"


def test_an_excluded_shard_is_not_missing(data: Path, answers: Answers) -> None:
    write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]])
    assert answers(exclude=["shard.00000.mds"])["samples"] == "3 served"


def test_a_shard_that_goes_missing_after_the_build_is_named(data: Path, answers: Answers, tmp_path: Path) -> None:
    shards = write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]], "zstd")
    assert answers()["verify"] == "fresh"
    shards[1].unlink()
    assert main(["index", "verify", f"data.root={data}", f"index.path={tmp_path / 'i.h5'}"]) == 2


def test_a_shard_that_the_index_lacks_is_refused(data: Path, answers: Answers) -> None:
    write_mds(data, ENCODINGS, [SAMPLES, SAMPLES[:3]])
    rewrite_index(data, lambda index: index["shards"].pop())
    assert "index.json does not list shard.00001.mds" in answers()["build"]
    (data / "index.json").unlink()
    assert answers()["samples"] == "7 served"


def test_a_plain_copy_beside_the_compressed_shard_is_refused(data: Path, answers: Answers) -> None:
    (shard,) = write_mds(data, ENCODINGS, [SAMPLES], "zstd")
    shard.with_suffix("").write_bytes(zstandard.decompress(shard.read_bytes()))
    assert "has shard.00000.mds and shard.00000.mds.zstd, which hold the same samples" in answers()["build"]


@pytest.mark.parametrize("content", ["{", '{"version": 1, "shards": []}', '{"shards": 3}'])
def test_an_unreadable_index_is_refused(content: str, data: Path, answers: Answers) -> None:
    write_mds(data, ENCODINGS, [SAMPLES])
    (data / "index.json").write_text(content)
    assert "index.json" in (refused := answers()["build"]) and refused.startswith("ShardLayoutError")


@pytest.mark.parametrize(
    "encoding", ["pkl", "pil", "str_decimal", "list[jpeg]", "ndarray:complex64", "int:3", "vector"]
)
@pytest.mark.parametrize("on_bad_sample", ["fail", "skip"])
def test_an_unknown_encoding_is_refused_by_name(
    encoding: str, on_bad_sample: str, data: Path, answers: Answers
) -> None:
    write_mds(data, ENCODINGS | {"x": encoding}, [[sample | {"x": b"1"} for sample in SAMPLES]])
    refused = answers(on_bad_sample=on_bad_sample)["build"]
    assert f"column 'x' has the encoding {encoding!r}, which cannot be read" in refused


def test_a_text_must_be_a_column_of_text(data: Path, answers: Answers) -> None:
    write_mds(data, ENCODINGS, [SAMPLES])
    assert "has no column 'body', which data.text names. Its columns are: meta, n, text" in answers("body")["build"]
    assert "data.text is 'n', a column of encoding int" in answers("n")["build"]
    assert answers("meta.s")["tokens"] == "4"


def test_values_are_those_that_were_encoded() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    # Encoding → encoded value, its fixed size, and the value.
    cases: dict[str, tuple[bytes, int, Any]] = {
        "bytes": (b"\xff\0", 0, b"\xff\0"),
        "jpeg": (b"\xff\xd8", 0, b"\xff\xd8"),
        "str": ("é".encode(), 0, "é"),
        "int": (struct.pack("<q", -3), 8, -3),
        "uint8": (b"\xff", 1, 255),
        "float32": (struct.pack("<f", 0.5), 4, 0.5),
        "str_int": (b"100000000000000000000", 0, 10**20),
        "str_float": (b"0.25", 0, 0.25),
        "json": (b'{"a": [1]}', 0, {"a": [1]}),
        "ndarray": (bytes([33, 2 << 2, 2, 3]) + array.tobytes(), 0, array.tolist()),
        "ndarray:int32": (bytes([2 << 2 | 1, 2, 0, 3, 0]) + array.tobytes(), 0, array.tolist()),
        "ndarray:int32:2,3": (array.tobytes(), 24, array.tolist()),
    }
    columns = [MdsColumn(name=name, encoding=name, size=size) for name, (_, size, _) in cases.items()]
    values = [data for data, _, _ in cases.values()]
    sizes = np.array([len(data) for data, size, _ in cases.values() if not size], "<u4").tobytes()
    decoded = MdsSampleDecoder(columns).decode(sizes + b"".join(values))
    for name, (_, _, expected) in cases.items():
        value = decoded[name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected


@pytest.mark.parametrize("data_bytes", [b"", b"\x21", b"\x21\x04", b"\x05\x04\x01\0", b"\x21\x04\x02" + bytes(4)])
def test_a_cut_array_is_a_bad_value(data_bytes: bytes) -> None:
    decoder = MdsSampleDecoder([MdsColumn(name="x", encoding="ndarray", size=0)])
    with pytest.raises(ValueError, match="column 'x' of encoding ndarray: "):
        decoder.decode(np.uint32(len(data_bytes)).tobytes() + data_bytes)


def test_an_array_can_be_a_property(data: Path, tmp_path: Path, answers: Answers) -> None:
    values = [np.array([i, 7], "<i4").tobytes() for i in range(4)]
    samples = [sample | {"x": bytes([1 << 2, 2]) + value} for sample, value in zip(SAMPLES, values, strict=True)]
    write_mds(data, ENCODINGS | {"x": "ndarray:int32"}, [samples])
    built = answers(properties={"x": {"path": "x", "kind": "categories"}})
    assert (built["build"], built["samples"]) == ("4 samples, 0 bad rows, 0 damaged", "4 served")
    with open_index(tmp_path / "i.h5") as index:
        assert "x" in index.tables.properties
