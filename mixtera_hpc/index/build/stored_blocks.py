"""Read blocks of an existing index as scan results, for an index that is to be written.

A refresh reuses unchanged shards through this, and a derivation extends all blocks. Consecutive blocks are read
together, up to 524,288 rows at once.
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
"""Rows of blocks that are read together."""


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """The blocks [first, last) of an index."""

    index: PropertyIndex
    combos: list[Combo | None]
    """All combos of the index, by number."""
    first: int
    last: int

    def summary(self) -> ScanSummary:
        """Return the summary without reading samples: the maxima of their columns are those of the stored types."""
        blocks = self._blocks()
        cells = self._cells()
        rows = int(blocks["rows"].sum())
        good_rows = int(cells["rows"].sum())
        combos = [self.combos[number] for number in np.unique(cells["combo"]).tolist()]
        # Rows in no cell are bad rows.
        if good_rows < rows:
            combos.append(None)
        sizes, counts = np.unique(blocks["rows"], return_counts=True)
        return ScanSummary(
            combos=combos,
            rows=rows,
            bad_rows=rows - good_rows,
            blocks=len(blocks["rows"]),
            cells=len(cells["combo"]),
            block_rows=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
            maxima=self._maxima(blocks, cells),
        )

    def load(self) -> ScanResult:
        """Read the blocks with their samples."""
        if self.first == self.last:
            return self._no_blocks()
        blocks = self._blocks()
        cells = self._cells()
        first_sample = int(self.index.tables.blocks.first_sample[self.first])
        # One read over all blocks, including the padding between them.
        padded = self.index.samples.read(first_sample, self._padded_rows())
        position = self._row_positions(blocks["rows"])
        # Combos are renumbered to those that occur in these blocks, ascending.
        used, combo = np.unique(padded.combo[position], return_inverse=True)
        samples: dict[str, NDArray[np.int64]] = {"combo": combo}
        stored = self.index.samples.column_types()
        samples |= {name: getattr(padded, name)[position] for name in ("length", "tokens") if name in stored}
        return ScanResult(
            combos=[self.combos[number] for number in used.tolist()],
            blocks=blocks,
            cells=cells | {"combo": np.searchsorted(used, cells["combo"])},
            zones=self._zones(),
            samples=samples,
            numbers={name: values[position] for name, values in padded.numbers.items()},
        )

    def _no_blocks(self) -> ScanResult:
        none = np.zeros(0, np.int64)
        columns = [name for name in self.index.samples.column_types() if name != "combo"]
        numbers = self.index.tables.blocks.zones
        return ScanResult(
            combos=[],
            blocks=dict.fromkeys(("offset", "length", "rows", "count"), none),
            cells=dict.fromkeys(("combo", "rows", "tokens"), none),
            zones={name: dict.fromkeys(("low", "high", "has_null"), np.zeros(0)) for name in numbers},
            samples=dict.fromkeys(["combo", *columns], none),
            numbers={name: np.zeros(0) for name in numbers},
        )

    def _maxima(self, blocks: dict[str, NDArray[np.int64]], cells: dict[str, NDArray[np.int64]]) -> dict[str, int]:
        maxima = {f"blocks/{name}": int(values.max(initial=0)) for name, values in blocks.items()}
        maxima |= {f"cells/{name}": int(values.max(initial=0)) for name, values in cells.items()}
        types = self.index.samples.column_types()
        # The type is known without reading, its largest value is an upper bound.
        maxima |= {f"samples/{name}": int(np.iinfo(dtype).max) for name, dtype in types.items() if name != "combo"}
        return maxima | {"samples/combo": 0}  # The type of combo numbers depends on all combos, not on these.

    def _blocks(self) -> dict[str, NDArray[np.int64]]:
        blocks = self.index.tables.blocks
        own = slice(self.first, self.last)
        columns = {name: getattr(blocks, name)[own].astype(np.int64) for name in ("offset", "length", "rows")}
        return columns | {"count": np.diff(self.index.tables.histogram.indptr[self.first : self.last + 1])}

    def _cells(self) -> dict[str, NDArray[np.int64]]:
        histogram = self.index.tables.histogram
        own = slice(int(histogram.indptr[self.first]), int(histogram.indptr[self.last]))
        return {name: getattr(histogram, name)[own].astype(np.int64) for name in ("combo", "rows", "tokens")}

    def _zones(self) -> dict[str, dict[str, NDArray[Any]]]:
        own = slice(self.first, self.last)
        return {
            number: {
                "low": zones.low[own],
                "high": zones.high[own],
                "has_null": zones.has_null[own].astype(np.float64),
            }
            for number, zones in self.index.tables.blocks.zones.items()
        }

    def _padded_rows(self) -> int:
        """Return the entries of a sample column from the first row of the first block to the last of the last block."""
        blocks = self.index.tables.blocks
        begin = int(blocks.first_sample[self.first])
        end = int(blocks.first_sample[self.last - 1]) + int(blocks.rows[self.last - 1])
        return end - begin

    def _row_positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of each row among the padded entries."""
        starts = first_samples(rows, self.index.chunk_rows)[:-1]
        rows_before = np.cumsum(rows) - rows
        return np.repeat(starts - rows_before, rows) + np.arange(int(rows.sum()))


def combo_values(combos: ComboTable) -> list[Combo | None]:
    """Return the values of every combo, by number; None for the combo of bad rows."""
    names = list(combos.properties)
    values = [tuple(combos.values(name, number) for name in names) for number in range(combos.num_combos)]
    return [None if number == combos.bad else combo for number, combo in enumerate(values)]


def block_ranges(index: PropertyIndex, blocks: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut the given blocks, ascending, into ranges [first, last) of neighbours.

    A range has at most `MAX_ROWS` rows, or it is a single block.
    """
    # Reading block by block would cost a call to HDF5 for each column of each block.
    rows_of_block = index.tables.blocks.rows
    numbers = blocks.tolist()
    start = 0
    rows = 0
    for i, block in enumerate(numbers):
        has_gap = i > start and block != numbers[i - 1] + 1
        is_full = i > start and rows + int(rows_of_block[block]) > MAX_ROWS
        if has_gap or is_full:
            yield numbers[start], numbers[i - 1] + 1
            start = i
            rows = 0
        rows += int(rows_of_block[block])
    if numbers:
        yield numbers[start], numbers[-1] + 1
