"""An index file, opened: its tables at once, its samples block by block when they are asked for.

Only the process that plans reads tables; every other rank has a `SampleReader`, which touches the file when the first block
is read and no sooner. Files are opened without locks. Opening costs O(blocks), a block some 20 µs.
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.tables import BlockTable, Histogram, IndexTables, SampleColumns, ShardTable, Zones
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.discover import escapes
from mixtera_hpc.index.generation import tables_at
from mixtera_hpc.index.kept import KeptParts
from mixtera_hpc.index.layout import (
    FORMAT,
    VERSION,
    BadRows,
    Generation,
    children,
    first_rows,
    first_samples,
    get_text,
    read_column,
    read_texts,
    with_zero,
)
from mixtera_hpc.index.parts import building_folder

__all__ = ["PropertyIndex", "SampleReader", "open_index"]

_DAMAGE = (OSError, KeyError, ValueError, TypeError, RuntimeError, UnicodeDecodeError)
"""What h5py raises on a file that is not what it should be."""


class SampleReader:
    """Reads per-sample columns; may be used by several threads at once, which then wait for each other."""

    def __init__(self, path: str | Path, fingerprint: str | None = None, keep_bytes: int = 0) -> None:
        """
        Args:
            fingerprint: the state of an index that the file must hold.
            keep_bytes: so much of what was read lately is kept.
        """
        self.path = Path(path)
        self._kept = KeptParts(keep_bytes)
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._columns: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}
        self.bytes_read = 0
        """Of columns, decompressed, as wide as they are stored."""

    def read(self, first_sample: int, rows: int) -> SampleColumns:
        """The samples of one block, from `BlockTable.first_sample` and `BlockTable.rows`.

        Raises:
            PropertyIndexError: the file is missing or damaged.
        """
        return self.read_many([first_sample], [rows])

    def read_many(
        self, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None = None
    ) -> SampleColumns:
        """The samples of several blocks, one after the other.

        Args:
            only: the columns that are looked at, numbers as `numbers/NAME`; others are zero. None reads them all.
        """
        spans = [(int(a), int(a) + int(n)) for a, n in zip(first_samples, rows, strict=True)]
        with self._lock:
            try:
                self._open()
                return self._read(spans, only)
            except _DAMAGE as error:
                raise _damaged(self.path, error) from None

    def column_types(self) -> dict[str, np.dtype[Any]]:
        """The integer columns that are stored, and as what."""
        with self._lock:
            try:
                self._open()
                return {name: column.dtype for name, column in self._columns.items()}
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
            self._check_state(self._file)
            self._columns = children(self._file["samples"])
            self._numbers = children(self._columns.pop("numbers"))

    def _check_state(self, file: h5py.File) -> None:
        """Refuse a file that took the place of the one whose tables are being read along."""
        if self._fingerprint in (None, *read_texts(file["generations"], "fingerprint")):
            return
        raise PropertyIndexError(
            f"{self.path} is another index than the one this began with: it was built again, derived, or refreshed after "
            "shards were changed or deleted.\n  Put the old file back to go on, or start a new run."
        )

    def _read(self, spans: Sequence[tuple[int, int]], only: Collection[str] | None) -> SampleColumns:
        rows, together = sum(b - a for a, b in spans), spans if self._kept.max_bytes else _neighbours_joined(spans)

        def column(name: str, stored: Any, dtype: Any) -> NDArray[Any]:
            if stored is None or not spans or (only is not None and name not in only):
                return np.zeros(rows, dtype)
            found = [self._kept.get((name, a, b), partial(self._from_file, stored, a, b)) for a, b in together]
            return (found[0] if len(found) == 1 else np.concatenate(found)).astype(dtype, copy=False)

        return SampleColumns(
            combo=column("combo", self._columns.get("combo"), np.int32),
            length=column("length", self._columns.get("length"), np.int64),
            tokens=column("tokens", self._columns.get("tokens"), np.int64),
            numbers={n: column(f"numbers/{n}", stored, np.float64) for n, stored in self._numbers.items()},
        )

    def _from_file(self, stored: Any, start: int, stop: int) -> NDArray[Any]:
        part: NDArray[Any] = stored[start:stop]
        self.bytes_read += part.nbytes
        return part


def _neighbours_joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Fewer, longer spans that cover the same."""
    found: list[tuple[int, int]] = []
    for a, b in spans:
        if found and found[-1][1] == a:
            a = found.pop()[0]
        found.append((a, b))
    return found


