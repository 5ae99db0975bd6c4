"""Open an index file: load its tables, and read its samples block by block on request.

Only the process that plans opens an index. Every other rank reads samples through a `SampleReader`. Opening costs one
read of all tables, about 20 µs per block.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import IndexTables, SampleColumns
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.formats.codecs.block_cache import MAX_BLOCK_BYTES
from mixtera_hpc.index.data_sets import DataSetFacts, merged_sources
from mixtera_hpc.index.layout import BadRows, Generation, read_text
from mixtera_hpc.index.open_file import DAMAGE, damaged, open_file
from mixtera_hpc.index.read.generations import tables_of_generation
from mixtera_hpc.index.read.sample_reader import SampleReader, SampleSource
from mixtera_hpc.index.read.tables import read_bad_rows, read_data_sets, read_generations, read_tables
from mixtera_hpc.index.table_values import check_generations, check_range

__all__ = ["DataRoots", "PropertyIndex", "open_index", "read_stored_roots"]

DataRoots = str | Mapping[str, str] | None
"""Current folder of the shards, or one folder per data set; None: the place they had when the index was built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PropertyIndex:
    """An open index. Its tables stay usable after `close`."""

    path: Path
    roots: Mapping[str, Path]
    """Data set → folder of its shards; a single unnamed data set has the name ''."""
    tables: IndexTables
    fingerprint: str
    """Hex digest of the content. It does not depend on the data root or on modification times."""
    sets: Mapping[str, DataSetFacts]
    """The facts about each data set, by name."""
    tokenizer_fingerprint: str | None
    """The tokenizer that counted the tokens; None when tokens were not counted."""
    bad: Sequence[BadRows]
    """The rows that the build skipped."""
    generations: Sequence[Generation]
    """The states that this file begins with, oldest first; the last is the newest."""
    chunk_rows: int
    """Rows per chunk of the sample columns."""
    samples: SampleReader

    @property
    def text(self) -> str | None:
        """Return the place of the document in a row; None if data sets differ or rows have no text."""
        texts = set(self.shard_texts())
        return texts.pop() if len(texts) == 1 else None

    @property
    def sources(self) -> dict[str, str]:
        """Return property → where its values come from, for people to read."""
        return merged_sources(self.sets)

    @property
    def data_root(self) -> Path:
        """Return the folder that `shard_paths` are relative to; `/` if they are absolute, with several data sets."""
        return self.roots.get("", Path("/"))

    @property
    def fingerprints(self) -> list[str]:
        """Return the fingerprint of each index file that was opened, in order."""
        return [self.fingerprint]

    def shard_paths(self) -> list[str]:
        """Return the path of every shard, relative to `data_root`."""
        shards = self.tables.shards
        # Data sets with names may lie anywhere, so only absolute paths identify their shards.
        if "" in self.roots:
            return list(shards.path)
        pairs = zip(shards.dataset, shards.path, strict=True)
        return [str(self.roots[dataset].absolute() / path) for dataset, path in pairs]

    def shard_datasets(self) -> list[str]:
        """Return the name of the data set of every shard."""
        shards = self.tables.shards
        return list(shards.dataset) or [""] * len(shards.path)

    def shard_texts(self) -> list[str | None]:
        """Return the place of the document in a row, for every shard; None where rows have no text."""
        return [self.sets[dataset].text for dataset in self.shard_datasets()]

    def sample_sources(self) -> list[SampleSource]:
        """Return what any rank needs to read the samples; see `open_samples`."""
        return [SampleSource(path=str(self.path), fingerprint=self.fingerprint)]

    def read_block(self, block: int) -> SampleColumns:
        """Read the samples of one block."""
        blocks = self.tables.blocks
        return self.samples.read(int(blocks.first_sample[block]), int(blocks.rows[block]))

    def read_blocks(self, chosen: NDArray[np.int32], only: Collection[str] | None = None) -> SampleColumns:
        """Read the samples of several blocks and concatenate them; `only` as in `SampleReader.read_many`."""
        blocks = self.tables.blocks
        return self.samples.read_many(blocks.first_sample[chosen].tolist(), blocks.rows[chosen].tolist(), only)

    def close(self) -> None:
        """Close the file."""
        self.samples.close()

    def __enter__(self) -> "PropertyIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_index(
    path: str | Path,
    data_root: DataRoots = None,
    generation: str | None = None,
    max_bytes: int = MAX_BLOCK_BYTES,
) -> PropertyIndex:
    """Open an index and load its tables.

    If `data_root` is None, the stored data root is used without a check; `read.configured` checks if it is trusted.

    Args:
        path: the index file.
        data_root: where the shards are now, if they have moved since the build: one folder, or one per data set.
        generation: the first characters of an earlier state's fingerprint; only that state is visible then.
        max_bytes: `data.max_block_bytes`, see `open_file`.

    Raises:
        PropertyIndexError: the file is missing, damaged, truncated, too large or of another version, or has no such
            generation.
    """
    path = Path(path)
    with open_file(path, max_bytes) as file:
        # Reading a damaged file may fail anywhere below, with any of h5py's errors.
        try:
            return _read_index(file, path, data_root, generation)
        except DAMAGE as error:
            raise damaged(path, error) from None


