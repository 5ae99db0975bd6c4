"""Check whether the shards of an index are still those that were indexed.

The fast check is one `stat` per shard: size and modification time, 32 at a time. The deep check compares the
fingerprint of every shard (size, first and last MiB) and reads some blocks again: documents are decoded and their
tokens counted. Files that were added since the build belong to no sample and are ignored.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.errors import DataError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef, ShardReader
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.composed_text import open_reader
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.shards import fingerprint_of_shard
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = [
    "ChangedShard",
    "SampledShard",
    "changed_shards",
    "check_fresh",
    "check_shard",
    "deeply_changed_shards",
    "refuse_changed",
    "sampled_shards",
]

MAX_LISTED = 5
"""Shards that an error message lists."""
STAT_THREADS = 32
SAMPLED_BLOCKS = 4
"""Blocks of every shard that the deep check reads: the first, the last, and random ones that are the same on every
call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedShard:
    """A shard that differs from what was indexed."""

    path: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledShard:
    """A shard as the deep check reads it."""

    number: int
    path: Path
    text: str | None
    """Place of the document in a row; None where rows have no text or are stored tokens."""
    first_block: int
    stop_block: int
    """One past its last block."""

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks that are read, ascending."""
        return list(_sample_blocks(np.arange(self.first_block, self.stop_block)).tolist())

    @contextlib.contextmanager
    def opened(self, index: PropertyIndex, tokenizer: Tokenizer | None) -> Iterator[ShardReader]:
        """Open a reader of the shard."""
        file_format = load_format(index.tables.shards.format[self.number])
        cache = BlockCache(seek_folders=[seek_folder_of(index.path)], max_block_bytes=sys.maxsize)
        chat = tokenizer.chat if tokenizer is not None else None
        with contextlib.closing(open_reader(file_format, self.path, self.text, cache, chat)) as reader:
            yield reader


def sampled_shards(index: PropertyIndex) -> list[SampledShard]:
    """Return every shard of an index, in order."""
    tables = index.tables
    paths = index.shard_paths()
    borders = np.searchsorted(tables.blocks.shard, np.arange(len(paths) + 1)).tolist()
    return [
        SampledShard(
            number=number,
            path=index.data_root / path,
            text=None if load_format(tables.shards.format[number]).holds_tokens else text,
            first_block=borders[number],
            stop_block=borders[number + 1],
        )
        for number, (path, text) in enumerate(zip(paths, index.shard_texts(), strict=True))
    ]


def changed_shards(index: PropertyIndex) -> list[ChangedShard]:
    """Return the shards that are missing or differ in size or modification time, in index order."""
    shards = index.tables.shards
    paths = [index.data_root / path for path in index.shard_paths()]
    # On a parallel file system a stat mostly waits, so many at once take little longer than one.
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        problems = pool.map(_stat_problem, paths, shards.size_bytes.tolist(), shards.mtime_ns.tolist())
        return _with_problems(index, problems)


def deeply_changed_shards(index: PropertyIndex, tokenizer: Tokenizer | None, comm: Communicator) -> list[ChangedShard]:
    """Return the shards whose content differs from what was indexed. **Collective.**

    Every rank checks its share of the shards. Rank 0 checks those that failed again, to name the problem, and returns
    them. Other ranks return nothing.

    Args:
        index: an open index.
        tokenizer: counts the tokens of the documents again; None skips that.
        comm: the ranks that share the work.
    """
    shards = sampled_shards(index)
    failed = np.zeros(len(shards), np.int8)
    # Round-robin, since neighbouring shards tend to have similar sizes.
    for shard in shards[comm.rank :: comm.size]:
        failed[shard.number] = bool(_content_problem(index, shard, tokenizer))
    # Strings cannot be reduced, so ranks agree on which shards failed, and rank 0 finds the words.
    failed = comm.Allreduce(failed, "max")
    if comm.rank > 0:
        return []
    problems = (_content_problem(index, shard, tokenizer) if failed[shard.number] else "" for shard in shards)
    return _with_problems(index, problems)


def check_fresh(index: PropertyIndex) -> None:
    """Refuse an index whose shards have changed.

    Raises:
        PropertyIndexError: names the first few of them.
    """
    refuse_changed(index, changed_shards(index))


def check_shard(index: PropertyIndex, shard: int, path: str) -> None:
    """Refuse a shard with another size or modification time than in the index.

    Args:
        index: an open index.
        shard: number of the shard.
        path: its path as in `index.shard_paths()`, which takes too long to call for every shard.

    Raises:
        PropertyIndexError: names it.
    """
    shards = index.tables.shards
    problem = _stat_problem(index.data_root / path, int(shards.size_bytes[shard]), int(shards.mtime_ns[shard]))
    if problem:
        refuse_changed(index, [ChangedShard(path=path, problem=problem)])


def refuse_changed(index: PropertyIndex, changed: list[ChangedShard]) -> None:
    """Raise an error if there are changed shards.

    Raises:
        PropertyIndexError: names the first few of them.
    """
    if not changed:
        return
    lines = [f"{shard.path} ({shard.problem})" for shard in changed[:MAX_LISTED]]
    if len(changed) > MAX_LISTED:
        lines.append(f"and {len(changed) - MAX_LISTED} more")
    listed = "".join(f"\n    {line}" for line in lines)
    raise PropertyIndexError(
        f"{index.path} is stale: {len(changed)} of {len(index.tables.shards.path)} shards below {index.data_root} are "
        f"not what was indexed:{listed}\n"
        "  Restore them, set data.root, or update the index with mixtera-hpc index refresh and the settings of the "
        "build. Shards whose content is the same, and only the modification time is not, stay valid in a refresh."
    )


def _with_problems(index: PropertyIndex, problems: Iterable[str]) -> list[ChangedShard]:
    pairs = zip(index.shard_paths(), problems, strict=True)
    return [ChangedShard(path=path, problem=problem) for path, problem in pairs if problem]


def _stat_problem(path: Path, size_bytes: int, mtime_ns: int) -> str:
    try:
        status = path.stat()
    except OSError as error:
        return _access_problem(error)
    if status.st_size != size_bytes:
        return _size_problem(status.st_size, size_bytes)
    # Squashfs, tar and many copies keep whole seconds. Where a file is read first, its fingerprint is compared.
    same = status.st_mtime_ns in (mtime_ns, mtime_ns - mtime_ns % 10**9)
    return "" if same else "changed since, same size"


def _access_problem(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"


def _size_problem(size_bytes: int, indexed_bytes: int) -> str:
    return f"{size_bytes} bytes, indexed with {indexed_bytes}"


def _content_problem(index: PropertyIndex, shard: SampledShard, tokenizer: Tokenizer | None) -> str:
    """Return what is wrong with the content of a shard; empty if nothing is."""
    size_bytes = int(index.tables.shards.size_bytes[shard.number])
    path = shard.path
    try:
        if path.stat().st_size != size_bytes:
            return _size_problem(path.stat().st_size, size_bytes)
        # Cheap checks first: most changes alter the size or the ends.
        if fingerprint_of_shard(path, size_bytes) != index.tables.shards.fingerprint[shard.number]:
            return "its first or last MiB differs"
        return _blocks_problem(index, shard, tokenizer)
    except OSError as error:
        return _access_problem(error)
    except DataError as error:
        # The list names the path already.
        return str(error).splitlines()[0].replace(str(path), "it")


def _blocks_problem(index: PropertyIndex, shard: SampledShard, tokenizer: Tokenizer | None) -> str:
    """Read some blocks of a shard again, and return the first problem."""
    # A shard without rows, or one that was skipped because it is damaged: there is nothing to read.
    if not shard.blocks:
        return ""
    with shard.opened(index, tokenizer) as reader:
        for block in shard.blocks:
            if shard.text is None:
                _read_payloads(index, block, reader)
                continue
            problem = _token_problem(index, block, reader, tokenizer)
            if problem:
                return problem
    return ""


def _read_payloads(index: PropertyIndex, block: int, reader: ShardReader) -> None:
    """Decode the rows of a block that have no text; raises DataError if that fails."""
    samples = index.read_block(block)
    rows = np.flatnonzero(samples.combo != index.tables.combos.bad)
    reader.payloads(BlockRef.of(index.tables.blocks, block), samples.length, rows)


def _token_problem(index: PropertyIndex, block: int, reader: ShardReader, tokenizer: Tokenizer | None) -> str:
    """Decode the documents of a block and compare their token counts."""
    tables = index.tables
    place = BlockRef.of(tables.blocks, block)
    samples = index.read_block(block)
    rows = np.flatnonzero(samples.combo != tables.combos.bad)
    texts = reader.documents(place, samples.length, rows)
    if tokenizer is None or not tables.has_tokens:
        return ""
    # `encode_batch` returns the tokens of all documents and where each ends.
    counts = np.diff(tokenizer.encode_batch(texts)[1])
    differing = np.flatnonzero(counts != samples.tokens[rows])
    if not len(differing):
        return ""
    first = differing[0]
    row = int(rows[first])
    return f"row {place.first_row + row} has {counts[first]} tokens, indexed with {samples.tokens[row]}"


def _sample_blocks(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return some of a shard's blocks, ascending."""
    if len(blocks) <= SAMPLED_BLOCKS:
        return blocks
    # Besides the ends, a random choice without replacement from those between; the shard's first block is the seed.
    words = np.random.Philox(key=int(blocks[0])).random_raw(len(blocks) - 2)
    between = 1 + np.argsort(words, kind="stable")[: SAMPLED_BLOCKS - 2]
    positions = np.sort([0, *between.tolist(), len(blocks) - 1])
    return np.asarray(blocks[positions], np.int64)
