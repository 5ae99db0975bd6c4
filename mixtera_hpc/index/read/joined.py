"""Join several indexes into one: block tables concatenated, properties merged.

A property that an index does not have is null there. The built-in property `dataset` distinguishes the indexes: it is
the name of the index file, unless the index was built from named data sets and has the property already. Shard paths
are absolute. A joined index has no generations, but each of its indexes may be opened at one. Price: a copy of
the block tables. Every rank opens an index file when it reads the first sample of it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.data_sets import DataSetFacts
from mixtera_hpc.index.layout import DATASET, BadRows
from mixtera_hpc.index.read.joined_samples import open_samples
from mixtera_hpc.index.read.joined_tables import first_samples, first_shards, join_tables
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.sample_reader import SampleSource

__all__ = ["JoinedIndex", "join_indexes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedIndex(PropertyIndex):
    """Several open indexes behind the interface of one."""

    members: Sequence[SampleSource]
    """The joined indexes, in order."""
    absolute_paths: Sequence[str]
    """Absolute paths of all shards."""
    texts: Sequence[str | None]
    """Place of the document in a row, of all shards."""
    datasets: Sequence[str]
    """Value of the property `dataset`, of all shards."""

    @property
    def fingerprints(self) -> list[str]:
        """Return the fingerprint of each joined index, in order."""
        return [member.fingerprint for member in self.members]

    def shard_paths(self) -> list[str]:
        """Return the absolute path of every shard."""
        return list(self.absolute_paths)

    def shard_datasets(self) -> list[str]:
        """Return the value of the property `dataset` for every shard."""
        return list(self.datasets)

    def shard_texts(self) -> list[str | None]:
        """Return the place of the document in a row, for every shard; None where rows have no text."""
        return list(self.texts)

    def sample_sources(self) -> list[SampleSource]:
        """Return what any rank needs to read the samples; see `open_samples`."""
        return list(self.members)


def join_indexes(indexes: Sequence[PropertyIndex]) -> JoinedIndex:
    """Join open indexes, and close their files.

    Raises:
        PropertyIndexError: they differ in the tokenizer or the kind of a property, or two have the same name.
    """
    _check_compatible(indexes)
    names = _dataset_names(indexes)
    tables, joined_combos = join_tables([index.tables for index in indexes], names)
    members = _sample_sources(indexes, joined_combos, sorted(tables.blocks.zones))
    # The tables are copied now. Samples are read through `samples`, which opens the files on demand.
    for index in indexes:
        index.close()

    first = indexes[0]
    sets: Mapping[str, DataSetFacts] = {}
    # Data sets of different indexes may have one name.
    roots = {f"{number}/{name}": root for number, index in enumerate(indexes) for name, root in index.roots.items()}
    return JoinedIndex(
        path=first.path,
        roots=roots,
        tables=tables,
        fingerprint=_joined_fingerprint(indexes, names),
        sets=sets,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        bad=_bad_rows(indexes),
        generations=(),
        chunk_rows=first.chunk_rows,
        samples=open_samples(members),
        members=members,
        absolute_paths=[str((index.data_root / path).absolute()) for index in indexes for path in index.shard_paths()],
        texts=[text for index in indexes for text in index.shard_texts()],
        datasets=[own or name for name, index in zip(names, indexes, strict=True) for own in index.shard_datasets()],
    )


def _sample_sources(
    indexes: Sequence[PropertyIndex], joined_combos: Sequence[NDArray[np.int64]], numbers: list[str]
) -> list[SampleSource]:
    offsets = first_samples([index.tables.blocks for index in indexes])
    return [
        SampleSource(
            path=str(index.path),
            fingerprint=index.fingerprint,
            first_sample=offset,
            combos=combos.tolist(),
            numbers=numbers,
        )
        for index, offset, combos in zip(indexes, offsets, joined_combos, strict=True)
    ]


def _check_compatible(indexes: Sequence[PropertyIndex]) -> None:
    """Refuse indexes that one run cannot read together."""
    # Setting → the first index that has it, and its value there. Only properties may be missing in an index.
    # Texts, parsers and the sources of properties are those of each index.
    first_value: dict[str, tuple[Path, str | None]] = {}
    differing = []
    for index in indexes:
        settings = {"the tokenizer": index.tokenizer_fingerprint}
        settings |= {f"the kind of {prop.name}": str(prop.kind) for prop in index.tables.properties.values()}
        for name, value in settings.items():
            path, expected = first_value.setdefault(name, (index.path, value))
            if value != expected:
                differing.append(f"\n  - {name}: {expected} in {path}, {value} in {index.path}")
    if differing:
        raise PropertyIndexError(
            f"These indexes cannot be read together in one run:{''.join(differing)}\n"
            "  Build them with one dataplane.tokenizer, and give each property one kind, or two properties two names."
        )


def _dataset_names(indexes: Sequence[PropertyIndex]) -> list[str]:
    """Return the `dataset` of each index's samples, used where the index does not have that property itself."""
    names = [index.path.stem for index in indexes]
    # Indexes over named data sets have the property already, so the name of their file does not matter.
    unnamed = [name for name, index in zip(names, indexes, strict=True) if DATASET not in index.tables.properties]
    has_duplicates = len(set(unnamed)) < len(unnamed)
    if has_duplicates or len({index.path.absolute() for index in indexes}) < len(indexes):
        raise PropertyIndexError(
            f"Two of the indexes {', '.join(str(index.path) for index in indexes)} have the same name. The name of the "
            "file is the dataset of its samples.\n  Rename one of the files, or build it with data.sets={NAME: DIR}."
        )
    return names


def _joined_fingerprint(indexes: Sequence[PropertyIndex], names: Sequence[str]) -> str:
    # Names count: they are values of the property `dataset`, on which queries depend.
    text = "".join(f"{name} {index.fingerprint} " for name, index in zip(names, indexes, strict=True))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _bad_rows(indexes: Sequence[PropertyIndex]) -> list[BadRows]:
    """Return the skipped rows of all indexes, with joined shard numbers."""
    shards = first_shards([index.tables.shards for index in indexes])
    return [
        replace(rows, shard=rows.shard + first)
        for first, index in zip(shards, indexes, strict=True)
        for rows in index.bad
    ]
