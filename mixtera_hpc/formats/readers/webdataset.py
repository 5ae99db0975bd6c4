"""WebDataset: a tar archive in which consecutive files of one name and different endings are one sample.

A row is a sample (`tar_samples`). Its bytes are contiguous, so reading one is one positioned read. A block is
`index.block_rows` samples or 64 MiB of them. Dotted paths go on inside JSON (`json.caption`). Names are used as keys
only: no file is ever written. Members whose names lead out of the archive are refused all the same.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRanges, BlockRef, RowBatch, ScanSpec, ScanUnit, ShardReader
from mixtera_hpc.formats.batching.dict_rows import BadRow, DictRowBatcher
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.formats.batching.sample_blocks import SampleBlocks
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.positioned_reads import OpenShard, merge_nearby, read_fully, row_byte_ranges
from mixtera_hpc.formats.codecs.tar_headers import TarError, TarMember, buffered_reads, iter_members
from mixtera_hpc.formats.readers.tar_samples import (
    KEY,
    TarSample,
    WdsRow,
    decode_sample,
    group_samples,
    is_decoded,
    nest_endings,
)
from mixtera_hpc.formats.shard_errors import ShardLayoutError, open_shard, shard_changed_error

__all__ = ["WebDatasetFormat"]

# Content decoded for one batch.
BATCH_BYTES = 8 << 20
# Rows of one batch, if their contents are small.
BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WebDatasetFormat:
    """`Format` of WebDataset archives."""

    name: str = "webdataset"
    holds_tokens: bool = False
    may_be_empty: bool = False
    maps_files: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Return the whole archive as one unit: headers can only be found one after the other."""
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Read the headers of all members, and the contents that the spec asks for."""
        fd = open_shard(path)
        try:
            yield from _ArchiveScan(path, fd, spec, block_rows).batches(unit)
        except TarError as error:
            raise DataError(
                f"{path} is damaged: {error}.\n  Copy or download it again, or exclude it with data.exclude."
            ) from None
        finally:
            os.close(fd)

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open an archive for random access by sample."""
        return WebDatasetReader(path, text)


class _ArchiveScan:
    """Reads the headers of one archive, and the members that the spec asks for."""

    def __init__(self, path: Path, fd: int, spec: ScanSpec, block_rows: int) -> None:
        self._path = path
        self._fd = fd
        self._spec = spec
        self._block_rows = block_rows
        # Whole rows are returned with the members as they are.
        self._batcher = DictRowBatcher(spec, path, self._as_paths if spec.whole_rows else None)
        # Dotted paths that the spec looks at; they decide which members are read.
        self._paths = [field.path for field in spec.properties]
        if spec.text:
            self._paths.append(spec.text)
        self._read = buffered_reads(fd)

    def batches(self, unit: ScanUnit) -> Iterator[RowBatch]:
        """Yield the samples, a batch at a time."""
        rows: list[WdsRow | BadRow] = []
        lengths: list[int] = []
        content_bytes = 0
        blocks = SampleBlocks(unit.start, self._block_rows)
        members = iter_members(self._read, unit.start, unit.stop, to_end=True)
        keys = set[str]()
        for sample in group_samples(members, unit.start, self._path):
            self._check_key(sample, keys)
            row, row_bytes = self._row(sample)
            rows.append(row)
            lengths.append(sample.end - sample.start)
            content_bytes += row_bytes
            blocks.add(sample.end)
            # Hand the samples on before they take too much memory.
            if content_bytes >= BATCH_BYTES or len(rows) >= BATCH_ROWS:
                yield from self._batch(rows, lengths, blocks.take())
                rows = []
                lengths = []
                content_bytes = 0
                if self._batcher.should_stop:
                    break

        blocks.close_block()
        yield from self._batch(rows, lengths, blocks.take())
        self._batcher.check()

    def _batch(self, rows: list[Any], lengths: list[int], blocks: list[tuple[int, int, int]]) -> Iterator[RowBatch]:
        """Yield one batch; nothing if it would be empty, or after a bad row."""
        if not rows and not blocks:
            return
        batch = self._batcher.batch(rows, BlockRanges.of(blocks), np.array(lengths, np.int64))
        if batch:
            yield batch

    def _row(self, sample: TarSample) -> tuple[WdsRow | BadRow, int]:
        """Return the decoded members that the spec asks for, and their bytes.

        Raises:
            DataError: the sample is too large.
        """
        self._check_size(sample)
        # Images are skipped unless a parser needs them. Text is decoded in any case: a run that serves whole samples
        # must be able to decode it.
        contents = {
            ending: self._content(member)
            for ending, member in sample.members.items()
            if self._spec.whole_rows or is_decoded(ending) or self._is_needed(ending)
        }
        content_bytes = sum(map(len, contents.values()))

        # A bad row still counts as a row, and its bytes were read.
        problem = sample.problem or self._missing_text(sample)
        if problem:
            return BadRow(problem), content_bytes
        try:
            row = decode_sample(sample.key, contents)
            if not self._spec.whole_rows:
                row = nest_endings(row, self._paths)
            return row, content_bytes
        except ValueError as error:
            return BadRow(str(error)), content_bytes

    def _check_key(self, sample: TarSample, keys: set[str]) -> None:
        """Refuse a key that comes back, because its sample was cut into several; add it to the keys.

        Raises:
            ShardLayoutError: `keys` has it already.
        """
        if sample.key in keys:
            raise ShardLayoutError(
                f"{self._path}: the members of sample {sample.key!r} are not next to each other: the key comes back at "
                f"byte {sample.start}. They can only be read as one sample if they follow each other.\n"
                "  Unpack the archive and write it again with tar --sort=name -cf NEW.tar -C FOLDER . (or rename the "
                "members, if several samples have this key). Or exclude it with data.exclude."
            )
        keys.add(sample.key)

    def _as_paths(self, row: WdsRow) -> WdsRow:
        return nest_endings(row, self._paths)

    def _check_size(self, sample: TarSample) -> None:
        size = sample.end - sample.start
        if size > self._spec.max_block_bytes:
            raise DataError(
                f"{self._path}: sample {sample.key!r} has {size} bytes, more than data.max_block_bytes="
                f"{self._spec.max_block_bytes}.\n  Raise it, or exclude the archive with data.exclude."
            )

    def _missing_text(self, sample: TarSample) -> str:
        """Return the problem of a sample that has no member for its text; empty if it has one."""
        text = self._spec.text
        if text is None or text == KEY or any(_covers(ending, text) for ending in sample.members):
            return ""
        return f"sample {sample.key!r} has no member for data.text={text}; it has {', '.join(sorted(sample.members))}"

    def _is_needed(self, ending: str) -> bool:
        return any(_covers(ending, path) for path in self._paths)

    def _content(self, member: TarMember) -> bytes:
        """Read a member: a small one through the buffer of the headers, a large one directly."""
        # The header of a small member was read together with its content.
        if member.size < BATCH_BYTES:
            data = self._read(member.data, member.size)
            if len(data) == member.size:
                return data
        return read_fully(self._fd, member.size, member.data)


