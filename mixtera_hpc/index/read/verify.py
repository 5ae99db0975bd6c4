"""Whether the shards are still those that were indexed.

Fast: one `stat` per shard, size and time of change, some dozen at a time. Deep: the fingerprint of every shard (its size, first
and last MiB), and some blocks read again, their documents decoded and their tokens counted. Files that were added since are
nobody's samples, and no reason to refuse.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.errors import DataError, PropertyIndexError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.block_cache import BlockCache
from mixtera_hpc.formats.codecs.seek_points import seek_folder_of
from mixtera_hpc.formats.registry import load_format
from mixtera_hpc.index.build.discover import fingerprint_of_shard
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["ChangedShard", "changed_shards", "check_fresh", "deeply_changed_shards", "refuse_changed"]

NAMED = 5
STATS_AT_ONCE = 32
SAMPLED_BLOCKS = 4
"""Of every shard: the first, the last, and others anywhere, the same ones on every rank and every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedShard:
    """A shard that is not what was indexed."""

    path: str
    problem: str


def changed_shards(index: PropertyIndex, root: Path | None = None) -> list[ChangedShard]:
    """The shards that are gone or differ in size or time of change, in index order.

    Args:
        root: where to look; the index's own data root when None.
    """
    shards, root = index.tables.shards, root or index.data_root
    facts = zip(index.shard_paths(), shards.size_bytes.tolist(), shards.mtime_ns.tolist(), strict=True)
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        problems = pool.map(lambda fact: _problem(root / fact[0], *fact[1:]), facts)
        return _named(index, problems)


def deeply_changed_shards(index: PropertyIndex, tokenizer: Tokenizer | None, comm: Communicator) -> list[ChangedShard]:
    """The shards whose content differs from what was indexed, as far as samples show. **Collective.**

    Every rank looks at its share; rank 0 looks again at those that failed, and returns them; others return nothing.

    Args:
        tokenizer: counts the tokens of the documents again; None leaves that out.
    """
    count = len(index.tables.shards.path)
    failed = np.zeros(count, np.int8)
    for shard in range(comm.rank, count, comm.size):
        failed[shard] = bool(_deep_problem(index, shard, tokenizer))
    failed = comm.Allreduce(failed, "max")
    if comm.rank > 0:
        return []
    return _named(index, (_deep_problem(index, i, tokenizer) if failed[i] else "" for i in range(count)))


def check_fresh(index: PropertyIndex) -> None:
    """Refuse an index whose shards have changed.

    Raises:
        PropertyIndexError: names the first few of them.
    """
    refuse_changed(index, changed_shards(index))


def refuse_changed(index: PropertyIndex, changed: list[ChangedShard]) -> None:
    """Raise for changed shards; nothing when there are none.

    Raises:
        PropertyIndexError: names the first few of them.
    """
    if not changed:
        return
    named = [f"{shard.path} ({shard.problem})" for shard in changed[:NAMED]]
    named += [f"and {len(changed) - NAMED} more"] if len(changed) > NAMED else []
    listed = "".join(f"\n    {line}" for line in named)
    raise PropertyIndexError(
        f"{index.path} is stale: {len(changed)} of {len(index.tables.shards.path)} shards below {index.data_root} are not "
        f"what was indexed:{listed}\n"
        "  Bring them back, set data.root, or bring the index up to date with mixtera-hpc index refresh and the settings it "
        "was built with."
    )


def _named(index: PropertyIndex, problems: Iterable[str]) -> list[ChangedShard]:
    pairs = zip(index.shard_paths(), problems, strict=True)
    return [ChangedShard(path=path, problem=problem) for path, problem in pairs if problem]


def _problem(path: Path, size_bytes: int, mtime_ns: int) -> str:
    try:
        status = path.stat()
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    if status.st_size != size_bytes:
        return f"{status.st_size} bytes, indexed with {size_bytes}"
    return "" if status.st_mtime_ns == mtime_ns else "changed since, same size"


def _deep_problem(index: PropertyIndex, shard: int, tokenizer: Tokenizer | None) -> str:
    """What is wrong with the content of a shard; empty when nothing was found."""
    shards = index.tables.shards
    path = index.data_root / index.shard_paths()[shard]
    try:
        if path.stat().st_size != shards.size_bytes[shard]:
            return f"{path.stat().st_size} bytes, indexed with {shards.size_bytes[shard]}"
        if fingerprint_of_shard(path, int(shards.size_bytes[shard])) != shards.fingerprint[shard]:
            return "its first or last MiB differs"
        return _blocks_problem(index, shard, tokenizer)
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    except DataError as error:
        return str(error).splitlines()[0].replace(str(path), "it")


def _blocks_problem(index: PropertyIndex, shard: int, tokenizer: Tokenizer | None) -> str:
    tables, path = index.tables, index.data_root / index.shard_paths()[shard]
    has_texts = index.text is not None and not load_format(tables.shards.format[shard]).holds_tokens
    first, last = np.searchsorted(tables.blocks.shard, [shard, shard + 1])
    reader = load_format(tables.shards.format[shard]).open(
        path, index.text, BlockCache(seek_folders=[seek_folder_of(index.path)])
    )
    try:
        for block in _sampled(np.arange(first, last)).tolist():
            place = BlockRef.of(tables.blocks, block)
            samples = index.read_block(block)
            rows = np.flatnonzero(samples.combo != tables.combos.bad)
            if not has_texts:
                reader.payloads(place, samples.length, rows)
                continue
            texts = reader.documents(place, samples.length, rows)
            if tokenizer is None or not tables.has_tokens:
                continue
            counts = np.diff(tokenizer.encode_batch(texts)[1])
            other = np.flatnonzero(counts != samples.tokens[rows])
            if len(other):
                row = int(rows[other[0]])
                return f"row {place.first_row + row} has {counts[other[0]]} tokens, indexed with {samples.tokens[row]}"
    finally:
        reader.close()
    return ""


def _sampled(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Some of a shard's blocks, ascending."""
    if len(blocks) <= SAMPLED_BLOCKS:
        return blocks
    words = np.random.Philox(key=int(blocks[0])).random_raw(len(blocks) - 2)
    chosen = 1 + np.argsort(words, kind="stable")[: SAMPLED_BLOCKS - 2]
    return np.asarray(blocks[np.sort([0, *chosen.tolist(), len(blocks) - 1])], np.int64)
