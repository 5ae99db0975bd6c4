"""MDS shards of MosaicML Streaming (`.mds`, `.mds.zstd`): a row is a sample, its columns are the keys.

Samples of a plain shard have byte ranges, so reading one is one positioned read. A compressed shard is one block, which
is decoded as a whole. Dotted paths go on inside `json` columns.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
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
from mixtera_hpc.formats.codecs.frames import decode_frames
from mixtera_hpc.formats.codecs.mds_layout import COMPRESSED_SUFFIX, check_mds_index, read_mds_layout
from mixtera_hpc.formats.codecs.mds_samples import MdsColumn, MdsSampleDecoder
from mixtera_hpc.formats.codecs.positioned_reads import OpenShard, merge_nearby, read_fully, row_byte_ranges
from mixtera_hpc.formats.codecs.zstd_frames import ZSTD
from mixtera_hpc.formats.shard_errors import ShardLayoutError, cannot_open_error, shard_changed_error

__all__ = ["MdsFormat"]

# Bytes of samples decoded for one batch.
BATCH_BYTES = 8 << 20
# Rows of one batch, if they are small.
BATCH_ROWS = 1024

MdsRow = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MdsFormat:
    """`Format` of MDS shards."""

    name: str = "mds"
    holds_tokens: bool = False
    may_be_empty: bool = False
    maps_files: bool = False

    def units(self, path: Path, size_bytes: int) -> list[ScanUnit]:
        """Return the whole shard as one unit: usually it has 64 MiB."""
        return [ScanUnit(0, size_bytes)] if size_bytes else []

    def scan(self, path: Path, unit: ScanUnit, spec: ScanSpec, block_rows: int) -> Iterator[RowBatch]:
        """Decode all columns of all samples: a run may serve whole samples."""
        if _is_compressed(path):
            data = _decompress(path, spec.max_block_bytes)
            shard_scan = _ShardScan(path, _InMemory(data), len(data), spec)
            yield from shard_scan.batches_of_one_block(unit.stop)
            return
        shard = OpenShard(path)
        try:
            size = os.fstat(shard.fd).st_size
            yield from _ShardScan(path, _OnDisk(shard.fd), size, spec).batches(block_rows)
        finally:
            shard.close()

    def open(self, path: Path, text: str | None, cache: BlockCache) -> ShardReader:
        """Open a shard for random access by sample, or by shard if it is compressed."""
        if _is_compressed(path):
            return CompressedMdsReader(path, text, cache)
        return MdsReader(path, text)


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == COMPRESSED_SUFFIX


def _decompress(path: Path, limit: int) -> bytes:
    """Return the decompressed bytes of a shard.

    Raises:
        DataError: the shard is damaged, or decodes to more than `limit` bytes.
    """
    segments = []
    size = 0
    try:
        with path.open("rb") as file:
            for segment in decode_frames(file, ZSTD, path):
                segments.append(segment.data)
                size += len(segment.data)
                if size > limit:
                    raise DataError(
                        f"{path} decodes to more than data.max_block_bytes={limit}, and it can only be read as a "
                        "whole.\n  Decompress it with zstd -d, or raise data.max_block_bytes."
                    )
    except OSError as error:
        raise cannot_open_error(path, error) from None
    return b"".join(segments)


@dataclass(frozen=True, slots=True)
class _OnDisk:
    """Reads byte ranges of an open file."""

    fd: int

    def __call__(self, offset: int, size: int) -> bytes:
        return read_fully(self.fd, size, offset)


@dataclass(frozen=True, slots=True)
class _InMemory:
    """Reads byte ranges of a decompressed shard."""

    data: bytes

    def __call__(self, offset: int, size: int) -> bytes:
        return self.data[offset : offset + size]


class _ShardScan:
    """Decodes the samples of one shard."""

    def __init__(self, path: Path, read: _OnDisk | _InMemory, size_bytes: int, spec: ScanSpec) -> None:
        self._path = path
        self._read = read
        self._spec = spec
        self._layout = read_mds_layout(read, size_bytes, path)
        check_mds_index(path, self._layout)
        _check_text(self._layout.columns, spec.text, path)
        self._decoder = MdsSampleDecoder(self._layout.columns)
        paths = [field.path for field in spec.properties]
        # Arrays are lists for properties; whole rows are returned as they are.
        self._arrays = {
            column.name
            for column in self._layout.columns
            if column.encoding.startswith("ndarray") and column.name in paths
        }
        self._batcher = DictRowBatcher(spec, path, self._as_paths if self._arrays else None)

    def batches(self, block_rows: int) -> Iterator[RowBatch]:
        """Yield the samples of a plain shard, in blocks of samples."""
        starts = self._layout.starts
        blocks = SampleBlocks(int(starts[0]), block_rows)
        for first, stop in self._batch_bounds():
            for end in starts[first + 1 : stop + 1].tolist():
                blocks.add(end)
            if stop == self._layout.num_samples:
                blocks.close_block()
            yield from self._batch(first, stop, blocks.take(), np.diff(starts[first : stop + 1]))
        self._batcher.check()

    def batches_of_one_block(self, size_on_disk: int) -> Iterator[RowBatch]:
        """Yield the samples of a compressed shard, which is one block."""
        num_samples = self._layout.num_samples
        for first, stop in self._batch_bounds():
            blocks = [(0, size_on_disk, num_samples)] if stop == num_samples else []
            yield from self._batch(first, stop, blocks, None)
        self._batcher.check()

    def _batch_bounds(self) -> Iterator[tuple[int, int]]:
        """Yield the (first, stop) samples of every batch, until there are too many bad rows."""
        starts = self._layout.starts
        first = 0
        while first < self._layout.num_samples and not self._batcher.should_stop:
            # As many samples as fit into the bytes of a batch, at least one.
            fitting = int(np.searchsorted(starts, starts[first] + BATCH_BYTES, side="right")) - 1
            stop = min(max(fitting, first + 1), first + BATCH_ROWS, self._layout.num_samples)
            yield first, stop
            first = stop

    def _batch(
        self, first: int, stop: int, blocks: list[tuple[int, int, int]], lengths: NDArray[np.int64] | None
    ) -> Iterator[RowBatch]:
        """Yield one batch; nothing after a bad row."""
        self._check_sizes(first, stop)
        bounds = self._layout.starts[first : stop + 1].tolist()
        data = self._read(bounds[0], bounds[-1] - bounds[0])
        rows = [self._row(data[start - bounds[0] : end - bounds[0]]) for start, end in itertools.pairwise(bounds)]
        batch = self._batcher.batch(rows, BlockRanges.of(blocks), lengths)
        if batch:
            yield batch

    def _check_sizes(self, first: int, stop: int) -> None:
        sizes = np.diff(self._layout.starts[first : stop + 1])
        too_large = np.flatnonzero(sizes > self._spec.max_block_bytes)
        if len(too_large):
            raise DataError(
                f"{self._path}: sample {first + int(too_large[0])} has {int(sizes[too_large[0]])} bytes, more than "
                f"data.max_block_bytes={self._spec.max_block_bytes}.\n"
                "  Raise it, or exclude the shard with data.exclude."
            )

    def _row(self, data: bytes) -> MdsRow | BadRow:
        try:
            return self._decoder.decode(data)
        except ValueError as error:
            return BadRow(str(error))

    def _as_paths(self, row: MdsRow) -> MdsRow:
        return row | {name: row[name].ravel().tolist() for name in self._arrays}


def _covers(column: MdsColumn, path: str) -> bool:
    """Return True if a dotted path begins in this column."""
    return path == column.name or path.startswith(f"{column.name}.")


def _check_text(columns: Sequence[MdsColumn], text: str | None, path: Path) -> None:
    """Refuse a shard without a column of text for `data.text`.

    Raises:
        ShardLayoutError: there is no such column.
    """
    if text is None:
        return
    of_text = [column for column in columns if _covers(column, text)]
    if any(column.encoding in ("str", "json") for column in of_text):
        return
    if of_text:
        raise ShardLayoutError(
            f"{path}: data.text is {text!r}, a column of encoding {of_text[0].encoding}; texts are in columns of "
            "encoding str or json.\n"
            "  Set data.text to such a column, or data.text=null with mixture.unit=samples. Token ids can be packed "
            "from Megatron files only."
        )
    raise ShardLayoutError(
        f"{path} has no column {text!r}, which data.text names. Its columns are: "
        f"{', '.join(column.name for column in columns)}.\n"
        "  Set data.text, or exclude the shard with data.exclude."
    )


class _TextDecoder:
    """Decodes samples of one shard, or only their texts."""

    def __init__(self, columns: Sequence[MdsColumn], text: str | None, path: Path) -> None:
        self._path = path
        self._decoder = MdsSampleDecoder(columns)
        self._type = RowType(ScanSpec(text=text))
        self._names = {column.name for column in columns if _covers(column, text or "")}

    def texts(self, samples: Sequence[bytes]) -> list[str]:
        """Return the texts of some samples.

        Raises:
            DataError: they are not those that were indexed.
        """
        try:
            rows = [self._decoder.decode(data, self._names) for data in samples]
            return self._type.documents([msgspec.convert(row, self._type.struct) for row in rows])
        except (msgspec.ValidationError, ValueError) as error:
            raise shard_changed_error(self._path, None, f"{error}") from None

    def rows(self, samples: Sequence[bytes]) -> list[MdsRow]:
        """Return whole samples; errors as for `texts`."""
        try:
            return [self._decoder.decode(data) for data in samples]
        except ValueError as error:
            raise shard_changed_error(self._path, None, f"{error}") from None


class MdsReader:
    """Reads the samples of a plain shard with `pread`. Threads share nothing but the file descriptor."""

    def __init__(self, path: Path, text: str | None) -> None:
        self._shard = OpenShard(path)
        try:
            layout = read_mds_layout(_OnDisk(self._shard.fd), os.fstat(self._shard.fd).st_size, path)
            self._decoder = _TextDecoder(layout.columns, text, path)
        except BaseException:
            self._shard.close()
            raise

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named samples; see `ShardReader`."""
        return self.documents_at(*row_byte_ranges(block, lengths, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[MdsRow]:
        """Return the named samples as dicts; see `ShardReader`."""
        return self.payloads_at(*row_byte_ranges(block, lengths, rows))

    def documents_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[str]:
        """Return the texts of the samples at these byte ranges; see `RangeReader`."""
        return self._decoder.texts(self._samples(starts, lengths))

    def payloads_at(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[MdsRow]:
        """Return the samples at these byte ranges as dicts; see `RangeReader`."""
        return self._decoder.rows(self._samples(starts, lengths))

    def close(self) -> None:
        """Release the file descriptor."""
        self._shard.close()

    def _samples(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> list[bytes]:
        """Read samples; those near each other share a read."""
        stops = starts + lengths
        samples = []
        for first, last in itertools.pairwise(merge_nearby(starts, stops).tolist()):
            begin = int(starts[first])
            data = read_fully(self._shard.fd, int(stops[last - 1]) - begin, begin)
            bounds = zip((starts[first:last] - begin).tolist(), (stops[first:last] - begin).tolist(), strict=True)
            samples += [data[start:stop] for start, stop in bounds]
        return samples


@dataclass(frozen=True, slots=True)
class _DecodedShard:
    """A decompressed shard."""

    data: bytes
    starts: NDArray[np.int64]
    decoder: _TextDecoder


class CompressedMdsReader:
    """Decompresses the shard into the cache and takes samples out of it."""

    def __init__(self, path: Path, text: str | None, cache: BlockCache) -> None:
        self._path = path
        self._text = text
        self._cache = cache
        # Opened at once, so that a missing shard is noticed here.
        OpenShard(path).close()

    def documents(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[str]:
        """Return the texts of the named samples; see `ShardReader`."""
        shard = self._decoded_shard(block)
        return shard.decoder.texts(_take_samples(shard, rows))

    def payloads(self, block: BlockRef, lengths: NDArray[np.int64], rows: NDArray[np.int64]) -> list[MdsRow]:
        """Return the named samples as dicts; see `ShardReader`."""
        shard = self._decoded_shard(block)
        return shard.decoder.rows(_take_samples(shard, rows))

    def close(self) -> None:
        """Do nothing: the file is open only while it is read."""

    def _decoded_shard(self, block: BlockRef) -> _DecodedShard:
        return self._cache.get((str(self._path), self._text), lambda: self._load(block))

    def _load(self, block: BlockRef) -> tuple[_DecodedShard, int]:
        """Decompress the shard for the cache."""
        data = _decompress(self._path, self._cache.max_block_bytes)
        layout = read_mds_layout(_InMemory(data), len(data), self._path)
        if layout.num_samples != block.rows:
            problem = f"{block.rows} samples were expected, but it has {layout.num_samples}"
            raise shard_changed_error(self._path, block, problem)
        return _DecodedShard(data, layout.starts, _TextDecoder(layout.columns, self._text, self._path)), len(data)


def _take_samples(shard: _DecodedShard, rows: NDArray[np.int64]) -> list[bytes]:
    """Return the bytes of the named samples."""
    bounds = zip(shard.starts[rows].tolist(), shard.starts[rows + 1].tolist(), strict=True)
    return [shard.data[start:stop] for start, stop in bounds]
