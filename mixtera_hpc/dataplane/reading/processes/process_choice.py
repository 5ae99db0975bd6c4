"""The choice between reading processes and a reading thread; decision 008 has the reasons."""

from collections.abc import Sequence

from mixtera_hpc.config.schema import Config

__all__ = ["may_use_processes"]

BINARY_FORMATS = frozenset({"mds", "webdataset"})
"""Formats whose rows are mostly images and other bytes."""


def may_use_processes(config: Config, formats: Sequence[str]) -> bool:
    """Return True if reading processes may be started, given the format of every shard."""
    if config.dataplane.workers is not None:
        return config.dataplane.workers > 0
    if config.mixture.unit == "tokens":
        return True
    # The results of a transform may not be picklable, and sending images takes longer than reading them.
    return config.data.transform is None and BINARY_FORMATS.isdisjoint(formats)