Roots = str | Mapping[str, str] | None
"""Where the shards lie now: a folder, or one for each data set; None: where they lay at the build."""


class PropertyIndex:
    """An open index. Closing it leaves the tables usable."""

    def __init__(self, path: Path, file: h5py.File, data_root: Roots) -> None:
        self.path = path
        self.roots = _roots(file["roots"], data_root, path)
        """Data set → folder; a single root is called ''."""
        self.tables = _tables(file, tuple(self.roots))
        self.fingerprint = get_text(file, "fingerprint")
        """Hex digest of all content; neither the data root nor times of change are in it."""
        self.tokenizer_fingerprint = get_text(file, "tokenizer") or None
        self.parser = get_text(file, "parser") or None
        self.sources = {name: get_text(group, "source") for name, group in children(file["properties"]).items()}
        """Property → where its values come from."""
        self.chunk_rows = int(file.attrs["chunk_rows"])
        self.bad = _bad(file["bad"])
        self.generations = _generations(file["generations"])
        """States that the index begins with, oldest first; the last is the whole."""
        self.text = get_text(file, "text") or None
        """Dotted path to the document; None when samples have none."""
        self.samples = SampleReader(path)

    @property
    def data_root(self) -> Path:
        """The folder of all shards; with several, the file system's root, since `shard_paths` are absolute then."""
        return self.roots.get("", Path("/"))

    def shard_paths(self) -> list[str]:
        """What every shard is called: its path below `data_root`."""
        shards = self.tables.shards
        if "" in self.roots:
            return list(shards.path)
        pairs = zip(shards.dataset, shards.path, strict=True)
        return [str(self.roots[dataset].absolute() / path) for dataset, path in pairs]

    def go_back(self, fingerprint: str) -> None:
        """See what there was before the last refreshes; nothing to do when that is what there is.

        Raises:
            PropertyIndexError: the index does not begin with a state of that fingerprint.
        """
        if fingerprint and self.fingerprint.startswith(fingerprint):
            return
        found = next((g for g in self.generations if fingerprint and g.fingerprint.startswith(fingerprint)), None)
        if found is None:
            known = ", ".join(
                dict.fromkeys(f[:12] for f in (*(g.fingerprint for g in self.generations), self.fingerprint))
            )
            raise PropertyIndexError(
                f"{self.path} does not begin with a state {fingerprint[:12]!r}; it has {known}.\n  Shards of that state were "
                "changed or deleted, or the index was built again: start a new run, or put the old file back."
            )
        self.tables, self.fingerprint = tables_at(self.tables, found), found.fingerprint

    def read_block(self, block: int) -> SampleColumns:
        """The samples of one block."""
        blocks = self.tables.blocks
        return self.samples.read(int(blocks.first_sample[block]), int(blocks.rows[block]))

    def read_blocks(self, chosen: NDArray[np.int32], only: Collection[str] | None = None) -> SampleColumns:
        """The samples of some blocks, one block after the other; `only` as for `SampleReader.read_many`."""
        blocks = self.tables.blocks
        return self.samples.read_many(blocks.first_sample[chosen].tolist(), blocks.rows[chosen].tolist(), only)

    def close(self) -> None:
        """Close the file."""
        self.samples.close()

    def __enter__(self) -> "PropertyIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_index(path: str | Path, data_root: Roots = None, generation: str | None = None) -> PropertyIndex:
    """Open an index and load its tables.

    Args:
        data_root: where the shards lie now, when not where they lay at the build: a folder, or one for each data set.
        generation: the beginning of the fingerprint of an earlier state, which is then all that is seen.

    Raises:
        PropertyIndexError: there is none, it is damaged or cut short, or of another version.
    """
    path = Path(path)
    with _open_file(path) as file:
        try:
            index = PropertyIndex(path, file, data_root)
        except _DAMAGE as error:
            raise _damaged(path, error) from None
    if generation is not None:
        index.go_back(generation)
    return index


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


