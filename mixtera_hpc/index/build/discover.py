"""Find the shards: expand globs below the data roots, in an order that does not depend on the file system.

Price: one `stat` per matching file. Paths are relative to their root and contain no `..`. Links inside a root are
followed.
"""

import errno
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mixtera_hpc.config.schema import DataConfig, DataSetKeys
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.registry import SUFFIXES, format_name_of, load_format
from mixtera_hpc.index.shards import Shard

__all__ = ["discover_shards", "roots_of"]

FileId = tuple[int, int]
"""Device and inode, which identify a file under any name."""
ShardFile = tuple[Shard, FileId]


def roots_of(data: DataConfig) -> dict[str, Path]:
    """Return the data root of every data set; a single root without a name has the name ''."""
    return {name: Path(data_set.root) for name, data_set in data.named_sets().items()}


def discover_shards(data: DataConfig) -> list[Shard]:
    """Return the shards of a data collection, sorted by data set and path.

    Hidden files never match. A glob whose last part consists of stars skips files of unknown format, and plain text
    and `.json` files, which usually describe the data. Any other glob includes every file that it matches.

    Raises:
        ConfigError: a glob leaves the data root, or matches a file of unknown format.
        DataError: a root is not a folder, a glob matches nothing, or a file is matched under two names.
    """
    # Refuse an unknown format by name before looking for its files.
    sets = data.named_sets()
    for data_set in sets.values():
        if data_set.format != "auto":
            load_format(data_set.format)

    roots = roots_of(data)
    shards = [pair for name, root in roots.items() for pair in _RootSearch(root, name, sets[name]).search()]
    if not shards:
        where = ", ".join(map(str, roots.values()))
        raise DataError(
            f"No data file below {where}: data.include is {', '.join(data.include)}.\n  Known suffixes: {_suffixes()}; "
            ".txt and .json only if a glob names them, as in data.include=['**/*.txt']."
        )
    return _without_duplicates(shards)


@dataclass(frozen=True, slots=True)
class _RootSearch:
    """The search for shards below one data root."""

    root: Path
    dataset: str
    data: DataSetKeys

    def search(self) -> list[ShardFile]:
        """Return the shards, sorted by path."""
        if not self.root.is_dir():
            key = f"data.sets.{self.dataset}" if self.dataset else "data.root"
            raise DataError(
                f"{key} is {str(self.root)!r}, which is not a folder.\n  Give the folder that contains the data files."
            )
        excluded = {
            path.rstrip("/") for pattern in self.data.exclude for path in _expand(self.root, pattern, "data.exclude")
        }
        shards: dict[str, ShardFile] = {}
        for pattern in self.data.include:
            _check_folders(self.root, pattern, excluded)
            # A later glob adds only what earlier ones have not matched.
            shards |= {pair[0].path: pair for pair in self._shards_of(pattern, excluded, shards)}
        return [shards[path] for path in sorted(shards)]

    def _shards_of(self, pattern: str, excluded: set[str], known: Mapping[str, ShardFile]) -> Iterator[ShardFile]:
        """Yield the shards that one glob adds to the known ones."""
        num_matches = 0
        only_stars = set(PurePosixPath(pattern).name) == {"*"}
        # Sorted, so that errors name the same file everywhere.
        for path in sorted(_expand(self.root, pattern, "data.include")):
            if path in known:
                num_matches += 1
                continue
            status = _stat_file(self.root / path)
            if status is None:
                continue
            num_matches += 1
            # An excluded file counts as a match: the glob itself is correct.
            if path in excluded:
                continue
            name = self._format_of(path, pattern, only_stars)
            if name is not None:
                yield self._shard(path, name, status)
        if not num_matches and not only_stars:
            raise DataError(
                f"data.include has {pattern!r}, which matches no file below {self.root}.\n  Correct it, or remove it."
            )

    def _format_of(self, path: str, pattern: str, only_stars: bool) -> str | None:
        """Return the format of a file; None if a glob of stars matched it and it should be skipped."""
        is_auto = self.data.format == "auto"
        name = format_name_of(path) if is_auto else self.data.format
        # Otherwise READMEs and data set descriptions would become samples.
        if name in ("text", "json") and only_stars and is_auto:
            return None
        if name is None and not only_stars:
            raise ConfigError(
                f"data.include has {pattern!r}, which matches {path!r}, a file of unknown format.\n"
                f"  Known suffixes: {_suffixes()}. Set data.format to read it as one of these formats."
            )
        return name

    def _shard(self, path: str, name: str, status: os.stat_result) -> ShardFile:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"The file name {path!r} is not UTF-8. Rename the file, or leave it out with data.exclude."
            ) from None
        shard = Shard(
            path=path,
            format=name,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            dataset=self.dataset,
        )
        return shard, (status.st_dev, status.st_ino)


def _expand(root: Path, pattern: str, key: str) -> list[str]:
    """Return the paths that a glob matches, relative to `root`."""
    if PurePosixPath(pattern).is_absolute() or ".." in PurePosixPath(pattern).parts:
        raise ConfigError(f"{key} has {pattern!r}, expected a glob below data.root, without '..'.")
    return glob.glob(pattern, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib does not follow links to folders)


def _check_folders(root: Path, pattern: str, excluded: set[str]) -> None:
    """Refuse a folder that the glob has to list but cannot: `glob` would skip it silently."""
    for folder in sorted(_listed_folders(root, pattern) - excluded):
        try:
            os.scandir(root / folder).close()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(root / folder, error.strerror) from None


def _listed_folders(root: Path, pattern: str) -> set[str]:
    """Return the folders that the expansion of a glob lists, relative to `root`; '' is the root."""
    parts = PurePosixPath(pattern).parts
    folders = set[str]()
    for i, part in enumerate(parts):
        # A part without wildcards is looked up by name, so no folder is listed for it.
        if not glob.has_magic(part):
            continue
        # `**` also lists the folders that it matches; any other wildcard lists only the folders before it.
        above = parts[: i + 1] if part == "**" else parts[:i]
        if above:
            # The empty last part restricts the glob to folders.
            folders.update(_expand(root, "/".join([*above, ""]), "data.include"))
        if i == 0:
            folders.add("")
    return {folder.rstrip("/") for folder in folders}


def _stat_file(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else, and for files deleted since they were listed.

    Raises:
        DataError: the file may not be read.
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
    # Check now, because the scan may reach this file only after an hour.
    if not os.access(path, os.R_OK):
        raise _unreadable(path, "Permission denied")
    return status


def _unreadable(path: Path, reason: str | None) -> DataError:
    return DataError(f"{path} cannot be read: {reason}.\n  Change its permissions, or leave it out with data.exclude.")


def _without_duplicates(shards: Iterable[ShardFile]) -> list[Shard]:
    """Return the shards; refuse a file with two paths (through links), whose samples would be counted twice."""
    path_of_file: dict[FileId, str] = {}
    unique = []
    for shard, file_id in shards:
        if file_id in path_of_file:
            raise DataError(
                f"{path_of_file[file_id]!r} and {shard.path!r} are the same file; its samples would be counted twice.\n"
                "  Leave one of them out with data.exclude."
            )
        path_of_file[file_id] = shard.path
        unique.append(shard)
    return unique


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))
