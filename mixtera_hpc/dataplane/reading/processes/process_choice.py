"""Whether a rank reads in processes of its own; decision 008 has the reasons."""

from collections.abc import Sequence

from mixtera_hpc.config.schema import Config

__all__ = ["may_use_processes"]

BINARY_FORMATS = frozenset({"mds", "webdataset"})
"""Formats whose rows are mostly images and other bytes."""


def may_use_processes(config: Config, formats: Sequence[str]) -> bool:
    """Return whether reading processes may be started, given the format of every shard."""
    if config.dataplane.workers is not None:
        return config.dataplane.workers > 0
    if config.mixture.unit == "tokens":
        return True
    # What a function returns perhaps cannot be sent between processes, and sending images takes longer than reading.
    return config.data.transform is None and BINARY_FORMATS.isdisjoint(formats)
