"""The first line of a journal: what the first attempt of a run served."""

import contextlib
from pathlib import Path
from typing import Annotated

import msgspec

__all__ = ["EARLIER_LANES", "FirstIdentity", "read_first_identity"]

EARLIER_LANES = 16
"""The default of `dataplane.lanes` in releases in which it was a number, which their runs have recorded."""


class FirstIdentity(msgspec.Struct):
    """The part of a run's identity that a configuration may leave open."""

    index: list[str] | None = None
    """Generation of every index."""
    lanes: Annotated[int, msgspec.Meta(ge=1)] | None = None


class _Line(msgspec.Struct):
    identity: FirstIdentity = msgspec.field(default_factory=FirstIdentity)


def read_first_identity(journal: Path) -> FirstIdentity:
    """Return the identity of a run's first attempt; with nothing in it if there is none.

    A damaged journal is reported by those who read all of it. Price: one line; a long run has thousands.
    """
    if journal.is_file():
        with journal.open("rb") as file:
            line = file.readline()
        # The first line may be cut short.
        with contextlib.suppress(msgspec.DecodeError, RecursionError):
            return msgspec.json.decode(line, type=_Line).identity
    return FirstIdentity()