def _roots(group: h5py.Group, given: Roots, path: Path) -> dict[str, Path]:
    stored = dict(zip(read_texts(group, "dataset"), read_texts(group, "path"), strict=True))
    if not given:
        return {name: Path(root) for name, root in stored.items()}
    roots = {"": given} if isinstance(given, str) else dict(given)
    if roots.keys() != stored.keys():
        have, want = (", ".join(sorted(names)) or "none" for names in (set(stored) - {""}, set(roots) - {""}))
        raise PropertyIndexError(
            f"{path} was built from the data sets {have}, but data.roots names {want}.\n"
            "  Give every one of them its folder in data.roots (a single unnamed one in data.root), or build again."
        )
    return {name: Path(roots[name]) for name in stored}


def _bad(group: h5py.Group) -> tuple[BadRows, ...]:
    columns = zip(group["shard"][...].tolist(), read_texts(group, "reason"), group["rows"][...].tolist(), strict=True)
    return tuple(BadRows(shard=shard, reason=reason, rows=rows) for shard, reason, rows in columns)


def _generations(group: h5py.Group) -> tuple[Generation, ...]:
    names = ("shards", "blocks", "cells", "combos", "samples")
    columns = zip(read_texts(group, "fingerprint"), *(group[name][...].tolist() for name in names), strict=True)
    return tuple(Generation(**dict(zip(("fingerprint", *names), row, strict=True))) for row in columns)


def _tables(file: h5py.File, datasets: tuple[str, ...]) -> IndexTables:
    properties = {name: _property(name, group) for name, group in sorted(children(file["properties"]).items())}
    numbers = [name for name, prop in properties.items() if prop.kind is Kind.NUMBER]
    histogram = _histogram(file["histogram"])
    blocks = _blocks(file, int(file.attrs["chunk_rows"]), numbers)
    num_samples, num_bad = int(file.attrs["num_samples"]), int(read_column(file["bad"], "rows", np.int64).sum())
    if int(blocks.rows.sum(dtype=np.int64)) != num_samples + num_bad:
        raise ValueError("blocks and samples do not add up")
    return IndexTables(
        properties=properties,
        combos=_combos(file, properties),
        shards=_shards(file["shards"], datasets),
        blocks=blocks,
        histogram=histogram,
        num_samples=num_samples,
        has_tokens=bool(get_text(file, "tokenizer")),
    )


def _property(name: str, group: h5py.Group) -> Property:
    return Property(name=name, kind=Kind(get_text(group, "kind")), values=read_texts(group, "values"))


def _shards(group: h5py.Group, datasets: tuple[str, ...]) -> ShardTable:
    paths = read_texts(group, "path")
    if (outside := next((path for path in paths if escapes(path)), None)) is not None:
        raise ValueError(f"shard {outside!r} is outside the data root")
    return ShardTable(
        path=paths,
        dataset=() if datasets == ("",) else tuple(datasets[i] for i in group["dataset"][...]),
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
        bad=int(file["combos"].attrs["bad"]),
    )


def _histogram(group: h5py.Group) -> Histogram:
    return Histogram(
        indptr=with_zero(np.cumsum(read_column(group, "count", np.int64))),
        combo=group["combo"][...],
        rows=group["rows"][...],
        tokens=group["tokens"][...],
    )


def _blocks(file: h5py.File, chunk_rows: int, numbers: Sequence[str]) -> BlockTable:
    group = file["blocks"]
    shard, rows = read_column(group, "shard", np.int32), read_column(group, "rows", np.int32)
    return BlockTable(
        shard=shard,
        first_row=first_rows(shard, rows),
        rows=rows,
        offset=read_column(group, "offset", np.int64),
        length=read_column(group, "length", np.int64),
        first_sample=first_samples(rows, chunk_rows)[:-1],
        zones={name: _zones(file["zones"][name]) for name in numbers},
    )


def _zones(group: h5py.Group) -> Zones:
    low, high = read_column(group, "low", np.float64), read_column(group, "high", np.float64)
    return Zones(low=low, high=high, has_null=read_column(group, "has_null", np.bool_))
