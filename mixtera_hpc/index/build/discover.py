"""Which files are the shards: globs below the data roots, in an order that does not depend on the file system.

One `stat` per file that matches. Paths are relative to their root and stay below it, whatever links there are inside: `below`
is the only way from a stored path to a file, and refuses any other.
"""

import errno
import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixtera_hpc.config.schema import DataConfig
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.registry import SUFFIXES, format_name_of, load_format

__all__ = ["Shard", "discover_shards", "escapes", "fingerprint_of_shard", "roots_of"]

ENDS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One data file as it was found."""

    path: str
    """Relative to its data root."""
    format: str
    size_bytes: int
    mtime_ns: int
    dataset: str = ""
    """The name of its root in `data.sets`; empty where there is only `data.root`."""

    def below(self, roots: Mapping[str, Path]) -> Path:
        """Where it lies."""
        return roots[self.dataset] / self.path


def roots_of(data: DataConfig) -> dict[str, Path]:
    """Dataset → folder; a single root is called ''."""
    return {name: Path(root) for name, root in sorted(data.roots().items())} if data.sets else {"": Path(data.root)}


def discover_shards(data: DataConfig) -> list[Shard]:
    """The shards of a data collection, sorted by dataset and path.

    Hidden files never match. A glob whose last part is only stars skips files of unknown format and plain text and `.json`,
    which are more often about the data than part of it; any other glob means what it names.

    Raises:
        ConfigError: a glob leaves the data root, or matches a file of unknown format.
        DataError: a root is no folder, a glob matches nothing, or one file is matched under two names.
    """
    if data.format != "auto":
        load_format(data.format)
    found = [pair for dataset, root in roots_of(data).items() for pair in _below(root, dataset, data)]
    if not found:
        where = ", ".join(map(str, roots_of(data).values()))
        raise DataError(
            f"No data file below {where}: data.include is {', '.join(data.include)}.\n  Known endings: {_endings()}; .txt and "
            ".json where a glob names them, as in data.include=['**/*.txt']."
        )
    return _without_twins(found)


def fingerprint_of_shard(path: Path, size_bytes: int) -> str:
    """Hex digest of a file's size and its first and last MiB: cheap, and different for whatever appends, cuts or replaces."""
    digest = hashlib.blake2b(str(size_bytes).encode(), digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(ENDS_BYTES))
        file.seek(max(size_bytes - ENDS_BYTES, 0))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def escapes(path: str) -> bool:
    """Whether a stored path would lead out of the folder it is said to be in, or names no file at all."""
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts or "\0" in path


Found = tuple[Shard, tuple[int, int]]
"""A shard and its device and inode."""


def _below(root: Path, dataset: str, data: DataConfig) -> list[Found]:
    """The shards of one root, sorted by path."""
    if not root.is_dir():
        key = f"data.sets.{dataset}" if dataset else "data.root"
        raise DataError(
            f"{key} is {str(root)!r}, which is not a folder.\n  Give the folder that the data files are below."
        )
    left_out = {path.rstrip("/") for pattern in data.exclude for path in _matching(root, pattern, "data.exclude")}
    found: dict[str, Found] = {}
    for pattern in data.include:
        _check_folders(root, pattern, left_out)
        found |= {pair[0].path: pair for pair in _shards(root, dataset, pattern, data, left_out, found)}
    return [found[path] for path in sorted(found)]


def _shards(
    root: Path, dataset: str, pattern: str, data: DataConfig, left_out: set[str], known: Mapping[str, Found]
) -> Iterable[Found]:
    """The shards that one glob matches."""
    matched, all_stars = 0, set(PurePosixPath(pattern).name) == {"*"}
    for path in sorted(_matching(root, pattern, "data.include")):
        status = None if path in known else _stat(root / path)
        if status is None and path not in known:
            continue
        matched += 1
        name = None if path in left_out or status is None else _format(path, pattern, data, all_stars)
        if name is not None and status is not None:
            yield _shard(path, name, dataset, status)
    if not matched and not all_stars:
        raise DataError(f"data.include has {pattern!r}, which matches no file below {root}.\n  Mend it, or remove it.")


def _format(path: str, pattern: str, data: DataConfig, all_stars: bool) -> str | None:
    """The format of a file; None when only stars matched it and it has none."""
    name = format_name_of(path) if data.format == "auto" else data.format
    if name in ("text", "json") and all_stars and data.format == "auto":
        return None
    if name is None and not all_stars:
        raise ConfigError(
            f"data.include has {pattern!r}, which matches {path!r}, a file of unknown format.\n"
            f"  Known endings: {_endings()}. Set data.format to read it as one of these formats."
        )
    return name


def _shard(path: str, name: str, dataset: str, status: os.stat_result) -> Found:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The file name {path!r} is not UTF-8. Rename the file, or leave it out with data.exclude."
        ) from None
    shard = Shard(path=path, format=name, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, dataset=dataset)
    return shard, (status.st_dev, status.st_ino)


def _matching(root: Path, pattern: str, key: str) -> list[str]:
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ConfigError(f"{key} has {pattern!r}, expected a glob below data.root, without '..'.")
    return glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib's follows no links to folders)


def _check_folders(root: Path, pattern: str, left_out: set[str]) -> None:
    """Refuse folders that a glob leads through and that cannot be listed: it would pass over them without a word."""
    parts, folders = PurePosixPath(pattern).parts, set[str]()
    for end, part in enumerate(parts):
        if glob.has_magic(part):  # Others are looked up by their name.
            above = [*parts[:end], *[part] * (part == "**")]
            folders.update(_matching(root, "/".join([*above, ""]), "data.include") if above else ())
            if end == 0:
                folders.add("")
    for folder in sorted({folder.rstrip("/") for folder in folders} - left_out):
        try:
            os.scandir(root / folder).close()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(root / folder, error.strerror) from None


def _stat(path: Path) -> os.stat_result | None:
    """Of a regular file; None for folders, loops of links, pipes, and what vanished since it was listed.

    Raises:
        DataError: nobody may look, or nobody may read.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise _unreadable(path, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        return None
    if not os.access(path, os.R_OK):
        raise _unreadable(path, "Permission denied")
    return status


def _unreadable(path: Path, reason: str | None) -> DataError:
    return DataError(f"{path} cannot be read: {reason}.\n  Give yourself access, or leave it out with data.exclude.")


def _without_twins(found: Iterable[Found]) -> list[Shard]:
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
