"""Events of many domains in few bytes: only domains that are present, and only what has changed.

An event with lists over more than `MAX_PLAIN` domains is recorded with `by_domain` in place of the lists: the ids of
some domains and their values, as base64 of little-endian numbers (floats) or of variable-length integers. Lists of a
step or a validation hold the domains that had tokens; the others are empty. Lists of a chunk hold those that differ
from the line before. `unpack` restores all lists. Price: 12 bytes per domain that is present.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EventPacker", "EventUnpacker"]

MAX_PLAIN = 16
"""Domains up to which lists stay as they are, so that people can read them."""
FULL_EVERY = 64
"""Lines of chunks after which everything is recorded again: more than that is never lost with a damaged line."""

Values = NDArray[Any]

PRESENT = {
    "steps": ("domain_loss", "domain_tokens", "domain_sequences"),
    "validation": ("domain_loss", "domain_tokens"),
}
"""Stream → its lists over domains, which are empty for most of them."""
CHANGED = {"mixture": ("cursors", "epochs")}
"""Stream → its lists over domains, which keep most of their values from line to line."""
REPEATED = {"mixture": ("domains", "weights")}
"""Stream → lists that are left out if they equal those of the line before."""
DERIVED = {"mixture": ("served",)}
"""Stream → lists that follow from others."""
PRECISION: dict[str, str] = {"domain_loss": "<f4", "epochs": "<f4", "weights": "<f8"}
"""List → its numbers; the others are integers."""
SCALAR_PREFIX = "scalar_"
"""The prefix of the names of further lists of a step, with numbers like those of `domain_loss`."""


class EventPacker:
    """The encoder of the events of one stream, in order."""

    def __init__(self, stream: str) -> None:
        """Begin without an event."""
        self._stream = stream
        self._last: Mapping[str, Any] = {}
        self._num_lines = 0

    def pack(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is recorded of an event."""
        known = PRESENT.get(self._stream, ()) + CHANGED.get(self._stream, ())
        lists = [name for name in known if name in event]
        lists += [name for name, value in event.items() if name.startswith(SCALAR_PREFIX) and hasattr(value, "__len__")]
        if not lists or len(event[lists[0]]) <= MAX_PLAIN:
            return event
        is_full = self._num_lines % FULL_EVERY == 0
        self._num_lines += 1
        last = {} if is_full else self._last
        self._last = event

        values = {name: _as_array(name, event[name]) for name in lists}
        if self._stream in CHANGED:
            before = {name: _as_array(name, last[name]) for name in lists if name in last}
            chosen = _differing(values, before)
        else:
            chosen = np.flatnonzero(np.any([_is_present(column) for column in values.values()], axis=0))
        left_out = {*lists, *DERIVED.get(self._stream, ())}
        left_out |= {
            name for name in REPEATED.get(self._stream, ()) if name in last and _equal(last[name], event[name])
        }
        packed: dict[str, Any] = {name: value for name, value in event.items() if name not in left_out}
        for name, value in packed.items():
            # The weights, and what a mixing algorithm has learned.
            if isinstance(value, np.ndarray):
                packed[name] = {"float64": _encode("weights", value)}
        ids = np.diff(chosen, prepend=0)
        packed["by_domain"] = {"size": len(event[lists[0]]), "ids": _encode("ids", ids)} | {
            name: _encode(name, column[chosen]) for name, column in values.items()
        }
        return packed


class EventUnpacker:
    """The decoder of the events of one stream, in order."""

    def __init__(self) -> None:
        """Begin without an event."""
        self._last: dict[str, Any] = {}

    def unpack(self, event: dict[str, Any]) -> dict[str, Any]:
        """Return an event as it was logged; the means of losses have the precision of float32."""
        by_domain = event.pop("by_domain", None)
        if by_domain is None:
            return event
        size = int(by_domain.pop("size"))
        chosen = np.cumsum(_decode("ids", by_domain.pop("ids")))
        is_chunk = "epochs" in by_domain
        for name, value in event.items():
            if isinstance(value, dict) and "float64" in value:
                event[name] = _as_list(_decode("weights", value["float64"]))
        for name, text in by_domain.items():
            is_float = _precision(name) is not None
            column = np.full(size, np.nan if is_float else 0, np.float64 if is_float else np.int64)
            if is_chunk and len(self._last.get(name, ())) == size:
                column[:] = self._last[name]
            column[chosen] = _decode(name, text)
            event[name] = _as_list(column)
        if is_chunk:
            if "cursors" in event:
                cursors = np.array(event["cursors"], np.int64)
                event["served"] = (cursors / max(int(cursors.sum()), 1)).tolist()
            event = {**{name: self._last[name] for name in REPEATED["mixture"] if name in self._last}, **event}
            self._last = event
        return event


def _precision(name: str) -> str | None:
    """Return the type of the numbers of a list; None for integers."""
    return "<f4" if name.startswith(SCALAR_PREFIX) else PRECISION.get(name)


def _as_array(name: str, values: Any) -> Values:
    if _precision(name) is None:
        return np.asarray(values, np.int64)
    # None becomes NaN.
    return np.asarray(values, np.float64)


def _as_list(column: Values) -> list[Any]:
    values: list[Any] = column.tolist()
    return values if column.dtype.kind == "i" else [None if value != value else value for value in values]


def _is_present(column: Values) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(column) if column.dtype.kind == "f" else column != 0)


def _differing(values: Mapping[str, Values], before: Mapping[str, Values]) -> NDArray[np.int64]:
    size = len(next(iter(values.values())))
    differs = np.zeros(size, np.bool_)
    for name, column in values.items():
        if name not in before or len(before[name]) != size:
            return np.arange(size)
        differs |= (column != before[name]) & ~(np.isnan(column) & np.isnan(before[name]))
    return np.flatnonzero(differs)


def _equal(first: Any, second: Any) -> bool:
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))


def _encode(name: str, values: Values) -> str:
    precision = _precision(name)
    raw = _variable_length(values) if precision is None else values.astype(precision).tobytes()
    return base64.b64encode(raw).decode()


def _decode(name: str, text: str) -> Values:
    raw = base64.b64decode(text)
    precision = _precision(name)
    if precision is not None:
        return np.frombuffer(raw, precision).astype(np.float64)
    return _from_variable_length(np.frombuffer(raw, np.uint8))


def _variable_length(values: Values) -> bytes:
    """Return integers of at least 0 in groups of seven bits, the lowest first; only the last has no high bit."""
    groups = (values.astype(np.int64)[:, None] >> np.arange(0, 63, 7)) & 0x7F
    # Number of groups of each value, at least one.
    counts = np.where(groups != 0, np.arange(1, 10), 1).max(axis=1, initial=1)
    is_used = np.arange(9) < counts[:, None]
    continues = np.arange(9) < counts[:, None] - 1
    raw: bytes = (groups | (continues << 7))[is_used].astype(np.uint8).tobytes()
    return raw


def _from_variable_length(raw: NDArray[np.uint8]) -> Values:
    if not len(raw):
        return np.zeros(0, np.int64)
    is_last = raw < 0x80
    ends = np.flatnonzero(is_last) + 1
    starts = np.concatenate([[0], ends[:-1]])
    position = np.arange(len(raw)) - np.repeat(starts, ends - starts)
    groups = (raw & 0x7F).astype(np.int64) << (7 * position)
    return np.add.reduceat(groups, starts)