def _covers(ending: str, path: str) -> bool:
    """Return True if a dotted path begins in the member with this ending."""
    return path == ending or path.startswith(f"{ending}.")


class WebDatasetReader:
    """Reads samples with `pread`. Threads share nothing but the file descriptor."""

    def __init__(self, path: Path, text: str | None) -> None:
        self._path = path
        self._text = text
        self._type = RowType(ScanSpec(text=text))
        self._shard = OpenShard(path)

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named samples; see `ShardReader`."""
        return self.documents_at(*row_byte_ranges(block, lengths, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the named samples as dicts; see `ShardReader`."""
        return self.payloads_at(*row_byte_ranges(block, lengths, rows))

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """Return the texts of the samples at these byte ranges; see `RangeReader`."""
        text = self._text or ""
        try:
            rows = [nest_endings(row, [text]) for row in self._rows(starts, lengths, text)]
            return self._type.documents([msgspec.convert(row, self._type.struct) for row in rows])
        except (msgspec.ValidationError, ValueError) as error:
            raise shard_changed_error(self._path, None, f"{error}") from None

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return the samples at these byte ranges as dicts; see `RangeReader`."""
        return list(self._rows(starts, lengths, None))

    def close(self) -> None:
        """Release the file descriptor."""
        self._shard.close()

    def _rows(self, starts: NDArray[np.int64], lengths: NDArray[np.int64], path: str | None) -> Iterator[WdsRow]:
        """Yield the decoded samples; samples near each other share a read."""
        stops = starts + lengths
        for first, last in itertools.pairwise(merge_nearby(starts, stops).tolist()):
            begin = int(starts[first])
            data = read_fully(self._shard.fd, int(stops[last - 1]) - begin, begin)
            row_starts = (starts[first:last] - begin).tolist()
            row_stops = (stops[first:last] - begin).tolist()
            for start, stop in zip(row_starts, row_stops, strict=True):
                yield self._decode_row(data[start:stop], path)

    def _decode_row(self, data: bytes, path: str | None) -> WdsRow:
        """Decode the sample whose members are in `data`; only the member in which `path` begins, if it is given."""
        # The bytes of a sample have the layout of an archive without an end mark.
        try:
            members = iter_members(lambda offset, size: data[offset : offset + size], 0, len(data), to_end=False)
            samples = list(group_samples(members, 0, self._path))
            if len(samples) != 1:
                raise ValueError(f"one sample was expected, but it has {len(samples)}")
            (sample,) = samples
            contents = {
                ending: data[member.data : member.data + member.size]
                for ending, member in sample.members.items()
                if path is None or _covers(ending, path)
            }
            return decode_sample(sample.key, contents)
        except (TarError, ValueError) as error:
            raise shard_changed_error(self._path, None, f"{error}") from None
