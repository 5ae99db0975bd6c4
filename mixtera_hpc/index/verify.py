"""Whether the shards are still those that were indexed.

One `stat` per shard: size and time of change, never content. Files that were added since are nobody's samples, and no reason
to refuse.
"""

from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.open import PropertyIndex

__all__ = ["ChangedShard", "changed_shards", "check_fresh"]

NAMED = 5


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
    found = ((path, _problem(root / path, size, mtime)) for path, size, mtime in facts)
    return [ChangedShard(path=path, problem=problem) for path, problem in found if problem]


def check_fresh(index: PropertyIndex) -> None:
    """Refuse an index whose shards have changed.

    Raises:
        PropertyIndexError: names the first few of them.
    """
    changed = changed_shards(index)
    if not changed:
        return
    named = [f"{shard.path} ({shard.problem})" for shard in changed[:NAMED]]
    named += [f"and {len(changed) - NAMED} more"] if len(changed) > NAMED else []
    listed = "".join(f"\n    {line}" for line in named)
    raise PropertyIndexError(
        f"{index.path} is stale: {len(changed)} of {len(index.tables.shards.path)} shards below {index.data_root} are not "
        f"what was indexed:{listed}\n"
        "  Bring them back, set data.root, or build it again: mixtera-hpc index build with the same settings."
    )


def _problem(path: Path, size_bytes: int, mtime_ns: int) -> str:
    try:
        status = path.stat()
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
    if status.st_size != size_bytes:
        return f"{status.st_size} bytes, indexed with {size_bytes}"
    return "" if status.st_mtime_ns == mtime_ns else "changed since, same size"
