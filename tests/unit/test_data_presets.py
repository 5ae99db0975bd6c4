"""The presets of `conf/data`, each on a small file with the same structure as its collection."""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.open import open_index

pytestmark = pytest.mark.slow
"""Builds an index for every preset."""

Row = dict[str, Any]
Write = Callable[[Path], None]


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def generic(root: Path) -> None:
    put(root / "any.jsonl", lines([{"text": "a"}, {"text": "b", "more": 1}]))


def slim_pajama(root: Path) -> None:
    sets = ["RedPajamaC4", "RedPajamaBook", "RedPajamaC4"]
    rows = [{"text": "t", "meta": {"redpajama_set_name": name}} for name in sets]
    put(root / "train/chunk1/example_train_0.jsonl.zst", zstandard.compress(lines(rows)))


def the_pile(root: Path) -> None:
    rows = [{"text": "t", "meta": {"pile_set_name": name}} for name in ("Pile-CC", "USPTO Backgrounds")]
    put(root / "train/00.jsonl.zst", zstandard.compress(lines(rows)))


def red_pajama(root: Path) -> None:
    github = {"content_hash": "f", "language": [{"name": "C", "bytes": "9"}, {"name": "Python", "bytes": "4"}]}
    arxiv = {"timestamp": "2015", "yymm": "1503", "arxiv_id": "1503.1", "language": "en", "publication_date": "2015-03"}
    put(root / "github/filtered_0.sampled.jsonl", lines([{"text": "int", "meta": github}]))
    put(root / "arxiv/arxiv_0.jsonl", lines([{"text": "a", "meta": arxiv}]))
    crawl = {"text": "c", "pred_label": "x", "source": "cc/2023-06", "meta": {"url": "u"}}
    put(root / "common_crawl/2023-06/en_head_0.json.gz.dedup.classifier.jsonl.zst", zstandard.compress(lines([crawl])))


def fineweb(root: Path) -> None:
    common = {"id": "<urn>", "url": "u", "date": "2013", "file_path": "s3://", "token_count": 3}
    rows = [
        {"text": "t", **common, "dump": "CC-MAIN-2013-20", "language": "en", "language_score": 0.9},
        {"text": "u", **common, "dump": "CC-MAIN-2013-20", "language": "en", "language_score": 0.7},
    ]
    parquet(root / "data/CC-MAIN-2013-20/000_00000.parquet", rows)


def dolma(root: Path) -> None:
    for name, source in (("c4-0000", "c4"), ("cc_en_head-0123", "common-crawl"), ("pes2o-0001", "s2")):
        row = {"id": "i", "text": "t", "source": source, "added": "2023", "created": "2019", "metadata": {"url": "u"}}
        put(root / f"data/{name}.json.gz", gzip.compress(lines([row])))


def starcoder(root: Path) -> None:
    for language, path, stars in (("python", "a/b.py", 12), ("c-sharp", "Program.cs", None)):
        row = {
            "max_stars_repo_path": path,
            "max_stars_repo_name": "x/y",
            "max_stars_count": stars,
            "id": "1",
            "content": "c",
        }
        parquet(root / f"{language}/train-00000-of-00001.parquet", [row])


def imagenet_wds(root: Path) -> None:
    members = {
        "n01440764_1.jpg": b"\xff\xd8a",
        "n01440764_1.cls": b"0",
        "n02_7.jpg": b"\xff\xd8b",
        "n02_7.cls": b"17\n",
    }
    tar(root / "imagenet1k-train-0000.tar", members)


def image_text(**columns: Any) -> Write:
    def write(root: Path) -> None:
        facts = {"caption": "a cat", "url": "u", "key": "000000000", "status": "success", "error_message": None}
        shape = {
            "width": 256,
            "height": 192,
            "original_width": 512,
            "original_height": 384,
            "exif": "{}",
            "sha256": "0",
        }
        sidecar = json.dumps(facts | shape | columns).encode()
        tar(
            root / "00000.tar",
            {"000000000.jpg": b"\xff\xd8", "000000000.json": sidecar, "000000000.txt": b"a cat"},
        )

    return write


def llava_665k(root: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": talk},
        {"id": "x1", "image": "ocr_vqa/images/1.jpg", "conversations": talk},
        {"id": "sharegpt", "conversations": talk, "model": "gpt"},
    ]
    put(root / "llava_v1_5_mix665k.json", json.dumps(rows).encode())


def domainnet(root: Path) -> None:
    tar(
        root / "clipart.tar",
        {"clipart/aircraft_carrier/clipart_001_000001.jpg": b"1", "sketch/axe/sketch_010_1.jpg": b"2"},
    )


