"""The files of `conf/`: they say what differs from the schema, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtera_hpc.config.composition.conf_folders import conf_dir
from mixtera_hpc.config.composition.schema_store import schema_defaults
from mixtera_hpc.config.key_paths import groups

GROUPS = [
    *("checkpoint", "cluster", "data", "dataplane", "environment", "experiment", "index", "job", "mixture", "track"),
    *("sweep", "training"),
]
FILES = [path for group in groups() for path in sorted((conf_dir() / group).glob("*.yaml"))]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(conf_dir())))
def test_a_file_of_a_group_holds_differences_only(path: Path) -> None:
    plain = read(path)
    base = schema_defaults()[path.parent.name]
    for entry in plain.pop("defaults", []):
        base = base | read(path.parent / f"{entry}.yaml")

    assert {key: value for key, value in plain.items() if base.get(key, "") == value} == {}


def test_every_group_has_a_file_to_choose() -> None:
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()} - {"hydra"}

    assert folders == set(GROUPS)
    assert all(any((conf_dir() / group).glob("*.yaml")) for group in GROUPS)
