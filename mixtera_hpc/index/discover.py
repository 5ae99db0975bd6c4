"""Which files are the shards: globs below the data root, in an order that does not depend on the file system."""

import glob
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixtera_hpc.config.schema import DataConfig
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.registry import SUFFIXES, format_of, load_format

__all__ = ["Shard", "discover", "fingerprint_of_shard"]

ENDS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One data file as it was found."""

    path: str
    """Relative to the data root."""
    format: str
    size_bytes: int
    mtime_ns: int


def discover(data: DataConfig) -> list[Shard]:
    """The shards of a data collection, sorted by path.

    Hidden files never match. A glob whose last part is only stars skips files of unknown format; any other glob means what
    it names.

    Raises:
        ConfigError: a glob leaves the data root, or matches a file of unknown format.
        DataError: the root is no folder, a glob matches nothing, or one file is matched under two names.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise DataError(f"data.root is {data.root!r}, which is not a folder.")
    if data.format != "auto":
        load_format(data.format)
    left_out = {path for pattern in data.exclude for path in _matching(root, pattern, "data.exclude")}
    formats: dict[str, str] = {}
    for pattern in data.include:
        formats |= _formats(root, pattern, data, left_out)
    if not formats:
        raise DataError(
            f"No data file below {data.root}: data.include is {', '.join(data.include)}.\n  Known endings: {_endings()}."
        )
    return _without_twins(_stat(root, path, formats[path]) for path in sorted(formats))


def fingerprint_of_shard(path: Path, size_bytes: int) -> str:
    """Hex digest of a file's size and its first and last MiB: cheap, and different for whatever appends, cuts or replaces."""
    digest = hashlib.blake2b(str(size_bytes).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(size_bytes - ENDS_BYTES, 0))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def _formats(root: Path, pattern: str, data: DataConfig, left_out: set[str]) -> dict[str, str]:
    """The files that one glob matches, with their formats."""
    found = {path for path in _matching(root, pattern, "data.include") if (root / path).is_file()}
    if not found and set(PurePosixPath(pattern).name) != {"*"}:
        raise DataError(f"data.include has {pattern!r}, which matches no file below {data.root}.")
    formats: dict[str, str] = {}
    for path in sorted(found - left_out):
        name = format_of(path) if data.format == "auto" else data.format
        if name is not None:
            formats[_valid(path)] = name
        elif set(PurePosixPath(pattern).name) != {"*"}:
            raise ConfigError(
                f"data.include has {pattern!r}, which matches {path!r}, a file of unknown format.\n"
                f"  Known endings: {_endings()}. Set data.format to read it as one of these formats."
            )
    return formats


def _valid(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The file name {path!r} is not UTF-8. Rename the file, or leave it out with data.exclude."
        ) from None
    return path


def _matching(root: Path, pattern: str, key: str) -> list[str]:
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ConfigError(f"{key} has {pattern!r}, expected a glob below data.root, without '..'.")
    return glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib's follows no links to folders)


def _stat(root: Path, path: str, name: str) -> tuple[Shard, tuple[int, int]]:
    status = (root / path).stat()
    shard = Shard(path=path, format=name, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
    return shard, (status.st_dev, status.st_ino)


def _without_twins(found: Iterable[tuple[Shard, tuple[int, int]]]) -> list[Shard]:
    """Refuse a file that is reached twice, through a link or a loop of links: its samples would count twice."""
    seen: dict[tuple[int, int], str] = {}
    shards = []
    for shard, identity in found:
        if identity in seen:
            raise DataError(
                f"{seen[identity]!r} and {shard.path!r} are the same file; its samples would be counted twice.\n"
                "  Leave one of them out with data.exclude."
            )
        seen[identity] = shard.path
        shards.append(shard)
    return shards


def _endings() -> str:
    return " ".join(sorted(SUFFIXES))
