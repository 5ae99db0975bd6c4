"""The meaning of a dotted path, the same in every format.

At every level of a row, the key that is the whole rest of the path comes first (`{"meta.language": …}`, as pandas and
`datasets` flatten rows), then the key before the first dot, with the rest of the path below it. A key that is missing,
or a value that is no object, has nothing below it: the property is null. A file in which both forms of one path have
values is refused, because half of its rows would be taken from the wrong one.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from mixtera_hpc.formats.shard_errors import ShardLayoutError

__all__ = ["check_path_forms", "path_forms"]


def path_forms(path: str) -> list[tuple[str, ...]]:
    """Return every chain of keys that a dotted path may stand for, the first one that exists wins.

    `a.b.c` stands for `a.b.c`, `a` → `b.c`, and `a` → `b` → `c`.
    """
    parts = path.split(".")
    return [(*parts[:i], ".".join(parts[i:])) for i in range(len(parts))]


def check_path_forms(shard: Path, used: Mapping[str, Collection[int]]) -> None:
    """Refuse a shard in which two forms of a path have values.

    Args:
        shard: the file.
        used: path → the forms that had values, as positions in `path_forms`.

    Raises:
        ShardLayoutError: there is such a path.
    """
    for path, numbers in used.items():
        if len(numbers) > 1:
            forms = " and ".join(" → ".join(map(repr, path_forms(path)[number])) for number in sorted(numbers))
            raise ShardLayoutError(
                f"{shard} has values for more than one meaning of the path {path!r}: {forms}.\n"
                "  Rename one of the keys, or use a parser (data.parser) that returns the right one."
            )
