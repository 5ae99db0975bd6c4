"""Rows of many files in one loop: what is read, in which order, and what falls back to the reader of one shard."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.dataplane.reading.rows.read_plan import ReadPlan
from mixtera_hpc.dataplane.reading.rows.row_files import RowFiles
from mixtera_hpc.formats.batching import json_row_decoder
from mixtera_hpc.formats.batching.json_row_decoder import JsonRowDecoder
from tests.unit.open_files import num_open

ROW_BYTES = 12
NUM_FILES = 9


def decode(rows: Sequence[bytes]) -> list[int]:
    return [int(row) for row in rows]


def nothing(shard: int, first: int, last: int) -> None:
    """Be told the shard that is read next."""


@pytest.fixture
def files(tmp_path: Path) -> RowFiles:
    """Return files whose row i of file f is the number 1000 f + i."""
    for number in range(NUM_FILES):
        rows = [f"{1000 * number + row:{ROW_BYTES - 1}}\n" for row in range(400)]
        (tmp_path / f"{number}").write_text("".join(rows))
    return RowFiles(f"{tmp_path}", [f"{number}" for number in range(NUM_FILES)], max_open=4)


def read(files: RowFiles, places: list[tuple[int, int]], enter: Any = nothing) -> list[int]:
    """Return the rows at (file, row)."""
    plan = plan_of(places)
    groups = list(files.read(plan, decode, enter))
    values = [row for wanted in (False, True) for is_shared, rows in groups if is_shared == wanted for row in rows]
    return in_order(plan, values)


def plan_of(places: list[tuple[int, int]]) -> ReadPlan:
    shards, rows = np.array(sorted(places)).T
    return ReadPlan(shards.astype(np.int32), rows * ROW_BYTES, np.full(len(rows), ROW_BYTES), rows)


def in_order(plan: ReadPlan, values: list[int]) -> list[int]:
    """Return values in the order of the requested rows."""
    return [value for _, value in sorted(zip(plan.positions.tolist(), values, strict=True))]


@pytest.mark.parametrize("share", [0.002, 0.1, 0.9, 1.0])
def test_rows_come_in_order_whether_or_not_they_share_a_read(files: RowFiles, share: float) -> None:
    chosen = np.random.default_rng(0).random((NUM_FILES, 400)) < share
    places = [(int(shard), int(row)) for shard, row in zip(*np.nonzero(chosen), strict=True)]
    # Some rows are wanted twice.
    places += places[::7]
    entered = []
    rows = read(files, places, lambda *place: entered.append(place))
    assert rows == sorted(1000 * shard + row for shard, row in places)
    plan = plan_of(places)
    assert in_order(plan, decode(files.read_raw(plan, nothing))) == rows
    rows_of = {shard: [row for own, row in places if own == shard] for shard in sorted({shard for shard, _ in places})}
    assert entered == [(shard, min(rows), max(rows)) for shard, rows in rows_of.items()]
    files.close()


def test_no_more_files_are_open_than_allowed(files: RowFiles) -> None:
    before = num_open()
    read(files, [(shard, 1) for shard in range(NUM_FILES)])
    assert num_open() <= before + 4
    files.close()
    assert num_open() <= before


def test_files_that_are_read_in_turn_stay_open(files: RowFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def counted_open(path: str, flags: int) -> int:
        opened.append(path)
        return real_open(path, flags)

    real_open = os.open
    monkeypatch.setattr(os, "open", counted_open)
    in_turn = [(shard, 1) for shard in range(NUM_FILES)]
    for _ in range(5):
        read(files, in_turn)
    # Three of the four stay, so at most six are opened in each read. If the oldest were closed, all nine would be.
    assert len(opened) <= NUM_FILES + 4 * (NUM_FILES - 3)
    # Other files take their place when nobody reads them any more.
    for _ in range(4):
        read(files, [(8, 1), (7, 1)])
        read(files, [(6, 1), (5, 1)])
    opened.clear()
    read(files, [(shard, 1) for shard in (5, 6, 7, 8)])
    assert not opened
    files.close()


def test_a_row_behind_the_end_of_a_file_is_refused(files: RowFiles) -> None:
    with pytest.raises(EOFError):
        read(files, [(0, 1), (0, 400)])
    files.close()


ROWS = [b'{"text": "a"}\n', b'\n {"text": "b", "n": [1]}\n', b'{"text": "c"}']


def test_rows_that_are_decoded_together_equal_rows_alone() -> None:
    decoder = JsonRowDecoder("text")
    assert decoder.documents(ROWS) == ["a", "b", "c"]
    assert decoder.payloads(ROWS) == [{"text": "a"}, {"text": "b", "n": [1]}, {"text": "c"}]
    large = [*ROWS, b'{"text": "d", "n": 1e999}']
    assert decoder.payloads(large)[3] == {"text": "d", "n": float("inf")}


def test_a_call_gets_few_large_rows_and_rows_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_row_decoder, "JOINED_BYTES", 100)
    decode_list = json_row_decoder._decode_list
    calls: list[int] = []

    def recorded(decoder: Any, rows: Sequence[bytes | memoryview]) -> Any:
        calls.append(len(rows))
        return decode_list(decoder, rows)

    monkeypatch.setattr(json_row_decoder, "_decode_list", recorded)
    texts = ["a" * size for size in (10, 30, 20, 200, 1, 1, 40, 1)]
    rows = [f'{{"text": "{text}"}}'.encode() for text in texts]
    decoder = JsonRowDecoder("text", b"\n")
    assert decoder.documents(rows) == texts
    assert decoder.payloads(rows) == [{"text": text} for text in texts]
    # Rows of 22 + 42 + 32 bytes, 212, and 13 + 13 + 52 + 13.
    assert calls == [3, 1, 4] * 2


@pytest.mark.parametrize(
    "bad", [[b""], [b"\n"], [b"{}\n{}"], [b'{"text": "a"}, {"text": "b"}'], [b'{"text": "a', b'b"}'], [b'{"text"']]
)
def test_bytes_that_are_not_one_row_are_refused(bad: list[bytes]) -> None:
    """A batch has as many elements as rows only if every row is one element."""
    decoder = JsonRowDecoder("text")
    for rows in ([*ROWS, *bad], [*bad, *ROWS], [*bad, *bad]):
        with pytest.raises(ValueError, match=r"JSON|Expected|truncated|data"):
            decoder.payloads(rows)
        with pytest.raises(ValueError, match=r"JSON|Expected|truncated|data|text"):
            decoder.documents(rows)
