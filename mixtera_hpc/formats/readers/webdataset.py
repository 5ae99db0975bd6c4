"""WebDataset: a tar archive in which consecutive files of one name and different endings are one sample.

A row is a dict from ending to content: `jpg` bytes, `json` the decoded object, `txt` text, `cls` a number, and `__key__` the
name without ending; dotted paths go on inside JSON (`json.caption`). Endings of several parts nest (`seg.png` is below `seg`).
A sample's bytes lie in a row, so reading one is one positioned read; a block is `index.block_rows` samples or 64 MiB of them.
Names are keys and nothing else: no file is ever written. Members whose names leave the archive are refused all the same.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import (
    BlockRanges,
    BlockRef,
    RowBatch,
    ScanSpec,
    ScanUnit,
    ShardReader,
    open_shard,
    shard_changed,
)
from mixtera_hpc.formats.batching.dict_rows import BadRow, RowScanner
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import merge_nearby, read_fully, row_byte_ranges
from mixtera_hpc.formats.codecs.tar_headers import Member, TarError, members, window

__all__ = ["WebDatasetFormat"]

BLOCK_BYTES = 64 << 20
BATCH_BYTES = 8 << 20
"""Content decoded before a batch is handed on."""
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)
KEY = "__key__"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WebDatasetFormat:
    """`Format` of WebDataset archives."""

    name: str = "webdataset"
    holds_tokens: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, fields: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        fd = open_shard(path)
        try:
            yield from _Scan(path, fd, fields, block_rows).batches(unit)
        except TarError as error:
            raise DataError(
                f"{path} is damaged: {error}.\n  Copy or download it again, or leave it out with data.exclude."
            ) from None
        finally:
            os.close(fd)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        return _Reader(path, text)


@dataclass(slots=True)
class _Sample:
    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)
    """By ending."""
    problem: str = ""


def _samples(found: Iterator[Member], start: int, path: Path) -> Iterator[_Sample]:
    """Group consecutive members of one key; what has no key counts to the sample that follows."""
    sample: _Sample | None = None
    for member in found:
        key, ending = _split(member.name, path)
        if not ending:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, start if sample is None else sample.end, member.end)
        if ending in sample.members:
            sample.problem = f"sample {key!r} has two members with ending {ending!r}"
        sample.members[ending] = member
        sample.end = member.end
    if sample is not None:
        yield sample


def _split(name: str, path: Path) -> tuple[str, str]:
    """Key and ending, in lower case; an empty ending where the name has none or is hidden."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(
            f"{path} has a member named {name!r}, which points out of the archive. Nothing is extracted here, but whoever "
            "unpacks it would overwrite other files.\n  Leave the archive out with data.exclude."
        )
    match = _NAME.fullmatch(name.removeprefix("./"))
    return (match["key"], match["ending"].lower()) if match else ("", "")


class _Scan:
    """Reads the headers of one archive, and the members that somebody wants."""

    def __init__(self, path: Path, fd: int, fields: ScanSpec, block_rows: int) -> None:
        self._path, self._fd, self._fields, self._block_rows = path, fd, fields, block_rows
        self._scanner = RowScanner(fields, path)
        self._wanted = [f.path for f in fields.properties] + ([fields.text] if fields.text else [])
        self._read = window(fd)

    def batches(self, unit: ScanUnit) -> Iterator[RowBatch]:
        """The samples, a batch at a time."""
        rows: list[Row | BadRow] = []
        lengths: list[int] = []
        blocks: list[tuple[int, int, int]] = []
        block_start, block_rows, size, end = unit.start, 0, 0, unit.start
        found = members(self._read, unit.start, unit.stop, to_end=True)
        for sample in _samples(found, unit.start, self._path):
            row, read = self._row(sample)
            rows.append(row)
            lengths.append(sample.end - sample.start)
            block_rows, size, end = block_rows + 1, size + read, sample.end
            if block_rows >= self._block_rows or end - block_start >= BLOCK_BYTES:
                blocks.append((block_start, end - block_start, block_rows))
                block_start, block_rows = end, 0
            if size >= BATCH_BYTES or len(rows) >= 1024:
                yield from self._batch(rows, lengths, blocks)
                rows, lengths, blocks, size = [], [], [], 0
                if self._scanner.has_enough:
                    break
        if block_rows:
            blocks.append((block_start, end - block_start, block_rows))
        yield from self._batch(rows, lengths, blocks)
        self._scanner.check()

    def _batch(self, rows: list[Any], lengths: list[int], blocks: list[tuple[int, int, int]]) -> Iterator[RowBatch]:
        batch = (
            self._scanner.batch(rows, BlockRanges.of(blocks), np.array(lengths, np.int64)) if rows or blocks else None
        )
        if batch:
            yield batch

    def _row(self, sample: _Sample) -> tuple[Row | BadRow, int]:
        """The members that are wanted, decoded, and their bytes."""
        size = sample.end - sample.start
        if size > self._fields.max_block_bytes:
            raise DataError(
                f"{self._path}: sample {sample.key!r} has {size} bytes, more than data.max_block_bytes="
                f"{self._fields.max_block_bytes}.\n  Raise it, or leave the archive out with data.exclude."
            )
        wanted = {e: m for e, m in sample.members.items() if self._fields.rows or self._is_wanted(e)}
        contents = {e: self._content(m) for e, m in wanted.items()}
        read = sum(map(len, contents.values()))
        problem = sample.problem or self._missing(sample)
        if problem:
            return BadRow(problem), read
        try:
            row = _decoded(sample.key, contents)
            return row if self._fields.rows else _with_texts(row, self._wanted), read
        except ValueError as error:
            return BadRow(str(error)), read

    def _missing(self, sample: _Sample) -> str:
        """What is wrong with a sample that has nothing where the text should be."""
        text = self._fields.text
        if text is None or text == KEY or any(f"{text}.".startswith(f"{ending}.") for ending in sample.members):
            return ""
        return f"sample {sample.key!r} has no member for data.text={text}; it has {', '.join(sorted(sample.members))}"

    def _is_wanted(self, ending: str) -> bool:
        return any(path == ending or path.startswith(f"{ending}.") for path in self._wanted)

    def _content(self, member: Member) -> bytes:
        data = self._read(member.data, member.size) if member.size < BATCH_BYTES else b""
        return data if len(data) == member.size else read_fully(self._fd, member.size, member.data)


