"""Add columns of new properties to a scan result, or replace them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.formats.base import Column
from mixtera_hpc.formats.category_codes import Categories
from mixtera_hpc.index.scan.scan_result import Combo, ScanResult, combine_columns, histogram_of, zones_of

__all__ = ["add_columns", "concatenate_columns"]


def concatenate_columns(columns: Sequence[Column]) -> Column:
    """Concatenate columns of one property over consecutive rows."""
    numbers = [column for column in columns if isinstance(column, np.ndarray)]
    if numbers:
        return np.concatenate(numbers)
    # Translate the codes of each column to one common list of values.
    position: dict[tuple[str, ...], int] = {}
    codes = []
    for column in columns:
        if isinstance(column, Categories):
            new_code = np.array([position.setdefault(value, len(position)) for value in column.values], np.int32)
            codes.append(new_code[column.code] if len(new_code) else column.code)
    return Categories(list(position), np.concatenate(codes))


def add_columns(result: ScanResult, names: Sequence[str], columns: Mapping[str, Column]) -> ScanResult:
    """Return a result with more properties; existing ones of the same name are replaced.

    Args:
        result: any scan result.
        names: its categorical properties, sorted.
        columns: property → values of every row.
    """
    # -1 is no combo, so nothing compares equal to it.
    bad = result.combos.index(None) if None in result.combos else -1
    is_bad = result.samples["combo"] == bad
    numbers = {name: values for name, values in result.numbers.items() if name not in columns}
    zones = {name: values for name, values in result.zones.items() if name not in columns}
    for name, column in columns.items():
        if isinstance(column, np.ndarray):
            # Functions got an empty text for bad rows; their results are dropped.
            numbers[name] = np.where(is_bad, np.nan, column)
            zones[name] = zones_of(numbers[name], result.blocks["rows"], is_bad)

    combos, codes = _recombine(result, names, columns)
    samples = result.samples | {"combo": codes}
    new_bad = combos.index(None) if None in combos else None
    # Splitting combos changes the histogram of every block; token counts stay.
    combos_per_block, cells = histogram_of(result.blocks["rows"], samples, len(combos), new_bad)
    return replace(
        result,
        combos=combos,
        blocks=result.blocks | {"count": combos_per_block},
        cells=cells,
        samples=samples,
        numbers=numbers,
        zones=zones,
    )


def _recombine(
    result: ScanResult, names: Sequence[str], columns: Mapping[str, Column]
) -> tuple[list[Combo | None], NDArray[np.int64]]:
    """Return the combos with the new properties, and the combo of every row.

    A combo splits into one combo per combination of new values that occurs with it.
    """
    added = {name: column for name, column in sorted(columns.items()) if isinstance(column, Categories)}
    retained = [(column, name) for column, name in enumerate(names) if name not in columns]
    # Combos list their values by property name, over old and new properties.
    order = sorted([*(name for _, name in retained), *added])

    # Number the pairs (old combo, combination of new values) that occur.
    new_values, new_code = combine_columns(list(added.values()), result.num_rows)
    num_new = max(len(new_values), 1)
    pairs, pair_of_row = np.unique(result.samples["combo"] * num_new + new_code, return_inverse=True)

    # Several pairs may be one combo: old combos that differed only in a replaced property, and all pairs of bad rows.
    position: dict[Combo | None, int] = {}
    combo_of_pair = np.zeros(len(pairs), np.int64)
    for i, pair in enumerate(pairs.tolist()):
        old_number, new_number = divmod(pair, num_new)
        old = result.combos[old_number]
        combo: Combo | None = None
        if old is not None:
            values = {name: old[column] for column, name in retained}
            values |= dict(zip(added, new_values[new_number], strict=True))
            combo = tuple(values[name] for name in order)
        combo_of_pair[i] = position.setdefault(combo, len(position))
    return list(position), combo_of_pair[pair_of_row]