SIZE = {"width": [256.0], "height": [192.0]}
PRESETS: dict[str, tuple[Write, dict[str, Any]]] = {
    "generic": (generic, {}),
    "slim_pajama": (slim_pajama, {"source": ["RedPajamaC4", "RedPajamaBook", "RedPajamaC4"]}),
    "the_pile": (the_pile, {"source": ["Pile-CC", "USPTO Backgrounds"]}),
    "red_pajama": (
        red_pajama,
        {
            "source": ["arxiv", "common_crawl", "github"],
            "language": ["en", None, "C|Python"],
            "publication_date": ["2015-03", None, None],
        },
    ),
    "fineweb": (
        fineweb,
        {
            "dump": ["CC-MAIN-2013-20"] * 2,
            "language": ["en", "en"],
            "language_score": [0.9, 0.7],
            "score": [np.nan, np.nan],
        },
    ),
    "dolma": (dolma, {"source": ["c4", "common-crawl", "s2"], "part": ["c4", "cc_en_head", "pes2o"]}),
    "starcoder": (starcoder, {"language": ["c-sharp", "python"], "stars": [np.nan, 12.0], "ending": ["cs", "py"]}),
    "imagenet_wds": (imagenet_wds, {"class_label": ["0", "17"]}),
    "laion400m": (
        image_text(NSFW="UNLIKELY", similarity=0.31, LICENSE="?"),
        SIZE | {"nsfw": ["UNLIKELY"], "license": ["?"], "similarity": [0.31]},
    ),
    "coyo700m": (
        image_text(clip_similarity_vitb32=0.3, aesthetic_score_laion_v2=5.5, watermark_score=0.01, num_faces=2),
        SIZE | {"similarity": [0.3], "aesthetic": [5.5], "watermark": [0.01], "num_faces": [2.0]},
    ),
    "cc12m": (image_text(), SIZE),
    "image_text": (image_text(), SIZE),
    "mscoco": (image_text(), SIZE),
    "llava_665k": (llava_665k, {"domain": ["coco", "ocr_vqa", None]}),
    "domainnet": (domainnet, {"domain": ["clipart", "sketch"], "class_name": ["aircraft_carrier", "axe"]}),
}


def properties(path: Path) -> dict[str, list[Any]]:
    """Return every property of every sample, in index order; several values are joined by a bar."""
    with open_index(path) as index:
        tables = index.tables
        columns = [index.read_block(block) for block in range(len(tables.blocks))]
    combo = np.concatenate([c.combo for c in columns])
    values: dict[str, list[Any]] = {
        name: ["|".join(tables.combos.values(name, int(c))) or None for c in combo] for name in tables.combos.properties
    }
    for name in columns[0].numbers:
        values[name] = np.concatenate([c.numbers[name] for c in columns]).tolist()
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_the_properties_of_its_collection(name: str, tmp_path: Path) -> None:
    write, expected = PRESETS[name]
    write(tmp_path / "data")
    config = compose_data([f"data={name}", f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}"])
    report = build_index(config)
    # Compare as text, because NaN is not equal to itself.
    got = {name: repr(values) for name, values in properties(tmp_path / "index.h5").items() if name != "dataset"}
    assert got == {name: repr(values) for name, values in expected.items()}
    assert [p for p in report.empty_properties if p != "score"] == []


@pytest.mark.parametrize(
    "ending",
    [pytest.param("jsonl", marks=pytest.mark.full), pytest.param("jsonl.gz", marks=pytest.mark.full), "jsonl.zst"],
)
@pytest.mark.parametrize("name", ["slim_pajama", "red_pajama", "the_pile", "dolma", "generic"])
def test_a_preset_reads_plain_and_compressed_copies(name: str, ending: str, tmp_path: Path) -> None:
    write, expected = PRESETS[name]
    write(tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*.*")):
        if path.is_file():
            copy_as(path, ending)
    build_index(compose_data([f"data={name}", f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}"]))
    got = properties(tmp_path / "index.h5")
    assert {value: sorted(got[value], key=repr) for value in expected} == {
        value: sorted(values, key=repr) for value, values in expected.items()
    }


def copy_as(path: Path, ending: str) -> None:
    """Replace a file of JSON lines by a copy with another compression."""
    plain: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.decompress,
        ".zst": lambda data: zstandard.ZstdDecompressor().decompress(data),
    }
    compressed: dict[str, Callable[[bytes], bytes]] = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}
    data = plain.get(path.suffix, bytes)(path.read_bytes())
    stem = re.sub(r"\.jsonl?(\.gz|\.zst)?$", "", path.name)
    path.unlink()
    path.with_name(f"{stem}.{ending}").write_bytes(compressed.get(ending, bytes)(data))


def test_dolma_reads_decompressed_files_under_their_own_names(tmp_path: Path) -> None:
    write, expected = PRESETS["dolma"]
    write(tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*.json.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}"]
    build_index(compose_data(["data=dolma", *words, "data.format=jsonl", 'data.include=["**/*.json"]']))
    assert properties(tmp_path / "index.h5")["part"] == expected["part"]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("name", ["fineweb", "starcoder"])
def test_a_parquet_preset_reads_any_compression(name: str, compression: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    write, expected = PRESETS[name]
    write(tmp_path / "data")
    for path in sorted((tmp_path / "data").rglob("*.parquet")):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path), path, compression=compression)
    build_index(compose_data([f"data={name}", f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'index.h5'}"]))
    got = properties(tmp_path / "index.h5")
    assert {value: repr(got[value]) for value in expected} == {v: repr(values) for v, values in expected.items()}


def test_every_preset_is_tested() -> None:
    assert {path.stem for path in (conf_dir() / "data").glob("*.yaml")} - {"demo"} == set(PRESETS)