def read_stored_roots(path: str | Path) -> list[Path]:
    """Return the data roots stored in an index, without loading its tables.

    Raises:
        PropertyIndexError: as for `open_index`.
    """
    path = Path(path)
    with open_file(path) as file:
        try:
            return [Path(data_set.root) for data_set in read_data_sets(file["sets"]).values()]
        except DAMAGE as error:
            raise damaged(path, error) from None


def _read_index(file: h5py.File, path: Path, data_root: DataRoots, generation: str | None) -> PropertyIndex:
    sets = read_data_sets(file["sets"])
    roots = _current_roots(sets, data_root, path)
    generations = read_generations(file["generations"])
    tables = read_tables(file, tuple(roots))
    check_generations(generations, tables)
    bad = read_bad_rows(file["bad"])
    check_range("bad/shard", np.array([rows.shard for rows in bad], np.int64), 0, len(tables.shards.path) - 1)
    fingerprint = read_text(file, "fingerprint")

    # The newest state is the whole file, also if its own fingerprint is given.
    if generation and not fingerprint.startswith(generation):
        chosen = _find_generation(path, generations, fingerprint, generation)
        tables = tables_of_generation(tables, chosen)
        fingerprint = chosen.fingerprint

    return PropertyIndex(
        path=path,
        roots=roots,
        tables=tables,
        fingerprint=fingerprint,
        sets=sets,
        tokenizer_fingerprint=read_text(file, "tokenizer") or None,
        bad=bad,
        generations=generations,
        chunk_rows=int(file.attrs["chunk_rows"]),
        samples=SampleReader(path),
    )


def _find_generation(path: Path, generations: Sequence[Generation], newest: str, prefix: str) -> Generation:
    """Return the generation whose fingerprint begins with `prefix`.

    Raises:
        PropertyIndexError: there is none.
    """
    for generation in generations:
        if generation.fingerprint.startswith(prefix):
            return generation

    fingerprints = [*(generation.fingerprint for generation in generations), newest]
    # Without repetitions, in order: the newest state may also be the last generation.
    known = dict.fromkeys(fingerprint[:12] for fingerprint in fingerprints)
    raise PropertyIndexError(
        f"{path} has no generation {prefix[:12]!r}; it has {', '.join(known)}.\n"
        "  Shards of that generation were changed or deleted, a property was derived, or the index was rebuilt. Start "
        "a new run, or restore the old index file."
    )


def _current_roots(sets: Mapping[str, DataSetFacts], given: DataRoots, path: Path) -> dict[str, Path]:
    """Return the folder of every data set: the given ones, or those stored in the index."""
    stored = {name: data_set.root for name, data_set in sets.items()}
    if not given:
        return {name: Path(root) for name, root in stored.items()}
    roots = {"": given} if isinstance(given, str) else dict(given)
    # Shards are stored relative to their data set, so each one needs a folder.
    if roots.keys() != stored.keys():
        built_from = ", ".join(sorted(stored.keys() - {""})) or "none"
        configured = ", ".join(sorted(roots.keys() - {""})) or "none"
        raise PropertyIndexError(
            f"{path} was built from the data sets {built_from}, but data.sets names {configured}.\n"
            "  Give the folder of each data set in data.sets (of a single unnamed one in data.root), or rebuild the "
            "index."
        )
    return {name: Path(roots[name]) for name in stored}
