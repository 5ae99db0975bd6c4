"""WebDataset's samples: group the members of a tar archive, and decode them to rows.

Consecutive members whose names differ only in their endings are one sample. A row is a dict from ending to content:
`jpg` bytes, `json` the decoded object, `txt` text, `cls` a number, and `__key__` the name without the ending.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.batching.json_payloads import decode_payload
from mixtera_hpc.formats.batching.json_problems import JSON_ERRORS, json_problem, without_bom
from mixtera_hpc.formats.codecs.tar_headers import TarMember

__all__ = ["KEY", "TarSample", "WdsRow", "decode_sample", "group_samples", "is_decoded", "nest_endings"]

KEY = "__key__"
WdsRow = dict[str, Any]

# The key ends at the first dot of the file name, which must not be its first character: `dir.v1/a.seg.png` has the
# key `dir.v1/a` and the ending `seg.png`.
_MEMBER_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<ending>[^/]+)", re.DOTALL)


@dataclass(slots=True)
class TarSample:
    """Consecutive members of one key."""

    key: str
    start: int
    """First byte of the sample's range in the archive."""
    end: int
    members: dict[str, TarMember] = field(default_factory=dict)
    """Ending → member."""
    problem: str = ""
    """The reason for which the sample is a bad row; empty if it is not."""


def group_samples(members: Iterator[TarMember], start: int, path: Path) -> Iterator[TarSample]:
    """Group consecutive members of one key into samples.

    Members without a key or an ending are skipped; their bytes belong to the sample that follows.

    Args:
        members: the members of the archive, in order.
        start: position of the first member.
        path: the archive, for messages.

    Raises:
        DataError: a member's name leads out of the archive.
    """
    sample: TarSample | None = None
    for member in members:
        key, ending = _split_name(member.name, path)
        if not ending:
            continue
        if sample is None:
            sample = TarSample(key, start, member.end)
        elif sample.key != key:
            yield sample
            sample = TarSample(key, sample.end, member.end)
        # The second one would silently replace the first.
        if ending in sample.members:
            sample.problem = f"sample {key!r} has two members with ending {ending!r}"
        sample.members[ending] = member
        sample.end = member.end
    if sample is not None:
        yield sample


def _split_name(name: str, path: Path) -> tuple[str, str]:
    """Return the key and the ending in lower case; both empty if the name has no ending or is hidden."""
    # A name is only a key here, but such an archive is an attack or a mistake.
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(
            f"{path} has a member named {name!r}, which points out of the archive. Nothing is extracted here, but a "
            "program that unpacks it would overwrite other files.\n  Exclude the archive with data.exclude."
        )
    match = _MEMBER_NAME.fullmatch(name.removeprefix("./"))
    if match is None:
        return "", ""
    return match["key"], match["ending"].lower()


def is_decoded(ending: str) -> bool:
    """Return True if a row has the decoded content of members with this ending, and not their bytes."""
    return _last_part(ending) in _DECODERS


def _last_part(ending: str) -> str:
    # The last part of an ending decides: `meta.json` is JSON.
    return ending.rpartition(".")[2]


def decode_sample(key: str, contents: dict[str, bytes]) -> WdsRow:
    """Return the row of a sample as the trainer gets it.

    Args:
        key: the sample's key.
        contents: ending → bytes of the member.

    Raises:
        ValueError: the content of a member does not match its ending.
    """
    row: WdsRow = {KEY: key}
    for ending, data in contents.items():
        decode = _DECODERS.get(_last_part(ending))
        try:
            # A member is a file: a byte order mark at its start is no part of its content.
            row[ending] = decode(without_bom(data)) if decode else data
        except (*JSON_ERRORS, ValueError) as error:
            raise ValueError(f"member {key}.{ending}: {json_problem(without_bom(data), error)}") from None
    return row


def _decode_class(data: bytes) -> int | str:
    """Decode a label: a number or a name."""
    text = data.decode().strip()
    return int(text) if text.removeprefix("-").isdecimal() else text


# Last part of an ending → decoder. All other contents stay bytes.
_DECODERS: dict[str, Any] = {
    "json": decode_payload,
    "cls": _decode_class,
    "txt": bytes.decode,
    "text": bytes.decode,
}


def nest_endings(row: WdsRow, text_paths: Sequence[str]) -> WdsRow:
    """Return the row as dotted paths see it.

    Endings of several parts nest: `seg.png` is `png` below `seg`. Bytes become text if their ending is in `text_paths`.

    Raises:
        UnicodeDecodeError: such bytes are not valid UTF-8.
    """
    nested: WdsRow = {}
    for ending, value in row.items():
        if isinstance(value, bytes):
            # There is nothing below bytes: a path that goes on behind the ending is null.
            if ending not in text_paths:
                continue
            value = without_bom(value).decode()
        # `seg.png` → {"seg": {"png": value}}.
        *parents, last = ending.split(".")
        parent: Any = nested
        for key in parents:
            # A value that already stands where a parent would be is not replaced.
            parent = parent.setdefault(key, {}) if isinstance(parent, dict) else parent
        if isinstance(parent, dict):
            parent[last] = value
    return nested
