"""Find problems of the groups `data`, `index` and `query` that can be seen without opening an index."""

import keyword
import re

from mixtera_hpc.config.check_numbers import at_least, bounds_problems
from mixtera_hpc.config.schema import DataConfig, DataSetKeys, IndexConfig, PropertyConfig, QueryConfig

__all__ = ["data_problems", "holdout_problems", "root_problems"]

BUILT_IN = ("tokens", "bytes")
"""Numbers that every sample has."""
MAX_BLOCK_ROWS = 1 << 20
MAX_CACHE_BYTES = 1 << 62
INDEX_PATH_WITHOUT_ROOT = "/index.h5"
"""Value that the default of `index.path`, `${data.root}/index.h5`, has when `data.root` is empty."""


def data_problems(data: DataConfig, index: IndexConfig) -> list[str]:
    """Return everything wrong with the data and the index, one or two sentences each."""
    problems = [
        *_sets(data),
        *_index_path(data, index),
        *_generations(index),
        *at_least("index.block_rows", index.block_rows, 1),
        *_block_rows(index),
        *at_least("index.threads", index.threads, 1),
        *_reading(data),
    ]
    for path, data_set in _places(data):
        problems += at_least(f"{path}.max_block_bytes", data_set.max_block_bytes, 1 << 16)
        for name, spec in data_set.properties.items():
            key = f"{path}.properties.{name}"
            problems += [*_pattern(key, spec.pattern), *_source_of_values(key, spec), *_name(key, name)]
        problems += _numbers(path, data_set)
    # A default of all sets that is wrong is wrong in each of them.
    return list(dict.fromkeys(problems)) + _kinds(data)


def holdout_problems(query: QueryConfig) -> list[str]:
    """Return the problem of a holdout that leaves nothing to train on."""
    if 0 <= query.holdout.fraction < 1:
        return []
    return [f"query.holdout.fraction is {query.holdout.fraction}, expected at least 0 and less than 1."]


def root_problems(data: DataConfig) -> list[str]:
    """Return the problem of an index build that has no folder to look for shards in."""
    if data.root or data.sets:
        return []
    return [
        "data.root is missing; it is the folder that the index is built from. Set it on the command line or in a "
        "config file."
    ]


def _reading(data: DataConfig) -> list[str]:
    problems = []
    if not 0 <= data.cache_bytes < MAX_CACHE_BYTES:
        problems.append(f"data.cache_bytes is {data.cache_bytes}, expected 0 to 2**62 - 1 bytes.")
    if data.max_amplification <= 0:
        problems.append(
            f"data.max_amplification is {data.max_amplification:g}, expected above 0. A large number turns it off."
        )
    return problems


def _index_path(data: DataConfig, index: IndexConfig) -> list[str]:
    if not index.path.strip() and not index.paths:
        return ["index.path is empty. Set it to the file of the index, or leave it out: then it is below data.root."]
    if index.path != INDEX_PATH_WITHOUT_ROOT or data.root or index.paths:
        return []
    return ["index.path is missing: without data.root it has no default. Set index.path or data.root."]


def _block_rows(index: IndexConfig) -> list[str]:
    if index.block_rows <= MAX_BLOCK_ROWS:
        return []
    return [
        f"index.block_rows is {index.block_rows}, expected at most {MAX_BLOCK_ROWS}: a block is the smallest part of a "
        "shard that is shuffled."
    ]


def _generations(index: IndexConfig) -> list[str]:
    num_indexes = len(index.paths_to_read)
    if not index.generations or len(index.generations) == num_indexes:
        return []
    return [
        f"index.generations has {len(index.generations)} entries, but {num_indexes} indexes are read. Give one "
        "fingerprint for each of them, '' for its newest state."
    ]


def _places(data: DataConfig) -> list[tuple[str, DataSetKeys]]:
    """Return the data sets that are indexed, each with its place in the configuration."""
    if not data.sets:
        return [("data", data)]
    return [(f"data.sets.{name}", data_set) for name, data_set in data.sets.items()]


def _sets(data: DataConfig) -> list[str]:
    problems = [
        f"data.sets has {name!r}: {root!r}, expected a name and a folder."
        for name, root in data.roots().items()
        if not name or not root
    ]
    for path, data_set in _places(data) if data.sets else []:
        if "dataset" in data_set.properties:
            where = "data" if "dataset" in data.properties else path
            problems.append(
                f"{where}.properties.dataset is the name of the data set with data.sets. Give the property another "
                "name."
            )
    return list(dict.fromkeys(problems))


def _kinds(data: DataConfig) -> list[str]:
    """Refuse a property that is a number in one data set and a category in another."""
    first: dict[str, tuple[str, str]] = {}
    problems = []
    for path, data_set in _places(data):
        for name, spec in data_set.properties.items():
            other, kind = first.setdefault(name, (path, spec.kind))
            if kind != spec.kind:
                problems.append(
                    f"{path}.properties.{name} is a {spec.kind}, but {other}.properties.{name} is a {kind}. A property "
                    "has one kind in all data sets. Give one of them another name or kind."
                )
    return problems


def _pattern(key: str, pattern: str | None) -> list[str]:
    try:
        re.compile(pattern or "")
    except re.error as error:
        return [f"{key}.pattern is {pattern!r}, which is no regular expression: {error}."]
    return []


def _source_of_values(key: str, spec: PropertyConfig) -> list[str]:
    sources = [source for source in (spec.path, spec.function, spec.number) if source is not None]
    if len(sources) != 1:
        return [f"{key} needs either a path in the row or a function over documents, or a number with buckets."]
    if spec.function is not None and spec.pattern is not None:
        return [f"{key} has a function and a pattern. Apply the pattern inside the function."]
    if spec.function is None and spec.over == "rows":
        return [f"{key} has over: rows, but no function. Give the function, or remove over."]
    return _buckets(key, spec)


def _buckets(key: str, spec: PropertyConfig) -> list[str]:
    """Check the buckets of a number."""
    if (spec.number is None) != (spec.buckets is None):
        missing = "buckets" if spec.buckets is None else "number"
        return [f"{key} has no {missing}. Buckets are written {{number: quality, buckets: [0, 0.5, 1]}}."]
    if spec.buckets is None:
        return []
    if spec.kind != "category" or spec.pattern is not None:
        return [f"{key} is a bucket of {spec.number}, which is a category without a pattern. Remove kind and pattern."]
    return bounds_problems(f"{key}.buckets", spec.buckets)


def _numbers(path: str, data_set: DataSetKeys) -> list[str]:
    """Check that buckets are of numbers, as far as the configuration knows the number."""
    problems = []
    for name, spec in data_set.properties.items():
        source = data_set.properties.get(spec.number or "")
        if source is not None and source.kind != "number":
            problems.append(
                f"{path}.properties.{name} has buckets of {spec.number}, which is a {source.kind}. Give that property "
                "kind: number."
            )
    return problems


def _name(key: str, name: str) -> list[str]:
    """Check that queries can use the name."""
    if name in BUILT_IN:
        return [f"{key}: {name} is a built-in number of every sample. Give the property another name."]
    if name.isidentifier() and not keyword.iskeyword(name) and name != "null":
        return []
    return [f"{key} is not a usable name. Use letters, digits and _, and no keyword of Python."]
