"""Logs of scan results: intact records are recovered, damaged ones are dropped."""

from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.index.scan.scan_log import ScanLog, complete_units, recover_logs
from mixtera_hpc.index.scan.scan_result import ScanResult


def result_of(rows: int) -> ScanResult:
    column = np.arange(rows)
    return ScanResult(
        combos=[(("en",),)],
        blocks={name: np.array([rows]) for name in ("offset", "length", "rows", "count")},
        cells={"combo": np.array([0]), "rows": np.array([rows]), "tokens": np.array([0])},
        zones={},
        samples={"combo": np.zeros(rows, np.int64), "length": column},
        numbers={},
        fingerprint="ab",
        reasons={"cut": 1},
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return a log of three units with one result each."""
    new_log = ScanLog(tmp_path, "001")
    for unit in range(3):
        new_log.append(unit, 0, result_of(100 + unit), last=True)
    new_log.close()
    return tmp_path / "001.scanlog"


def test_a_result_is_read_back_unchanged(log: Path) -> None:
    units = complete_units(recover_logs(log.parent))
    assert list(units) == [0, 1, 2]
    result = units[1][0].load()
    expected = result_of(101)
    assert (result.combos, result.fingerprint, result.reasons) == (expected.combos, "ab", {"cut": 1})
    assert result.samples["length"].tolist() == expected.samples["length"].tolist()
    assert result.summary() == expected.summary()


def test_a_damaged_record_and_those_behind_it_are_dropped(log: Path) -> None:
    second = recover_logs(log.parent)[1]
    damaged = bytearray(log.read_bytes())
    damaged[second.position + len(damaged) // 3 - 8] ^= 1
    log.write_bytes(damaged)
    assert list(complete_units(recover_logs(log.parent))) == [0]
    assert log.stat().st_size == second.position


def test_a_truncated_record_is_dropped(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-1])
    assert list(complete_units(recover_logs(log.parent))) == [0, 1]
