"""Read the samples of one or several indexes through one reader."""

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from mixtera_hpc.core.index_tables import SampleColumns
from mixtera_hpc.index.read.sample_reader import SampleReader, SampleSource

__all__ = ["JoinedSampleReader", "open_samples"]


def open_samples(sources: Sequence[SampleSource], cache_bytes: int = 0) -> SampleReader:
    """Return a reader of the samples of all sources; `cache_bytes` as in `SampleReader`."""
    if len(sources) == 1:
        return SampleReader(sources[0].path, sources[0].fingerprint, cache_bytes)
    return JoinedSampleReader(sources, cache_bytes)


class JoinedSampleReader(SampleReader):
    """Forwards each block to the reader of the index that contains it, and renumbers its combos."""

    def __init__(self, sources: Sequence[SampleSource], cache_bytes: int) -> None:
        super().__init__(sources[0].path)
        # An equal share each: all indexes of a mixture are read at random.
        own_cache_bytes = cache_bytes // len(sources)
        self._sources = sources
        self._readers = [SampleReader(source.path, source.fingerprint, own_cache_bytes) for source in sources]
        self._first_samples = np.array([source.first_sample for source in sources])
        self._joined_combos = [np.array(source.combos, np.int32) for source in sources]

    def read_many(
        self, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None = None
    ) -> SampleColumns:
        """Read the samples of several blocks and concatenate them; see `SampleReader.read_many`."""
        # Index of the last source that begins at or before each sample.
        owners = np.searchsorted(self._first_samples, first_samples, side="right") - 1
        # One read per run of consecutive blocks that are in the same index.
        changes = (np.flatnonzero(np.diff(owners)) + 1).tolist()
        results = [
            self._read_from(int(owners[start]), first_samples[start:stop], rows[start:stop], only)
            for start, stop in zip([0, *changes], [*changes, len(owners)], strict=True)
            if start < stop
        ]
        self.bytes_read = sum(reader.bytes_read for reader in self._readers)
        return _concatenate(results, results[0].numbers if results else self._sources[0].numbers or [])

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()

    def _read_from(
        self, owner: int, first_samples: Sequence[int], rows: Sequence[int], only: Collection[str] | None
    ) -> SampleColumns:
        """Read blocks of one index, and translate them to joined combos and numbers."""
        offset = int(self._first_samples[owner])
        columns = self._readers[owner].read_many([first - offset for first in first_samples], rows, only)
        # A number that this index does not have is null in all its samples.
        null = np.full(len(columns.combo), np.nan)
        # Built-in numbers are returned only if they were requested.
        names = {*(self._sources[owner].numbers or []), *columns.numbers}
        return SampleColumns(
            combo=self._joined_combos[owner][columns.combo],
            length=columns.length,
            tokens=columns.tokens,
            numbers={name: columns.numbers.get(name, null) for name in names},
        )


def _concatenate(results: Sequence[SampleColumns], numbers: Iterable[str]) -> SampleColumns:
    if len(results) == 1:
        return results[0]
    return SampleColumns(
        combo=np.concatenate([np.zeros(0, np.int32), *(r.combo for r in results)]),
        length=np.concatenate([np.zeros(0, np.int64), *(r.length for r in results)]),
        tokens=np.concatenate([np.zeros(0, np.int64), *(r.tokens for r in results)]),
        numbers={name: np.concatenate([np.zeros(0), *(r.numbers[name] for r in results)]) for name in numbers},
    )
