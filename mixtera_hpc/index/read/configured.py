"""Open the indexes that a configuration names, and decide where their shards are.

A configured `data.root` (or `data.sets`) wins. Without one, the data root stored in the index is used. An index file
can name any folder, and a run reads that folder with the user's permissions. So the stored root is accepted only if the
index file belongs to the user, or if the root is below one of `index.trusted_roots`. The place of the file itself gives
no trust: whoever can write there could name a private folder of the user in it.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mixtera_hpc.config.schema import Config, DataConfig, DataSetKeys
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.chat_rows import without_template
from mixtera_hpc.formats.composed_text import FUNCTION_PREFIX, ComposedText
from mixtera_hpc.index.data_sets import data_set_key
from mixtera_hpc.index.layout import path_source
from mixtera_hpc.index.read.joined import join_indexes
from mixtera_hpc.index.read.open import PropertyIndex, open_index, read_stored_roots

__all__ = ["check_stored_roots", "open_configured", "open_written"]

LOGGER = logging.getLogger("mixtera_hpc")


def open_configured(config: Config, *, reads_shards: bool = True, announce: bool = True) -> PropertyIndex:
    """Open the indexes of `index.paths` at `index.generations`, joined into one if there are several.

    `data.root`, `data.sets`, `data.text` and `data.properties` describe one index: the only one, or among several the
    one at `index.path`.

    Args:
        config: a checked configuration.
        reads_shards: False if only the index is read; then its stored data root does not have to be trusted.
        announce: whether to log a stored data root; one rank should.

    Raises:
        ConfigError: `data.root` is set, but the index that it describes is none of `index.paths`.
        PropertyIndexError: an index is missing or damaged, it was built with other settings than those of
            `config.data`, its data root is not trusted, or the indexes do not fit together.
    """
    paths = config.index.paths_to_read
    # The empty generation is the newest state.
    generations = config.index.generations or [""] * len(paths)
    described = _described_position(config)
    indexes = []
    for position, (path, generation) in enumerate(zip(paths, generations, strict=True)):
        # The keys of `data` describe one index. The others use their own settings and stored roots.
        data = config.data if position == described else DataConfig()
        index = open_index(path, data.roots() or data.root or None, generation, config.data.largest_block_bytes())
        if position == described:
            _check_build_settings(index, data)
        if reads_shards:
            _check_text_functions(config, index)
        if reads_shards and not _has_root(data):
            _accept_stored_roots(index.path, index.roots.values(), config.index.trusted_roots, announce)
        indexes.append(index)
    return indexes[0] if len(indexes) == 1 else join_indexes(indexes)


def open_written(config: Config, *, announce: bool = True) -> PropertyIndex:
    """Open `index.path`, which `index build`, `refresh` and `derive` write; `announce` as in `open_configured`.

    Raises:
        PropertyIndexError: as for `open_configured`.
    """
    data = config.data
    index = open_index(config.index.path, data.roots() or data.root or None, max_bytes=data.largest_block_bytes())
    _check_text_functions(config, index)
    if not _has_root(data):
        _accept_stored_roots(index.path, index.roots.values(), config.index.trusted_roots, announce)
    return index


def check_stored_roots(config: Config) -> None:
    """Check the stored data roots that a run of `config` will use, before it starts.

    An index that does not exist yet is skipped.

    Raises:
        ConfigError, PropertyIndexError: as for `open_configured`.
    """
    described = _described_position(config)
    for position, path in enumerate(config.index.paths_to_read):
        has_root = position == described and _has_root(config.data)
        if not has_root and Path(path).is_file():
            _accept_stored_roots(Path(path), read_stored_roots(path), config.index.trusted_roots, announce=True)


def _check_text_functions(config: Config, index: PropertyIndex) -> None:
    """Refuse to import a function that only an index file names, and one that has changed since the build.

    Raises:
        ConfigError: the function cannot be imported.
        PropertyIndexError: the configuration does not name the function that makes the documents, or its source file
            has changed.
    """
    named = {config.data.text, *(data_set.text for data_set in config.data.sets.values())}
    for dataset, facts in index.sets.items():
        if facts.text is None or not facts.text.startswith(FUNCTION_PREFIX):
            continue
        if facts.text not in named:
            raise PropertyIndexError(
                f"The documents of {index.path} are made by a function. A function is imported only if the "
                f"configuration names it.\n  Set {data_set_key(dataset, 'text')}={facts.text}."
            )
        if ComposedText.of(facts.text).digest != facts.text_digest:
            raise PropertyIndexError(
                f"The source file of {facts.text.removeprefix(FUNCTION_PREFIX)}, which makes the documents of "
                f"{index.path}, has changed since the index was built.\n"
                "  Restore the file, or run mixtera-hpc index build again."
            )


def _has_root(data: DataConfig) -> bool:
    return bool(data.root or data.sets)


def _described_position(config: Config) -> int | None:
    """Return the position, among the indexes to read, of the one that `config.data` describes; None if it is not read.

    Raises:
        ConfigError: `data.root` or `data.sets` would have no effect.
    """
    paths = [Path(path).absolute() for path in config.index.paths_to_read]
    own = Path(config.index.path).absolute()
    if len(paths) == 1:
        return 0
    if own in paths:
        return paths.index(own)
    if _has_root(config.data):
        key = "data.sets" if config.data.sets else "data.root"
        raise ConfigError(
            f"{key} gives the shards of index.path={config.index.path}, but runs read index.paths="
            f"{config.index.paths}.\n"
            f"  Remove {key}: every index stores where its shards are. Or add index.path to index.paths."
        )
    return None


def _accept_stored_roots(path: Path, roots: Iterable[Path], trusted_roots: Sequence[str], announce: bool) -> None:
    """Accept and log the data roots stored in the index at `path`, or refuse them."""
    # Resolve links, so that a link below a trusted folder cannot lead out of it.
    trusted = [Path(folder).expanduser().resolve() for folder in trusted_roots]
    # The owner of the file can name any folder in it.
    is_own = path.stat().st_uid == os.geteuid()
    for root in roots:
        if not is_own and not any(root.resolve().is_relative_to(folder) for folder in trusted):
            raise PropertyIndexError(
                f"data.root is not set, and {path}, which belongs to another user, names the data root {root}. A "
                "stored data root is used only if the index file is yours, or if the root is below one of "
                "index.trusted_roots.\n"
                f"  Set data.root={root}, or add the folder to index.trusted_roots."
            )
        if announce:
            _log_stored_root(root, path)


@functools.cache
def _log_stored_root(root: Path, path: Path) -> None:
    """Log a stored data root, once per process and index: a verb may open an index several times."""
    LOGGER.info("data.root is %s, as stored in %s", root, path)


def _check_build_settings(index: PropertyIndex, data: DataConfig) -> None:
    """Refuse settings that only a build reads and that differ from those the index was built with."""
    named = data.named_sets()
    differing = [
        difference
        # Without names, the keys are those of all data sets.
        for dataset in index.sets
        for difference in _differences(index, dataset, named.get(dataset, data))
    ]
    if differing:
        lines = "".join(f"\n  - {key} is {given!r}, the index has {stored!r}" for key, given, stored in differing)
        raise PropertyIndexError(
            f"{index.path} was built with other settings:{lines}\n"
            "  Use the settings of the build, or rebuild the index."
        )


def _differences(index: PropertyIndex, dataset: str, data: DataSetKeys) -> Iterator[tuple[str, str | None, str | None]]:
    """Yield the key, the given value and the stored value of every setting of a data set that differs."""
    facts = index.sets[dataset]
    # A run does not have to repeat the settings of the build, so the default of `data.text` is not compared.
    stored_text = without_template(facts.text)
    if data.text not in (DataConfig().text, stored_text):
        yield data_set_key(dataset, "text"), data.text, stored_text
    for name, spec in data.properties.items():
        # Computed properties have no path; `index derive` and `index refresh` compare their functions.
        if name in facts.sources and spec.path is not None:
            given = f"{spec.kind} {path_source(spec.path, spec.pattern)}"
            stored = f"{index.tables.properties[name].kind} {facts.sources[name]}"
            if given != stored:
                yield data_set_key(dataset, f"properties.{name}"), given, stored