def _decoded(key: str, contents: dict[str, bytes]) -> Row:
    """A row as the trainer gets it.

    Raises:
        ValueError: a member is not what its ending says.
    """
    row: Row = {KEY: key}
    for ending, data in contents.items():
        kind = ending.rpartition(".")[2]
        try:
            row[ending] = _DECODE[kind](data) if kind in _DECODE else data
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise ValueError(f"member {key}.{ending}: {error}") from None
    return row


def _class(data: bytes) -> int | str:
    """A label: a number, or a name."""
    text = data.decode().strip()
    return int(text) if text.removeprefix("-").isdecimal() else text


_DECODE: dict[str, Any] = {
    "json": msgspec.json.Decoder().decode,
    "cls": _class,
    "txt": bytes.decode,
    "text": bytes.decode,
}


def _with_texts(row: Row, paths: Sequence[str]) -> Row:
    """The row as dotted paths see it: what they name and is bytes is text, endings with dots nest."""
    nested: Row = {}
    for ending, value in row.items():
        value = value.decode() if isinstance(value, bytes) and ending in paths else value
        *parents, last = ending.split(".")
        place: Any = nested
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else place
        if isinstance(place, dict):
            place[last] = value
    return nested


class _Reader:
    """Reads samples with `pread`; threads share nothing but the descriptor."""

    def __init__(self, path: Path, text: str | None) -> None:
        self._path, self._text = path, text
        self._type = RowType(ScanSpec(text=text))
        self._fd = open_shard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        return self.documents_at(*row_byte_ranges(block, lengths, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        return self.payloads_at(*row_byte_ranges(block, lengths, rows))

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        text = self._text or ""
        try:
            found = [_with_texts(row, [text]) for row in self._rows(starts, lengths, text)]
            return self._type.documents([msgspec.convert(row, self._type.struct) for row in found])
        except (msgspec.ValidationError, UnicodeDecodeError) as error:
            raise shard_changed(self._path, None, f"{error}") from None

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        return list(self._rows(starts, lengths, None))

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _rows(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], path: str | None) -> Iterator[Row]:
        stops = starts + lengths
        for first, last in merge_nearby(starts, stops):
            begin = int(starts[first])
            data = read_fully(self._fd, int(stops[last - 1]) - begin, begin)
            spans = zip((starts[first:last] - begin).tolist(), (stops[first:last] - begin).tolist(), strict=True)
            yield from (self._row(data[a:b], path) for a, b in spans)

    def _row(self, data: bytes, path: str | None) -> Row:
        """The sample whose members `data` holds; with `path`, only what it names."""
        try:
            found = members(lambda offset, size: data[offset : offset + size], 0, len(data), to_end=False)
            samples = list(_samples(found, 0, self._path))
            if len(samples) != 1:
                raise ValueError(f"one sample was expected, {len(samples)} are there")
            wanted = samples[0].members.items()
            contents = {
                e: data[m.data : m.data + m.size] for e, m in wanted if path is None or f"{path}.".startswith(f"{e}.")
            }
            return _decoded(samples[0].key, contents)
        except (TarError, ValueError) as error:
            raise shard_changed(self._path, None, f"{error}") from None
