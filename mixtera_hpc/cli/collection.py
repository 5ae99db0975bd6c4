"""Opening what verbs look at: a configuration and the index it names, nothing of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.index.open import PropertyIndex

__all__ = ["compose_data", "open_collection"]


def compose_data(overrides: Sequence[str]) -> "Config":
    """Compose, and check data, index and mixture; a tokenizer is not asked for."""
    from mixtera_hpc.config.check import check_data
    from mixtera_hpc.config.compose import compose_plain
    from mixtera_hpc.config.convert import from_plain
    from mixtera_hpc.config.schema import Config

    config = from_plain(Config, compose_plain(overrides))
    check_data(config)
    return config


def open_collection(overrides: Sequence[str]) -> "tuple[Config, PropertyIndex]":
    """The configuration and its index; without `data.root` the shards are where the index says they were."""
    from mixtera_hpc.config.check import check_data
    from mixtera_hpc.config.compose import compose_plain
    from mixtera_hpc.config.convert import from_plain
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.index.open import open_index

    plain = compose_plain(overrides)
    root = plain["data"]["root"]
    index = open_index(plain["index"]["path"], None if root == "???" else root)
    plain["data"]["root"] = str(index.data_root)
    config = from_plain(Config, plain)
    check_data(config)
    return config, index
