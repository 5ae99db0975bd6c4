"""Opening what verbs look at: a configuration and the index it names, nothing of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.index.read.open import PropertyIndex

__all__ = ["compose_data", "open_collection"]


def compose_data(overrides: Sequence[str]) -> "Config":
    """Compose, and check data, index and mixture; a tokenizer is not asked for."""
    from mixtera_hpc.config.check import check_build

    config = _config(_plain(overrides))
    check_build(config)
    return config


def open_collection(overrides: Sequence[str]) -> "tuple[Config, PropertyIndex]":
    """The configuration and its index; without `data.root` the shards are where the index says they were."""
    from mixtera_hpc.config.check import check_data
    from mixtera_hpc.index.read.joined import open_configured

    config = _config(_plain(overrides))
    index = open_configured(config)
    if not config.data.root and not config.data.sets:
        config = replace(config, data=replace(config.data, root=str(index.data_root)))
    check_data(config)
    return config, index


def _plain(overrides: Sequence[str]) -> dict[str, Any]:
    from mixtera_hpc.config.compose import compose_plain

    return compose_plain(overrides)


def _config(plain: dict[str, Any]) -> "Config":
    from mixtera_hpc.config.convert import from_plain
    from mixtera_hpc.config.schema import Config

    return from_plain(Config, plain)
