"""Collect real text for the demo: the files of this machine's own Python installation.

The corpus holds source files of the standard library, tests, installed packages, type stubs, C headers, licences and
documentation. It is written as JSONL, JSONL.zst and Parquet shards, in which the kinds of files are mixed line by line.
The same installation gives the same bytes.
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
import zstandard

__all__ = ["Document", "collect", "write_corpus"]

MAX_DOCUMENT_CHARACTERS = 6_000
MAX_KIND_CHARACTERS = {"package": 12_000_000, "test": 8_000_000, "stdlib": 8_000_000, "header": 5_000_000}
OTHER_KIND_CHARACTERS = 4_000_000
"""The limit for every other kind."""
SHARD_CHARACTERS = 5_000_000
FRAME_BYTES = 256_000
"""Size of a zstd frame before compression."""
ROW_GROUP_ROWS = 256

KIND_OF_SUFFIX = {
    ".rst": "documentation",
    ".md": "documentation",
    ".pyi": "stub",
    ".h": "header",
    ".hpp": "header",
    ".cuh": "header",
}
TEST_FOLDERS = ("test", "tests", "testing", "idle_test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file, or a part of a long file."""

    text: str
    kind: str
    package: str
    license: str | None
    topics: list[str]
    num_lines: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Facts that hold for all files of a distribution."""

    package: str
    license: str | None
    topics: list[str]


def write_corpus(folder: Path, progress: Callable[[str], None]) -> int:
    """Write the corpus to `folder` and return the number of documents. An interrupted call leaves no folder."""
    temporary = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    documents = list(collect())
    num_characters = sum(len(document.text) for document in documents)
    progress(f"{len(documents)} documents, {num_characters / 1e6:.1f} million characters")
    writers = itertools.cycle((_write_jsonl, _write_zst, _write_parquet))
    for number, (shard, write) in enumerate(zip(_shards(documents), writers, strict=False)):
        write(temporary / f"part_{number:03d}", shard)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return len(documents)


def collect() -> Iterator[Document]:
    """Yield every document. A hash of the path decides the order, which mixes the kinds; each kind has a size limit."""
    files = [*_standard_library(), *_distributions()]
    used: dict[str, int] = {}
    for kind, path, origin in sorted(files, key=_path_hash):
        if used.get(kind, 0) >= MAX_KIND_CHARACTERS.get(kind, OTHER_KIND_CHARACTERS):
            continue
        for text in _parts(path):
            used[kind] = used.get(kind, 0) + len(text)
            yield Document(
                text=text,
                kind=kind,
                package=origin.package,
                license=origin.license,
                topics=origin.topics,
                num_lines=text.count("\n") + 1,
                path=path.name,
            )


def _path_hash(file: tuple[str, Path, _Origin]) -> bytes:
    _, path, _ = file
    return hashlib.blake2b(path.as_posix().encode()).digest()


def _standard_library() -> Iterator[tuple[str, Path, _Origin]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if "site-packages" in parts or "dist-packages" in parts or not path.is_file():
            continue
        kind = _kind(path)
        if kind is not None:
            origin = _Origin(package=parts[0].removesuffix(".py"), license="PSF-2.0", topics=["Standard Library"])
            yield "stdlib" if kind == "package" else kind, path, origin


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
    if expression:
        licenses = [str(expression)]
    return _Origin(
        package=str(distribution.metadata["Name"]).lower(),
        license=licenses[0] if licenses else None,
        topics=topics,
    )


def _kind(path: Path) -> str | None:
    """Return the kind of a file, judged by its name; None for other files."""
    name = path.name.lower()
    if re.match(r"(licen[cs]e|copying|notice|authors|copyright)", name) and path.suffix in ("", ".txt", ".md", ".rst"):
        return "license"
    if path.suffix == ".py":
        return "test" if _is_test(path) else "package"
    if name == "metadata":
        return "documentation"
    return KIND_OF_SUFFIX.get(path.suffix)


def _is_test(path: Path) -> bool:
    folders = {part.lower() for part in path.parts}
    return path.name.lower().startswith("test_") or not folders.isdisjoint(TEST_FOLDERS)


def _parts(path: Path) -> Iterator[str]:
    """Yield the file's text, cut after ends of lines into parts of limited length; nothing if it is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return
    while text.strip():
        cut = len(text)
        if cut > MAX_DOCUMENT_CHARACTERS:
            # rfind returns -1 for a line that is longer than a document; such a line is cut in the middle.
            cut = text.rfind("\n", 0, MAX_DOCUMENT_CHARACTERS) + 1 or MAX_DOCUMENT_CHARACTERS
        yield text[:cut]
        text = text[cut:]


def _shards(documents: list[Document]) -> Iterator[list[Document]]:
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.text)
        if size >= SHARD_CHARACTERS:
            yield shard
            shard = []
            size = 0
    if shard:
        yield shard


def _line(document: Document) -> bytes:
    """Return a JSON line with the properties below `meta`, as in most public collections."""
    meta = asdict(document)
    return msgspec.json.encode({"text": meta.pop("text"), "meta": meta}) + b"\n"


def _write_jsonl(path: Path, documents: list[Document]) -> None:
    path.with_suffix(".jsonl").write_bytes(b"".join(map(_line, documents)))


def _write_zst(path: Path, documents: list[Document]) -> None:
    """Write frames that end with a line, so that a frame can be read by itself."""
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
    # Imported here because pyarrow takes 0.3 s, and `--help` does not need it.
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(_line(document)) for document in documents]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=ROW_GROUP_ROWS)
