"""Logs of scanned units: what was written is found again, what was damaged is not."""

from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.index.scan.scan_log import ScanLog, complete_units, recover_logs
from mixtera_hpc.index.scan.scan_result import ScanResult


def part(rows: int) -> ScanResult:
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
    """Three units of one part each."""
    written = ScanLog(tmp_path, "001")
    for unit in range(3):
        written.append(unit, 0, part(100 + unit), last=True)
    written.close()
    return tmp_path / "001.scanlog"


def test_a_part_is_read_back_as_it_was(log: Path) -> None:
    units = complete_units(recover_logs(log.parent))
    assert list(units) == [0, 1, 2]
    found, expected = units[1][0].load(), part(101)
    assert (found.combos, found.fingerprint, found.reasons) == (expected.combos, "ab", {"cut": 1})
    assert found.samples["length"].tolist() == expected.samples["length"].tolist()
    assert found.summary() == expected.summary()


def test_a_damaged_record_and_what_follows_it_are_not_found_again(log: Path) -> None:
    second = recover_logs(log.parent)[1]
    damaged = bytearray(log.read_bytes())
    damaged[second.position + len(damaged) // 3 - 8] ^= 1
    log.write_bytes(damaged)
    assert list(complete_units(recover_logs(log.parent))) == [0]
    assert log.stat().st_size == second.position


def test_a_record_that_was_cut_short_is_not_found_again(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-1])
    assert list(complete_units(recover_logs(log.parent))) == [0, 1]
