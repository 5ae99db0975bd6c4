"""Indexes whose checksums are valid and whose values are wrong: refused with the name of the column, or harmless."""

import shutil
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import UserError, exit_code_of

pytestmark = pytest.mark.slow
"""Opens an index for each wrong value."""

NUM_STEPS = 20

NAMED = (
    *("blocks/shard", "combos/source/code", "combos/source/count", "histogram/combo"),
    *("histogram/count", "generations/shards", "generations/blocks", "generations/cells", "generations/combos"),
    *("shards/path_end", "properties/source/values_end", "shards/dataset", "samples/combo"),
)
"""Columns whose values are positions in other tables."""


def columns(path: Path) -> list[str]:
    """Return the names of all columns of numbers."""
    names: list[str] = []

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.dtype.kind in "iuf" and node.size:
            names.append(name)

    with h5py.File(path) as file:
        file.visititems(visit)
    return names


def with_value(path: Path, target: Path, column: str, place: int, is_low: bool) -> bool:
    """Copy an index with the least or greatest value of its type at one place; return False if it is there already."""
    shutil.copy(path, target)
    with h5py.File(target, "r+") as file:
        values = file[column][...]
        limits = np.finfo(values.dtype) if values.dtype.kind == "f" else np.iinfo(values.dtype)
        value = limits.min if is_low else limits.max
        if values.reshape(-1)[place] == value:
            return False
        values.reshape(-1)[place] = value
        file[column][...] = values
    return True


def problem_of(config: Config, named: str) -> str:
    """Return how serving from an index ends, unless it succeeds, or is refused; `named` must be in the message."""
    try:
        with DataPlane.open(config, Local()) as plane:
            for _ in zip(range(NUM_STEPS), plane, strict=False):
                pass
    except UserError as error:
        return "" if exit_code_of(error) == 2 and named in str(error) else f"the message does not name it: {error}"
    except Exception:
        return traceback.format_exc()[-400:]
    return f"{named} is accepted" if named else ""


def test_values_out_of_range_are_refused_by_name_or_harmless(own_collection: list[str], tmp_path: Path) -> None:
    words = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.workers=0", "mixture.max_epochs=null"]
    config = compose([*own_collection, *words])
    path = Path(str(config.index.path))
    tried = columns(path)
    assert set(NAMED) <= set(tried)
    problems = []
    for column in tried:
        for place, is_low in ((0, True), (0, False), (-1, False)):
            # HDF5 keeps open files by name.
            target = tmp_path / f"{column.replace('/', '-')}{place}{is_low}.h5"
            if not with_value(path, target, column, place, is_low):
                continue
            own = replace(config, index=replace(config.index, path=str(target)))
            problem = problem_of(own, column if column in NAMED and place == 0 and not is_low else "")
            if problem:
                problems.append(f"{column}[{place}]: {problem}")
            target.unlink()
    assert not problems, "\n".join(problems)
