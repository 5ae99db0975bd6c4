"""Defaults that are taken from another key or from the environment while Hydra composes."""

from dataclasses import MISSING, Field, field
from typing import Any

__all__ = ["composed_default", "composed_from"]


def composed_from(expression: str, default: Any = MISSING) -> Any:
    """Return a dataclass field whose default is the OmegaConf interpolation `expression` when Hydra composes.

    Args:
        expression: for example `${cluster.mem}`.
        default: the value of the field where Python code builds the dataclass. Without one it is required.
    """
    if default is MISSING:
        return field(metadata={"composed": expression})
    return field(default=default, metadata={"composed": expression})


def composed_default(spec: "Field[Any]") -> str | None:
    """Return the expression given to `composed_from`, or None for a field with a plain default."""
    return spec.metadata.get("composed")
