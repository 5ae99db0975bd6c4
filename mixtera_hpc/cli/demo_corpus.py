"""Real text for the demo: what this machine's own Python installation is made of.

Source files of the standard library, its tests, installed packages, type stubs, C headers, licences and documentation, written as
JSONL, JSONL.zst and Parquet shards in which the kinds alternate line by line. The same installation gives the same bytes.
"""

import hashlib
import importlib.metadata
import itertools
import json
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

__all__ = ["Document", "collect", "write_corpus"]

MAX_DOCUMENT_BYTES = 6_000
MAX_KIND_BYTES = {"package": 12_000_000, "test": 8_000_000, "stdlib": 8_000_000, "header": 5_000_000}
OTHER_KIND_BYTES = 4_000_000
SHARD_BYTES = 5_000_000
FRAME_BYTES = 256_000
ROW_GROUP_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file, or one part of a long one."""

    text: str
    kind: str
    package: str
    license: str | None
    topics: list[str]
    num_lines: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """What a whole distribution says of its files."""

    package: str
    license: str | None
    topics: list[str]


def write_corpus(folder: Path, progress: Callable[[str], None]) -> int:
    """Write the corpus to `folder`, whole or not at all; returns the number of documents."""
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    documents = list(collect())
    progress(f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} MB")
    writers = itertools.cycle((_write_jsonl, _write_zst, _write_parquet))
    for number, (shard, write) in enumerate(zip(_shards(documents), writers, strict=False)):
        write(temporary / f"part_{number:03d}", shard)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return len(documents)


def collect() -> Iterator[Document]:
    """Every document, kinds mixed by a hash of its path; each kind bounded in bytes."""
    files = [*_standard_library(), *_distributions()]
    budget: dict[str, int] = {}
    for kind, path, origin in sorted(files, key=lambda f: hashlib.blake2b(f[1].as_posix().encode()).digest()):
        if budget.get(kind, 0) < MAX_KIND_BYTES.get(kind, OTHER_KIND_BYTES):
            for text in _parts(path):
                budget[kind] = budget.get(kind, 0) + len(text)
                yield Document(
                    text=text,
                    kind=kind,
                    package=origin.package,
                    license=origin.license,
                    topics=origin.topics,
                    num_lines=text.count("\n") + 1,
                    path=path.name,
                )


def _standard_library() -> Iterator[tuple[str, Path, _Origin]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or "dist-packages" in parts or not path.is_file():
            continue
        kind = _kind(path)
        if kind is not None:
            origin = _Origin(package=parts[0].removesuffix(".py"), license="PSF-2.0", topics=["Standard Library"])
            yield ("stdlib" if kind == "package" else kind), path, origin


def _distributions() -> Iterator[tuple[str, Path, _Origin]]:
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        origin = _origin(distribution)
        for file in sorted(distribution.files or [], key=str):
            path = Path(str(distribution.locate_file(file)))
            kind = _kind(path)
            if kind is not None and path.is_file():
                yield kind, path, origin


def _origin(distribution: importlib.metadata.Distribution) -> _Origin:
    classifiers = [str(c) for c in distribution.metadata.get_all("Classifier") or []]
    topics = sorted({c.split(" :: ")[1] for c in classifiers if c.startswith("Topic :: ")})
    licenses = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License :: ")]
    expression = distribution.metadata["License-Expression"]
    return _Origin(
        package=str(distribution.metadata["Name"]).lower(),
        license=str(expression) if expression else (licenses[0] if licenses else None),
        topics=topics,
    )


def _kind(path: Path) -> str | None:
    """What a file is, by its name; None for what is not text of a kind we know."""
    name, folders = path.name.lower(), {p.lower() for p in path.parts}
    if re.match(r"(licen[cs]e|copying|notice|authors|copyright)", name) and path.suffix in ("", ".txt", ".md", ".rst"):
        return "license"
    if path.suffix in (".rst", ".md") or name == "metadata":
        return "documentation"
    if path.suffix == ".pyi":
        return "stub"
    if path.suffix in (".h", ".hpp", ".cuh"):
        return "header"
    if path.suffix == ".py":
        return "test" if folders & {"test", "tests", "testing", "idle_test"} or name.startswith("test_") else "package"
    return None


def _parts(path: Path) -> Iterator[str]:
    """The file's text, cut at line ends into pieces of at most `MAX_DOCUMENT_BYTES`; nothing if it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    while text.strip():
        cut = len(text) if len(text) <= MAX_DOCUMENT_BYTES else text.rfind("\n", 0, MAX_DOCUMENT_BYTES) + 1
        cut = cut or MAX_DOCUMENT_BYTES
        yield text[:cut]
        text = text[cut:]


def _shards(documents: list[Document]) -> Iterator[list[Document]]:
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.text)
        if size >= SHARD_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _line(document: Document) -> bytes:
    """Properties lie below `meta`, as in most public collections."""
    meta = asdict(document)
    return msgspec.json.encode({"text": meta.pop("text"), "meta": meta}) + b"\n"


def _write_jsonl(path: Path, documents: list[Document]) -> None:
    path.with_suffix(".jsonl").write_bytes(b"".join(map(_line, documents)))


def _write_zst(path: Path, documents: list[Document]) -> None:
    """Frames that end with a line, so that a frame can be read by itself."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3)
    with path.with_suffix(".jsonl.zst").open("wb") as file:
        lines: list[bytes] = []
        for document in documents:
            lines.append(_line(document))
            if sum(map(len, lines)) >= FRAME_BYTES:
                file.write(compressor.compress(b"".join(lines)))
                lines = []
        if lines:
            file.write(compressor.compress(b"".join(lines)))


def _write_parquet(path: Path, documents: list[Document]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(_line(d)) for d in documents]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=ROW_GROUP_ROWS)
