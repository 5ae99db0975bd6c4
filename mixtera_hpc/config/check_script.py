"""Find values that a batch script cannot hold: each `#SBATCH` parameter is one line, and names of variables are words.

All other texts are quoted for the shell when the script is rendered.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixtera_hpc.config.schema import Config

__all__ = ["script_problems"]

_JOB_KEYS = (
    *("name", "account", "partition", "qos", "constraint", "reservation", "mem", "comment", "exclude", "dependency"),
)

_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"


def script_problems(config: Config) -> list[str]:
    """Return everything that the batch script of `config` could not hold, one or two sentences each."""
    texts: dict[str, Any] = {f"job.{name}": getattr(config.job, name) for name in _JOB_KEYS}
    texts |= {
        "run.root": config.run.root,
        "cluster.name": config.cluster.name,
        "cluster.mpi": config.cluster.mpi,
        "cluster.container_flag": config.cluster.container_flag,
        "cluster.container_mpi": config.cluster.container_mpi,
        "cluster.uenv_flag": config.cluster.uenv_flag,
        "environment.image": config.environment.image,
        "environment.mpi": config.environment.mpi,
        "environment.python": config.environment.python,
        "environment.venv": config.environment.venv,
        "environment.view": config.environment.view,
        "cluster.sbatch": config.cluster.sbatch,
        "cluster.srun_args": config.cluster.srun_args,
        "job.srun_args": config.job.srun_args,
    }
    return [
        *(_control_character(path, text) for path, text in _texts(texts) if _has_control_character(text)),
        *_words("cluster.env", config.cluster.env, _VARIABLE, "the name of a variable"),
        *_words("cluster.container_env", config.cluster.container_env, _VARIABLE, "the name of a variable"),
        *_words("cluster.sbatch", config.cluster.sbatch, r"[a-z][a-z0-9_-]*", "a parameter of sbatch"),
    ]


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text inside `value`, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence):
        for i, part in enumerate(value):
            yield from _texts(part, f"{path}[{i}]")


def _has_control_character(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)


def _control_character(path: str, text: str) -> str:
    return f"{path} is {text!r}, expected text on one line without control characters."


def _words(path: str, mapping: Mapping[str, Any], pattern: str, what: str) -> list[str]:
    return [
        f"{path} has the key {name!r}, which is not {what}."
        for name in mapping
        if not re.fullmatch(pattern, str(name), re.ASCII)
    ]
