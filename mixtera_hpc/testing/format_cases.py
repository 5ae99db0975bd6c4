"""Inputs of the checks of formats: a format and its writer, sample rows, and how shards are scanned and read.

Kept apart from the checks, because tests of single formats and benchmarks use it too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.properties import Kind
from mixtera_hpc.formats.base import BlockRef, Format, PropertyField, RowBatch, ScanSpec, Vocabulary

__all__ = ["BLOCK_ROWS", "FormatCase", "Row", "read_blocks", "sample_rows", "scan_whole_shard"]

Row = dict[str, Any]
BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCase:
    """A format, and how rows are written in it."""

    format: Format
    write: Callable[[Path, Sequence[Row]], list[Path]]
    """Writes rows into a folder and returns the shards: one for all rows, or one for each. A row whose text is None
    must be unreadable."""
    text: str | None = "text"
    """The value of `data.text` for this format."""
    below: str = ""
    """Prefix of the paths of properties, for example `json.`."""
    has_properties: bool = True
    """Rows can have properties."""
    payload: Callable[[int, Row], Any] = lambda _, row: row
    """(position in the shard, row) → the payload that a trainer gets with `mixture.unit=samples`."""
    encode: Callable[[str], Any] | None = None
    """For formats that hold token ids: text → ids below 256."""
    texts_may_be_empty: bool = True

    @property
    def spec(self) -> ScanSpec:
        """Values that the checks ask of rows."""
        properties = (
            PropertyField(name="language", path=f"{self.below}meta.language", kind=Kind.CATEGORY),
            PropertyField(name="quality", path=f"{self.below}meta.quality", kind=Kind.NUMBER),
            PropertyField(name="tags", path=f"{self.below}tags", kind=Kind.CATEGORIES),
        )
        return ScanSpec(
            text=self.text,
            properties=properties if self.has_properties else (),
            documents=True,
            vocabulary=Vocabulary(size=256, eos_id=None),
        )

    def rows(self, num_rows: int) -> list[Row]:
        """Return `sample_rows` that the format can hold."""
        rows = sample_rows(num_rows)
        if self.texts_may_be_empty:
            return rows
        return [row | {"text": row["text"] or "-"} for row in rows]

    def document(self, row: Row) -> Any:
        """Return what a reader returns for a row."""
        return list(self.encode(row["text"])) if self.encode else row["text"]


def sample_rows(num_rows: int, seed: int = 0) -> list[Row]:
    """Return rows with nested, missing, null and multi-valued properties, and texts of any length in many scripts."""
    rng = np.random.Generator(np.random.Philox(seed))
    letters = list('abc é€漢字🙂\n\t"\\ ،0')
    rows: list[Row] = []
    for i in range(num_rows):
        repeats = 50 if i % 97 == 5 else 1
        text = "".join(rng.choice(letters, int(rng.integers(0, 200)))) * repeats
        language = [None, "en", "de", "zh,tw;x"][int(rng.integers(4))]
        tags = [["a", "b", "ü"][tag] for tag in np.flatnonzero(rng.random(3) < 0.4)]
        quality = None if i % 11 == 3 else float(rng.random())
        rows.append({"text": text, "meta": {"language": language, "quality": quality}, "tags": tags})
    return rows


def scan_whole_shard(fmt: Format, path: Path, spec: ScanSpec) -> list[RowBatch]:
    """Return all batches of all units of a shard, in order."""
    units = fmt.units(path, path.stat().st_size)
    return [batch for unit in units for batch in fmt.scan(path, unit, spec, BLOCK_ROWS)]


def read_blocks(batches: Sequence[RowBatch]) -> list[tuple[BlockRef, NDArray[np.int64]]]:
    """Return every block of a shard with the lengths of its rows (zeros if rows have no byte range)."""
    per_batch = [np.zeros(batch.rows, np.int64) if batch.lengths is None else batch.lengths for batch in batches]
    lengths = np.concatenate([np.zeros(0, np.int64), *per_batch])
    blocks = []
    first_row = 0
    for batch in batches:
        for offset, length, rows in zip(batch.blocks.offset, batch.blocks.length, batch.blocks.rows, strict=True):
            block = BlockRef(offset=int(offset), length=int(length), first_row=first_row, rows=int(rows))
            blocks.append((block, lengths[first_row : first_row + block.rows]))
            first_row += block.rows
    return blocks
