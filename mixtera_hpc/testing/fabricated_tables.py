"""Index tables made of samples, without files: what an index of them would hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import BlockTable, Histogram, IndexTables, SampleColumns, ShardTable, Zones
from mixtera_hpc.core.properties import ComboTable, Kind, Property

__all__ = ["Sample", "make_block_reader", "make_index_tables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row: its categorical values (none for null), its numbers (None for null) and its tokens."""

    categories: Mapping[str, frozenset[str]]
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    tokens: int = 1


def make_index_tables(
    blocks: Sequence[Sequence[Sample]], kinds: Mapping[str, Kind]
) -> tuple[IndexTables, Callable[[int], SampleColumns]]:
    """Tables of one shard that has these blocks, and the function that reads the samples of one."""
    samples = [s for block in blocks for s in block]
    names = sorted(name for name, kind in kinds.items() if kind is not Kind.NUMBER)
    numbers = sorted(name for name, kind in kinds.items() if kind is Kind.NUMBER)
    combos = sorted({_combo(s, names) for s in samples})
    properties = {
        name: Property(
            name=name, kind=kinds[name], values=tuple(sorted({v for s in samples for v in s.categories[name]}))
        )
        if name in names
        else Property(name=name, kind=Kind.NUMBER)
        for name in sorted(kinds)
    }
    columns = [_columns(block, names, numbers, combos) for block in blocks]
    tables = IndexTables(
        properties=properties,
        combos=_combo_table(combos, names, properties),
        shards=_one_shard(len(samples)),
        blocks=_block_table(columns),
        histogram=_histogram(columns),
        num_samples=len(samples),
        has_tokens=True,
    )
    return tables, columns.__getitem__


def make_block_reader(read_block: Callable[[int], SampleColumns]) -> Callable[[NDArray[np.int32]], SampleColumns]:
    """What reads several blocks, one after the other."""

    def read(blocks: NDArray[np.int32]) -> SampleColumns:
        parts = [read_block(block) for block in blocks.tolist()]
        return SampleColumns(
            combo=np.concatenate([p.combo for p in parts]),
            length=np.concatenate([p.length for p in parts]),
            tokens=np.concatenate([p.tokens for p in parts]),
            numbers={name: np.concatenate([p.numbers[name] for p in parts]) for name in parts[0].numbers},
        )

    return read


def _combo(sample: Sample, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(sorted(sample.categories[name])) for name in names)


def _columns(
    block: Sequence[Sample], names: Sequence[str], numbers: Sequence[str], combos: Sequence[tuple[tuple[str, ...], ...]]
) -> SampleColumns:
    return SampleColumns(
        combo=np.array([combos.index(_combo(s, names)) for s in block], np.int32),
        length=np.full(len(block), 10, np.int64),
        tokens=np.array([s.tokens for s in block], np.int64),
        numbers={name: np.array([s.numbers[name] for s in block], np.float64) for name in numbers},
    )


def _combo_table(
    combos: Sequence[tuple[tuple[str, ...], ...]], names: Sequence[str], properties: Mapping[str, Property]
) -> ComboTable:
    codes = {
        name: [[properties[name].values.index(v) for v in combo[column]] for combo in combos]
        for column, name in enumerate(names)
    }
    return ComboTable(
        num_combos=len(combos),
        properties={name: properties[name] for name in names},
        indptr={name: _bounds([len(c) for c in found]) for name, found in codes.items()},
        codes={name: np.array([c for combo in found for c in combo], np.int32) for name, found in codes.items()},
    )


def _one_shard(rows: int) -> ShardTable:
    return ShardTable(
        path=("shard.jsonl",),
        format=("jsonl",),
        rows=np.array([rows]),
        size_bytes=np.array([10 * rows]),
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
        offset=first * 10,
        length=rows.astype(np.int64) * 10,
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
    cells = [[(int(c), b.combo == c, b.tokens) for c in np.unique(b.combo)] for b in columns]
    return Histogram(
        indptr=_bounds([len(block) for block in cells]),
        combo=np.array([c for block in cells for c, _, _ in block], np.int32),
        rows=np.array([hit.sum() for block in cells for _, hit, _ in block], np.int32),
        tokens=np.array([tokens[hit].sum() for block in cells for _, hit, tokens in block], np.int64),
    )


def _bounds(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
