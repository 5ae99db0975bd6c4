"""Blocks of an index that exists, as pieces of one to be written.

A piece is as many consecutive blocks as fit into some hundred thousand rows; its samples are read at once. What refreshing
takes over, and what deriving adds to, comes through here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import ComboTable
from mixtera_hpc.index.layout import first_samples
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, ScanSummary

__all__ = ["StoredBlocks", "block_ranges", "combo_values"]

MAX_ROWS = 1 << 19


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """The blocks [first, last) of an index."""

    index: PropertyIndex
    combos: list[Combo | None]
    """Of the whole index, by number."""
    first: int
    last: int

    def summary(self) -> ScanSummary:
        """What there is in them; samples are not looked at, their types stay as wide as they are."""
        blocks, cells = self._blocks(), self._cells()
        rows, good = int(blocks["rows"].sum()), int(cells["rows"].sum())
        used = [self.combos[code] for code in np.unique(cells["combo"]).tolist()]
        sizes, counts = np.unique(blocks["rows"], return_counts=True)
        maxima = {f"blocks/{name}": int(values.max(initial=0)) for name, values in blocks.items()}
        maxima |= {f"cells/{name}": int(values.max(initial=0)) for name, values in cells.items()}
        types = self.index.samples.column_types()
        maxima |= {f"samples/{name}": int(np.iinfo(t).max) for name, t in types.items() if name != "combo"}
        return ScanSummary(
            combos=used if rows == good else [*used, None],
            rows=rows,
            bad_rows=rows - good,
            blocks=len(blocks["rows"]),
            cells=len(cells["combo"]),
            block_rows=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
            maxima=maxima | {"samples/combo": 0},
        )

    def load(self) -> ScanResult:
        """Everything, samples included."""
        blocks, cells = self._blocks(), self._cells()
        found = self.index.samples.read(int(self.index.tables.blocks.first_sample[self.first]), self._padded_rows())
        place = self._places(blocks["rows"])
        used, combo = np.unique(found.combo[place], return_inverse=True)
        stored = self.index.samples.column_types()
        samples: dict[str, NDArray[np.int64]] = {"combo": combo}
        samples |= {name: getattr(found, name)[place] for name in ("length", "tokens") if name in stored}
        return ScanResult(
            combos=[self.combos[code] for code in used.tolist()],
            blocks=blocks,
            cells=cells | {"combo": np.searchsorted(used, cells["combo"])},
            zones=self._zones(),
            samples=samples,
            numbers={name: values[place] for name, values in found.numbers.items()},
        )

    def _blocks(self) -> dict[str, NDArray[np.int64]]:
        blocks, part = self.index.tables.blocks, slice(self.first, self.last)
        found = {name: getattr(blocks, name)[part].astype(np.int64) for name in ("offset", "length", "rows")}
        return found | {"count": np.diff(self.index.tables.histogram.indptr[self.first : self.last + 1])}

    def _cells(self) -> dict[str, NDArray[np.int64]]:
        histogram = self.index.tables.histogram
        part = slice(int(histogram.indptr[self.first]), int(histogram.indptr[self.last]))
        return {name: getattr(histogram, name)[part].astype(np.int64) for name in ("combo", "rows", "tokens")}

    def _zones(self) -> dict[str, dict[str, NDArray[Any]]]:
        part = slice(self.first, self.last)
        return {
            number: {
                "low": zones.low[part],
                "high": zones.high[part],
                "has_null": zones.has_null[part].astype(np.float64),
            }
            for number, zones in self.index.tables.blocks.zones.items()
        }

    def _padded_rows(self) -> int:
        """Entries of the sample columns from the first row of the first block to the last of the last."""
        blocks = self.index.tables.blocks
        begin, end = (int(blocks.first_sample[block]) for block in (self.first, self.last - 1))
        return end - begin + int(blocks.rows[self.last - 1])

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the rows lie among those entries."""
        starts = first_samples(rows, self.index.chunk_rows)[:-1]
        return np.repeat(starts - (np.cumsum(rows) - rows), rows) + np.arange(int(rows.sum()))


def combo_values(combos: ComboTable) -> list[Combo | None]:
    """The values of every combo, None for the one of bad rows."""
    names = list(combos.properties)
    found = (tuple(combos.values(name, number) for name in names) for number in range(combos.num_combos))
    return [None if number == combos.bad else combo for number, combo in enumerate(found)]


def block_ranges(index: PropertyIndex, blocks: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The given blocks, ascending, as ranges of neighbours with at most some hundred thousand rows each (or one block)."""
    rows = index.tables.blocks.rows
    start, held = 0, 0
    for i, block in enumerate(blocks.tolist()):
        if i > start and (block != int(blocks[i - 1]) + 1 or held + int(rows[block]) > MAX_ROWS):
            yield int(blocks[start]), int(blocks[i - 1]) + 1
            start, held = i, 0
        held += int(rows[block])
    if len(blocks):
        yield int(blocks[start]), int(blocks[-1]) + 1
