"""Find the shards: expand globs below the data roots, in an order that does not depend on the file system.

Price: one `stat` per matching file. Paths are relative to their root and contain no `..`. Links inside a root are
followed.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mixtera_hpc.config.schema import DataConfig, DataSetKeys
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.formats.registry import SUFFIXES, companion_of, format_name_of, load_format
from mixtera_hpc.index.build.globs import (
    check_listed_folders,
    dangling_link_error,
    expand_glob,
    leads_nowhere,
    unreadable_path_error,
)
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
        DataError: a root is not a folder or has no shards, a glob matches nothing below any root, a link leads
            nowhere, a file or folder may not be read, or a file is matched under two names.
    """
    # Refuse an unknown format by name before looking for its files.
    sets = data.named_sets()
    for data_set in sets.values():
        if data_set.format != "auto":
            load_format(data_set.format)

    searches = [_RootSearch(root, name, sets[name]) for name, root in roots_of(data).items()]
    shards_of_root = [search.search() for search in searches]
    _check_globs(searches)
    # A data set without shards would be a domain that is missing from every mixture.
    for search, shards in zip(searches, shards_of_root, strict=True):
        if not shards:
            raise search.no_shards_error()
    return _without_duplicates([pair for shards in shards_of_root for pair in shards])


def _check_globs(searches: Sequence["_RootSearch"]) -> None:
    """Refuse a glob of `data.include` that matches nothing below any of its roots.

    Data sets need not have files for every glob: one of them may be a compressed copy and another a plain one.
    """
    matched = {pattern for search in searches for pattern in search.matched}
    for search in searches:
        for pattern in search.data.include:
            if pattern not in matched:
                using = [other for other in searches if pattern in other.data.include]
                key = f"data.sets.{search.dataset}.include" if len(using) < len(searches) else "data.include"
                raise DataError(
                    f"{key} has {pattern!r}, which matches no file below {', '.join(str(s.root) for s in using)}.\n"
                    "  Correct it, or remove it. {a,b} in a glob stands for either a or b."
                )


@dataclass(frozen=True, slots=True)
class _RootSearch:
    """The search for shards below one data root."""

    root: Path
    dataset: str
    data: DataSetKeys
    matched: set[str] = field(default_factory=set)
    """The globs of `data.include` that have matched a file."""

    def search(self) -> list[ShardFile]:
        """Return the shards, sorted by path."""
        if not self.root.is_dir():
            key = f"data.sets.{self.dataset}" if self.dataset else "data.root"
            raise DataError(
                f"{key} is {str(self.root)!r}, which is not a folder.\n  Give the folder that contains the data files."
            )
        excluded = {
            path.rstrip("/")
            for pattern in self.data.exclude
            for path in expand_glob(self.root, pattern, "data.exclude")
        }
        shards: dict[str, ShardFile] = {}
        for pattern in self.data.include:
            matches = expand_glob(self.root, pattern, "data.include")
            check_listed_folders(self.root, pattern, excluded)
            # A later glob adds only what earlier ones have not matched.
            new = self._shards_of(pattern, matches, excluded, shards)
            shards |= {pair[0].path: pair for pair in new}
        return [shards[path] for path in sorted(shards)]

    def no_shards_error(self) -> DataError:
        """Build the error for a root without shards."""
        data_set = f"data.sets.{self.dataset}: no" if self.dataset else "No"
        return DataError(
            f"{data_set} data file below {self.root}: data.include is {', '.join(self.data.include)}.\n"
            f"  Known suffixes: {_suffixes()}; .txt and .json only if a glob names them, as in "
            "data.include=['**/*.txt']."
        )

    def _shards_of(
        self, pattern: str, matches: list[str], excluded: set[str], known: Mapping[str, ShardFile]
    ) -> Iterator[ShardFile]:
        """Yield the shards that one glob adds to the known ones, given all its matches."""
        only_stars = set(PurePosixPath(pattern).name) == {"*"}
        if only_stars:
            self.matched.add(pattern)
        # Sorted, so that errors name the same file everywhere.
        for path in sorted(matches):
            if path in known:
                self.matched.add(pattern)
                continue
            status = _stat_file(self.root / path, is_excluded=path in excluded)
            if status is None:
                continue
            # An excluded file counts as a match: the glob itself is correct. So does a file that is read with another.
            self.matched.add(pattern)
            if path in excluded or self._is_companion(path):
                continue
            name = self._format_of(path, pattern, only_stars)
            if name is not None:
                yield self._shard(path, name, status)

    def _is_companion(self, path: str) -> bool:
        """Return True for a file that is read together with the shard beside it.

        Raises:
            DataError: that shard is missing.
        """
        shard = companion_of(path, self.data.format)
        if shard is None:
            return False
        if shard == "" or (self.root / shard).exists():
            return True
        if self.data.format == "megatron":
            raise DataError(
                f"{self.root / path} describes {PurePosixPath(shard).name}, which is not beside it.\n"
                "  Copy both files again, or leave this one out with data.exclude."
            )
        return False

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
        # The index stores nanoseconds since 1970 in 64 bits.
        if not -(2**63) <= status.st_mtime_ns < 2**63:
            raise DataError(
                f"The modification time of {path!r} is outside of the years 1678 to 2262.\n  Set it: touch FILE."
            )
        shard = Shard(
            path=path,
            format=name,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            dataset=self.dataset,
        )
        return shard, (status.st_dev, status.st_ino)


def _stat_file(path: Path, *, is_excluded: bool) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else, and for files deleted since they were listed.

    Raises:
        DataError: the file may not be read, or is a link that leads nowhere; excluded files are not checked.
    """
    try:
        status = path.stat()
    except OSError as error:
        is_too_long = error.errno == errno.ENAMETOOLONG  # No other call takes the path either.
        if is_excluded:
            return None if is_too_long else path.lstat()
        if is_too_long:
            raise unreadable_path_error(path, error.strerror) from None
        if leads_nowhere(path):
            raise dangling_link_error(path) from None
        # Deleted since it was listed, or a link to a folder above it, which can be followed forever.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise unreadable_path_error(path, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        return None
    # Check now, because the scan may reach this file only after an hour.
    if not is_excluded and not os.access(path, os.R_OK):
        raise unreadable_path_error(path, "Permission denied")
    return status


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
