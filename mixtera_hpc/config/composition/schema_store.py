"""The schema in Hydra's ConfigStore: the first entry of every composition, on which config files only set differences.

OmegaConf's structured configs know neither `Literal` nor recursive types nor our short forms. So the store gets plain
nodes with the defaults of the dataclasses, and `config/convert.py` checks the types afterwards. A mapping whose keys
belong to the user (`data.properties`, `cluster.env`) is marked as open, so that it takes new keys without Hydra's `+`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from mixtera_hpc.config.convert import NOT_GIVEN, to_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.schema.composed_default import composed_default

__all__ = ["SCHEMA_NAME", "register_schema", "schema_defaults"]

SCHEMA_NAME = "mixtera_schema"
"""Name under which `conf/config.yaml` lists the schema among its defaults."""


def register_schema() -> None:
    """Put the defaults of all keys into Hydra's ConfigStore, unless they are there."""
    store = ConfigStore.instance()
    if f"{SCHEMA_NAME}.yaml" not in store.list(""):
        store.store(name=SCHEMA_NAME, node=_node(Config, schema_defaults()), provider="mixtera_hpc")


def schema_defaults(cls: type = Config) -> dict[str, Any]:
    """Return the default of every key of the dataclass `cls` as nested dicts, as Hydra composes it.

    Interpolations are not resolved. A key without a default is `???`.
    """
    hints = typing.get_type_hints(cls)
    return {spec.name: _default(spec, hints[spec.name]) for spec in dataclasses.fields(cls)}


def _default(spec: "dataclasses.Field[Any]", hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return schema_defaults(typing.cast(type, hint))
    if (composed := composed_default(spec)) is not None:
        return composed
    if spec.default_factory is not dataclasses.MISSING:
        return to_plain(spec.default_factory())
    return NOT_GIVEN if spec.default is dataclasses.MISSING else spec.default


def _node(cls: Any, defaults: Mapping[str, Any]) -> DictConfig:
    """Build the OmegaConf node of a dataclass, with its mappings open."""
    hints = typing.get_type_hints(cls)
    content: dict[str, Any] = {}
    for name, value in defaults.items():
        if dataclasses.is_dataclass(hints[name]):
            content[name] = _node(hints[name], value)
        elif get_origin(hints[name]) is dict:
            content[name] = DictConfig(value, flags={"struct": False})
        else:
            content[name] = value
    return DictConfig(content)
