"""An index file, opened: its tables at once, its samples block by block when they are asked for.

Only the process that plans reads tables; every other rank has a `SampleReader`, which touches the file when the first block
is read and no sooner. Files are opened without locks. Opening costs O(blocks), a block some 20 µs.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.tables import BlockTable, Histogram, IndexTables, SampleColumns, ShardTable, Zones
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import (
    FORMAT,
    VERSION,
    children,
    first_rows,
    first_samples,
    get_text,
    read_column,
    read_texts,
    tokens_of_blocks,
    with_zero,
)
from mixtera_hpc.index.parts import building_folder

__all__ = ["PropertyIndex", "SampleReader", "open_index"]

_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, UnicodeDecodeError)
"""What h5py raises on a file that is not what it should be."""


class SampleReader:
    """Reads per-sample columns; may be used by several threads at once, which then wait for each other."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._columns: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}

    def read(self, first_sample: int, rows: int) -> SampleColumns:
        """The samples of one block, from `BlockTable.first_sample` and `BlockTable.rows`.

        Raises:
            PropertyIndexError: the file is missing or damaged.
        """
        return self.read_many([first_sample], [rows])

    def read_many(self, first_samples: Sequence[int], rows: Sequence[int]) -> SampleColumns:
        """The samples of several blocks, one after the other."""
        spans = [(int(a), int(a) + int(n)) for a, n in zip(first_samples, rows, strict=True)]
        with self._lock:
            try:
                self._open()
                return self._read(spans)
            except _DAMAGE as error:
                raise _damaged(self.path, error) from None

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None

    def _open(self) -> None:
        if self._file is None:
            self._file = _open_file(self.path)
            self._columns = children(self._file["samples"])
            self._numbers = children(self._columns.pop("numbers"))

    def _read(self, spans: Sequence[tuple[int, int]]) -> SampleColumns:
        rows = sum(b - a for a, b in spans)

        def column(source: Mapping[str, Any], name: str, dtype: Any) -> NDArray[Any]:
            if name not in source or not spans:
                return np.zeros(rows, dtype)
            found = [source[name][a:b] for a, b in spans]
            return (found[0] if len(found) == 1 else np.concatenate(found)).astype(dtype, copy=False)

        return SampleColumns(
            combo=column(self._columns, "combo", np.int32),
            length=column(self._columns, "length", np.int64),
            tokens=column(self._columns, "tokens", np.int64),
            numbers={name: column(self._numbers, name, np.float64) for name in self._numbers},
        )


class PropertyIndex:
    """An open index. Closing it leaves the tables usable."""

    def __init__(self, path: Path, file: h5py.File, data_root: str | None) -> None:
        self.path = path
        self.tables = _tables(file)
        self.fingerprint = get_text(file, "fingerprint")
        """Hex digest of all content; neither the data root nor times of change are in it."""
        self.tokenizer_fingerprint = get_text(file, "tokenizer") or None
        self.data_root = Path(get_text(file, "data_root") if data_root is None else data_root)
        self.text = get_text(file, "text") or None
        """Dotted path to the document; None when samples have none."""
        self.samples = SampleReader(path)

    def read_block(self, block: int) -> SampleColumns:
        """The samples of one block."""
        blocks = self.tables.blocks
        return self.samples.read(int(blocks.first_sample[block]), int(blocks.rows[block]))

    def close(self) -> None:
        """Close the file."""
        self.samples.close()

    def __enter__(self) -> "PropertyIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_index(path: str | Path, data_root: str | None = None) -> PropertyIndex:
    """Open an index and load its tables.

    Args:
        data_root: where the shards lie now, when not where they lay at the build.

    Raises:
        PropertyIndexError: there is none, it is damaged or cut short, or of another version.
    """
    path = Path(path)
    with _open_file(path) as file:
        try:
            return PropertyIndex(path, file, data_root)
        except _DAMAGE as error:
            raise _damaged(path, error) from None


def _open_file(path: Path) -> h5py.File:
    if not path.is_file():
        raise _missing(path)
    try:
        file = h5py.File(path, "r", locking=False)
        found, version = _format_of(file), file.attrs.get("version")
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    if found != FORMAT or version != VERSION:
        file.close()
        what = "is not a property index" if found != FORMAT else f"is of version {version}, this is version {VERSION}"
        raise PropertyIndexError(f"{path} {what}.\n  Build it with mixtera-hpc index build.")
    return file


