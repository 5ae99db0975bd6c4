"""Index tables built directly from samples, without files and without an index."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable, Histogram, IndexTables, SampleColumns, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Kind, Property

__all__ = ["Sample", "make_block_reader", "make_index_tables"]

ROW_BYTES = 10
"""Length of every row in the fabricated shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row of a fabricated shard."""

    categories: Mapping[str, frozenset[str]]
    """Property → its values; an empty set is null."""
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    """Property → its number; None is null."""
    tokens: int = 1
    """Number of tokens."""


Combo = tuple[tuple[str, ...], ...]
"""A combination of categorical values: per property in ascending order of names, its sorted values."""


def make_index_tables(
    blocks: Sequence[Sequence[Sample]], kinds: Mapping[str, Kind]
) -> tuple[IndexTables, Callable[[int], SampleColumns]]:
    """Build the tables of an index over one shard.

    Args:
        blocks: the samples of every block.
        kinds: the kind of every property.

    Returns:
        The tables, and a function that reads the columns of one block.
    """
    samples = [sample for block in blocks for sample in block]
    category_names = sorted(name for name, kind in kinds.items() if kind is not Kind.NUMBER)
    number_names = sorted(name for name, kind in kinds.items() if kind is Kind.NUMBER)
    combos = sorted({_combo_of(sample, category_names) for sample in samples})
    properties = {name: _property(name, kinds[name], samples) for name in sorted(kinds)}
    columns = [_columns(block, category_names, number_names, combos) for block in blocks]
    tables = IndexTables(
        properties=properties,
        combos=_combo_table(combos, category_names, properties),
        shards=_one_shard(len(samples)),
        blocks=_block_table(columns),
        histogram=_histogram(columns),
        num_samples=len(samples),
        has_tokens=True,
    )
    return tables, columns.__getitem__


def make_block_reader(read_block: Callable[[int], SampleColumns]) -> Callable[[NDArray[np.int32]], SampleColumns]:
    """Return a function that reads several blocks at once, given one that reads a single block."""

    def read(blocks: NDArray[np.int32]) -> SampleColumns:
        columns = [read_block(block) for block in blocks.tolist()]
        return SampleColumns(
            combo=np.concatenate([block.combo for block in columns]),
            length=np.concatenate([block.length for block in columns]),
            tokens=np.concatenate([block.tokens for block in columns]),
            numbers={name: np.concatenate([block.numbers[name] for block in columns]) for name in columns[0].numbers},
        )

    return read


def _property(name: str, kind: Kind, samples: Sequence[Sample]) -> Property:
    if kind is Kind.NUMBER:
        return Property(name=name, kind=kind)
    values = {value for sample in samples for value in sample.categories[name]}
    return Property(name=name, kind=kind, values=tuple(sorted(values)))


def _combo_of(sample: Sample, names: Sequence[str]) -> Combo:
    return tuple(tuple(sorted(sample.categories[name])) for name in names)


def _columns(
    block: Sequence[Sample], category_names: Sequence[str], number_names: Sequence[str], combos: Sequence[Combo]
) -> SampleColumns:
    return SampleColumns(
        combo=np.array([combos.index(_combo_of(sample, category_names)) for sample in block], np.int32),
        length=np.full(len(block), ROW_BYTES, np.int64),
        tokens=np.array([sample.tokens for sample in block], np.int64),
        numbers={name: np.array([sample.numbers[name] for sample in block], np.float64) for name in number_names},
    )


def _combo_table(combos: Sequence[Combo], names: Sequence[str], properties: Mapping[str, Property]) -> ComboTable:
    # Property → per combo, the codes of its values (positions in Property.values).
    codes = {
        name: [[properties[name].values.index(value) for value in combo[i]] for combo in combos]
        for i, name in enumerate(names)
    }
    return ComboTable(
        num_combos=len(combos),
        properties={name: properties[name] for name in names},
        indptr={name: _index_pointers([len(combo) for combo in codes[name]]) for name in names},
        codes={name: np.array([code for combo in codes[name] for code in combo], np.int32) for name in names},
    )


def _one_shard(rows: int) -> ShardTable:
    return ShardTable(
        path=("shard.jsonl",),
        format=("jsonl",),
        rows=np.array([rows]),
        size_bytes=np.array([ROW_BYTES * rows]),
        mtime_ns=np.array([0]),
        fingerprint=("00",),
    )


def _block_table(columns: Sequence[SampleColumns]) -> BlockTable:
    rows = np.array([len(c.combo) for c in columns], np.int32)
    first = np.cumsum(rows, dtype=np.int64) - rows
    numbers = columns[0].numbers if columns else {}
    return BlockTable(
        shard=np.zeros(len(columns), np.int32),
        first_row=first,
        rows=rows,
        offset=first * ROW_BYTES,
        length=rows.astype(np.int64) * ROW_BYTES,
        first_sample=first,
        zones={name: _zones([c.numbers[name] for c in columns]) for name in numbers},
    )


def _zones(values: Sequence[NDArray[np.float64]]) -> Zones:
    return Zones(
        low=np.array([np.fmin.reduce(v) for v in values]),
        high=np.array([np.fmax.reduce(v) for v in values]),
        has_null=np.array([np.isnan(v).any() for v in values]),
    )


def _histogram(columns: Sequence[SampleColumns]) -> Histogram:
    # One cell per combo of a block: the combo, which rows of the block have it, and the tokens of all rows.
    cells = [
        [(int(combo), block.combo == combo, block.tokens) for combo in np.unique(block.combo)] for block in columns
    ]
    flat = [cell for block in cells for cell in block]
    return Histogram(
        indptr=_index_pointers([len(block) for block in cells]),
        combo=np.array([combo for combo, _, _ in flat], np.int32),
        rows=np.array([has_combo.sum() for _, has_combo, _ in flat], np.int32),
        tokens=np.array([tokens[has_combo].sum() for _, has_combo, tokens in flat], np.int64),
    )


def _index_pointers(counts: Sequence[int]) -> NDArray[np.int64]:
    """Return where each group begins in a flat array, and where the last one ends (CSR)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
