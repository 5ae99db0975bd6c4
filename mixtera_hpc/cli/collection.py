"""Compose configurations, and open indexes, for the verbs that need nothing of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixtera_hpc.config.check import check_build, check_data
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config

if TYPE_CHECKING:
    from mixtera_hpc.index.read.open import PropertyIndex

__all__ = ["compose_build", "compose_data", "open_collection"]


def compose_data(overrides: Sequence[str]) -> Config:
    """Compose a configuration, and check data, index and mixture; a tokenizer is not required."""
    config = from_plain(Config, compose_plain(overrides))
    check_data(config)
    return config


def compose_build(overrides: Sequence[str]) -> Config:
    """Compose a configuration for `index build` or `index refresh`, which need a data root."""
    config = from_plain(Config, compose_plain(overrides))
    check_build(config)
    return config


def open_collection(
    overrides: Sequence[str], *, reads_shards: bool = False, announce: bool = True
) -> "tuple[Config, PropertyIndex]":
    """Compose a configuration and open the indexes it reads; see `open_configured`."""
    # h5py takes 0.2 s to import, which `--help` should not pay.
    from mixtera_hpc.index.read.configured import open_configured

    config = compose_data(overrides)
    return config, open_configured(config, reads_shards=reads_shards, announce=announce)