def _format_of(file: h5py.File) -> str | None:
    """What the file says it is; None when another program wrote it."""
    return get_text(file, "format") if "format" in file.attrs else None


def _missing(path: Path) -> PropertyIndexError:
    if building_folder(path).is_dir():
        return PropertyIndexError(
            f"There is no property index at {path} yet: it is being built, or a build was interrupted.\n"
            "  Wait for it, or run mixtera-hpc index build again: it goes on where it stopped."
        )
    return PropertyIndexError(
        f"There is no property index at {path}.\n  Build it with mixtera-hpc index build, or set index.path."
    )


def _damaged(path: Path, error: Exception) -> PropertyIndexError:
    return PropertyIndexError(
        f"{path} is damaged or cut short: {str(error).splitlines()[0] if str(error) else type(error).__name__}.\n"
        "  Copy it again, or build it again with mixtera-hpc index build."
    )


def _tables(file: h5py.File) -> IndexTables:
    properties = {name: _property(name, group) for name, group in sorted(children(file["properties"]).items())}
    numbers = [name for name, prop in properties.items() if prop.kind is Kind.NUMBER]
    histogram = _histogram(file["histogram"])
    blocks = _blocks(file, histogram, int(file.attrs["chunk_rows"]), numbers)
    num_samples = int(file.attrs["num_samples"])
    if int(blocks.rows.sum()) != num_samples:
        raise ValueError("blocks and samples do not add up")
    return IndexTables(
        properties=properties,
        combos=_combos(file, properties),
        shards=_shards(file["shards"]),
        blocks=blocks,
        histogram=histogram,
        num_samples=num_samples,
        has_tokens=bool(get_text(file, "tokenizer")),
    )


def _property(name: str, group: h5py.Group) -> Property:
    return Property(name=name, kind=Kind(get_text(group, "kind")), values=read_texts(group, "values"))


def _shards(group: h5py.Group) -> ShardTable:
    return ShardTable(
        path=read_texts(group, "path"),
        format=read_texts(group, "format"),
        rows=read_column(group, "rows", np.int64),
        size_bytes=read_column(group, "size_bytes", np.int64),
        mtime_ns=read_column(group, "mtime_ns", np.int64),
        fingerprint=tuple(row.tobytes().hex() for row in group["fingerprint"][...]),
    )


def _combos(file: h5py.File, properties: Mapping[str, Property]) -> ComboTable:
    categorical = {name: p for name, p in properties.items() if p.kind is not Kind.NUMBER}
    groups = {name: file["combos"][name] for name in categorical}
    counts = {name: read_column(group, "count", np.int64) for name, group in groups.items()}
    return ComboTable(
        num_combos=int(file["combos"].attrs["num_combos"]),
        properties=categorical,
        indptr={name: with_zero(np.cumsum(count)) for name, count in counts.items()},
        codes={name: read_column(group, "code", np.int32) for name, group in groups.items()},
    )


def _histogram(group: h5py.Group) -> Histogram:
    return Histogram(
        indptr=with_zero(np.cumsum(read_column(group, "count", np.int64))),
        combo=read_column(group, "combo", np.int32),
        rows=read_column(group, "rows", np.int32),
        tokens=read_column(group, "tokens", np.int64),
    )


def _blocks(file: h5py.File, histogram: Histogram, chunk_rows: int, numbers: Sequence[str]) -> BlockTable:
    group = file["blocks"]
    shard, rows = read_column(group, "shard", np.int32), read_column(group, "rows", np.int32)
    return BlockTable(
        shard=shard,
        first_row=first_rows(shard, rows),
        rows=rows,
        offset=read_column(group, "offset", np.int64),
        length=read_column(group, "length", np.int64),
        tokens=tokens_of_blocks(histogram),
        first_sample=first_samples(rows, chunk_rows)[:-1],
        zones={name: _zones(file["zones"][name]) for name in numbers},
    )


def _zones(group: h5py.Group) -> Zones:
    low, high = read_column(group, "low", np.float64), read_column(group, "high", np.float64)
    return Zones(low=low, high=high, has_null=read_column(group, "has_null", np.bool_))
