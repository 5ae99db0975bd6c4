"""An index file, opened: its tables at once, its samples when they are asked for.

Only the process that plans opens an index; every other rank has a `SampleReader`. Costs what reading the tables does.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.errors import PropertyIndexError
from mixtera_hpc.index.layout import children, get_text, read_texts
from mixtera_hpc.index.open_file import DAMAGE, damaged, open_file
from mixtera_hpc.index.read.generations import tables_of_generation
from mixtera_hpc.index.read.sample_reader import SampleReader
from mixtera_hpc.index.read.tables import read_bad_rows, read_generations, read_tables

__all__ = ["PropertyIndex", "open_index"]

DataRoots = str | Mapping[str, str] | None
"""Where the shards lie now: a folder, or one for each data set; None: where they lay at the build."""


class PropertyIndex:
    """An open index. Closing it leaves the tables usable."""

    def __init__(self, path: Path, file: h5py.File, data_root: DataRoots) -> None:
        self.path = path
        self.roots = _roots(file["roots"], data_root, path)
        """Data set → folder; a single root is called ''."""
        self.tables = read_tables(file, tuple(self.roots))
        self.fingerprint = get_text(file, "fingerprint")
        """Hex digest of all content; neither the data root nor times of change are in it."""
        self.tokenizer_fingerprint = get_text(file, "tokenizer") or None
        self.parser = get_text(file, "parser") or None
        self.sources = {name: get_text(group, "source") for name, group in children(file["properties"]).items()}
        """Property → where its values come from."""
        self.chunk_rows = int(file.attrs["chunk_rows"])
        self.bad = read_bad_rows(file["bad"])
        self.generations = read_generations(file["generations"])
        """States that the index begins with, oldest first; the last is the whole."""
        self.text = get_text(file, "text") or None
        """Dotted path to the document; None when samples have none."""
        self.samples = SampleReader(path)

    @property
    def data_root(self) -> Path:
        """The folder of all shards; with several, the file system's root, since `shard_paths` are absolute then."""
        return self.roots.get("", Path("/"))

    def shard_paths(self) -> list[str]:
        """What every shard is called: its path below `data_root`."""
        shards = self.tables.shards
        if "" in self.roots:
            return list(shards.path)
        pairs = zip(shards.dataset, shards.path, strict=True)
        return [str(self.roots[dataset].absolute() / path) for dataset, path in pairs]

    def go_back(self, fingerprint: str) -> None:
        """See what there was before the last refreshes; nothing to do when that is what there is.

        Raises:
            PropertyIndexError: the index does not begin with a state of that fingerprint.
        """
        if fingerprint and self.fingerprint.startswith(fingerprint):
            return
        found = next((g for g in self.generations if fingerprint and g.fingerprint.startswith(fingerprint)), None)
        if found is None:
            known = ", ".join(
                dict.fromkeys(f[:12] for f in (*(g.fingerprint for g in self.generations), self.fingerprint))
            )
            raise PropertyIndexError(
                f"{self.path} does not begin with a state {fingerprint[:12]!r}; it has {known}.\n  Shards of that state were "
                "changed or deleted, a property was derived, or the index was built again: start a new run, or put the old file back."
            )
        self.tables, self.fingerprint = tables_of_generation(self.tables, found), found.fingerprint

    def read_block(self, block: int) -> SampleColumns:
        """The samples of one block."""
        blocks = self.tables.blocks
        return self.samples.read(int(blocks.first_sample[block]), int(blocks.rows[block]))

    def read_blocks(self, chosen: NDArray[np.int32], only: Collection[str] | None = None) -> SampleColumns:
        """The samples of some blocks, one block after the other; `only` as for `SampleReader.read_many`."""
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


def open_index(path: str | Path, data_root: DataRoots = None, generation: str | None = None) -> PropertyIndex:
    """Open an index and load its tables.

    Args:
        data_root: where the shards lie now, when not where they lay at the build: a folder, or one for each data set.
        generation: the beginning of the fingerprint of an earlier state, which is then all that is seen.

    Raises:
        PropertyIndexError: there is none, it is damaged or cut short, or of another version.
    """
    path = Path(path)
    with open_file(path) as file:
        try:
            index = PropertyIndex(path, file, data_root)
        except DAMAGE as error:
            raise damaged(path, error) from None
    if generation is not None:
        index.go_back(generation)
    return index


def _roots(group: h5py.Group, given: DataRoots, path: Path) -> dict[str, Path]:
    stored = dict(zip(read_texts(group, "dataset"), read_texts(group, "path"), strict=True))
    if not given:
        return {name: Path(root) for name, root in stored.items()}
    roots = {"": given} if isinstance(given, str) else dict(given)
    if roots.keys() != stored.keys():
        have, want = (", ".join(sorted(names)) or "none" for names in (set(stored) - {""}, set(roots) - {""}))
        raise PropertyIndexError(
            f"{path} was built from the data sets {have}, but data.sets names {want}.\n"
            "  Give every one of them its folder in data.sets (a single unnamed one in data.root), or build again."
        )
    return {name: Path(roots[name]) for name in stored}
