"""Opening a run with many domains: the work grows with the number of domains, not with its square."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.combos.combo_index import ComboIndex, WantedCodes
from mixtera_hpc.core.domains import keys_for_group_by, select
from mixtera_hpc.core.index_tables import IndexTables
from mixtera_hpc.core.properties import ComboTable, Kind, Property
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.configured import open_configured


class CountingArray(np.ndarray):
    """An array that counts the elements of all arrays that are made from it."""

    num_elements = 0

    def __array_finalize__(self, base: Any) -> None:
        CountingArray.num_elements += self.size


def collection_of(folder: Path, num_domains: int) -> Config:
    """Index two rows per domain, in one block after the other."""
    folder.mkdir()
    names = [f"d{number}" for number in range(num_domains)] * 2
    (folder / "a.jsonl").write_text("".join(json.dumps({"domain": name, "half": name[-1]}) + "\n" for name in names))
    words = [f"data.root={folder}", "data.text=null", "data.properties.domain=domain", "data.properties.half=half"]
    config = compose([*words, "mixture.unit=samples", "mixture.group_by=[half,domain]", "dataplane.workers=0"])
    build_index(config)
    return config


def calls_of_opening(config: Config) -> int:
    """Return how many functions are called, in Python or in C, to open a data plane."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        DataPlane.open(config, Local()).close()
    finally:
        sys.setprofile(None)
    return calls


def elements_of_selection(config: Config) -> int:
    """Return how many array elements are computed from the combos to select the domains."""
    with open_configured(config) as index:
        tables = index.tables
    combos = tables.combos
    counted = ComboTable(
        num_combos=combos.num_combos,
        properties=combos.properties,
        indptr={name: array.view(CountingArray) for name, array in combos.indptr.items()},
        codes={name: array.view(CountingArray) for name, array in combos.codes.items()},
        bad=combos.bad,
    )
    values = {field: getattr(tables, field) for field in IndexTables.__dataclass_fields__}
    before = CountingArray.num_elements
    keys = keys_for_group_by(["half", "domain"], counted)
    select(IndexTables(**{**values, "combos": counted}), parse_predicate("", {}), keys, lambda blocks: pytest.fail())
    return CountingArray.num_elements - before


def test_the_work_of_opening_grows_with_the_number_of_domains(tmp_path: Path) -> None:
    few, many = (collection_of(tmp_path / str(number), number) for number in (100, 400))
    calls_of_opening(few)  # Imports what is imported late.
    # Four times the domains: a quadratic part of a tenth would make it six times the calls.
    assert calls_of_opening(many) < 4.5 * calls_of_opening(few)
    assert elements_of_selection(many) < 4.5 * elements_of_selection(few)


def test_combos_are_found_by_any_value_of_every_property() -> None:
    rng = np.random.default_rng(0)
    values = {"a": tuple("pqrs"), "b": tuple("xyz")}
    rows = {
        name: [sorted(rng.choice(len(v), rng.integers(0, 3), False)) for _ in range(60)] for name, v in values.items()
    }
    table = ComboTable(
        num_combos=60,
        properties={name: Property(name=name, kind=Kind.CATEGORIES, values=v) for name, v in values.items()},
        indptr={name: np.cumsum([0, *map(len, lists)]) for name, lists in rows.items()},
        codes={name: np.array([code for codes in lists for code in codes], np.int32) for name, lists in rows.items()},
        bad=7,
    )
    index = ComboIndex(table)
    for wanted in (
        [],
        [("a", [1], False)],
        [("a", [0, 2], True)],
        [("a", [], True), ("b", [2, 0], False)],
        [("b", [1], True), ("a", [3, 1], True)],
    ):
        asked = [WantedCodes(name=name, codes=codes, null=null) for name, codes, null in wanted]
        expected = [
            combo
            for combo in range(60)
            if combo != 7
            and all(set(rows[n][combo]) & set(codes) or (null and not rows[n][combo]) for n, codes, null in wanted)
        ]
        assert index.matching(asked).tolist() == expected
