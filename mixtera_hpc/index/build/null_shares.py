"""Count the nulls of every property and data set, while an index is written.

A path that fits one data set and not another shows only here: the property exists, and is null for all of the other.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.index.build.merge import MergedTables, TranslatedResult
from mixtera_hpc.index.layout import DATASET

__all__ = ["NullCounter"]


class NullCounter:
    """Adds up rows and nulls, one scan result after the other; rows that cannot be read do not count."""

    def __init__(self, merged: MergedTables, dataset_of_shard: Sequence[str]) -> None:
        self._names = sorted(set(dataset_of_shard))
        position = {name: i for i, name in enumerate(self._names)}
        self._dataset_of_shard = np.array([position[name] for name in dataset_of_shard], np.int64)
        self._bad = merged.combos.bad
        self._is_null = {name: merged.combos.is_null(name) for name in merged.combos.properties if name != DATASET}
        self._numbers = merged.numbers
        self._rows: NDArray[np.int64] = np.zeros(len(self._names), np.int64)
        self._nulls: Counter[tuple[str, str]] = Counter()

    def add(self, shard: int | NDArray[np.int64], result: TranslatedResult) -> None:
        """Count the rows of a result; `shard` is the position of the shard of all blocks, or of each."""
        block_rows = result.blocks["rows"]
        dataset = self._dataset_of_shard[np.broadcast_to(shard, len(block_rows))]
        cells = result.cells
        dataset_of_cell = np.repeat(dataset, result.blocks["count"])
        self._rows += self._sum_by_dataset(dataset_of_cell, cells["rows"])
        for name, is_null in self._is_null.items():
            self._count(name, dataset_of_cell, cells["rows"] * is_null[cells["combo"]])
        if self._numbers and len(block_rows):
            is_good = result.samples["combo"] != self._bad
            dataset_of_row = np.repeat(dataset, block_rows)
            for name in self._numbers:
                self._count(name, dataset_of_row, np.isnan(result.samples[f"numbers/{name}"]) & is_good)

    def shares(self) -> dict[str, dict[str, float]]:
        """Return data set → property → share of its rows that are null, from 0 to 1."""
        properties = sorted([*self._is_null, *self._numbers])
        return {
            dataset: {name: self._nulls[dataset, name] / max(int(rows), 1) for name in properties}
            for dataset, rows in zip(self._names, self._rows, strict=True)
        }

    def _count(self, name: str, dataset: NDArray[np.int64], nulls: NDArray[Any]) -> None:
        for dataset_name, count in zip(self._names, self._sum_by_dataset(dataset, nulls), strict=True):
            self._nulls[dataset_name, name] += int(count)

    def _sum_by_dataset(self, dataset: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.int64]:
        return np.bincount(dataset, values, len(self._names)).astype(np.int64)
