"""The page of all keys, `docs/config.md`."""

import re
from pathlib import Path

import pytest

from mixtera_hpc.config import reference
from mixtera_hpc.config.key_paths import SchemaKey, schema_keys

DOCS = Path(__file__).resolve().parents[2] / "docs"
NESTED_KEYS = [key for cls, _, _ in reference.NESTED for key in schema_keys(cls)]


def test_the_page_is_current() -> None:
    page = (DOCS / "config.md").read_text()

    assert page == reference.render_reference(), "run: python -m mixtera_hpc.config.reference > docs/config.md"


@pytest.mark.parametrize("key", [*schema_keys(), *NESTED_KEYS], ids=lambda key: f"{key.owner.__name__}.{key.path}")
def test_every_key_has_a_description(key: SchemaKey) -> None:
    text = reference.description(key.owner, key.path.rpartition(".")[2])

    assert text.endswith((".", ")."))
    assert len(text.split()) >= 2


def test_every_key_is_on_the_page() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", reference.render_reference(), re.MULTILINE)

    assert set(rows) == {key.path for key in [*schema_keys(), *NESTED_KEYS] if not key.is_group}


def test_pages_that_descriptions_refer_to_exist() -> None:
    names = re.findall(r"\]\((\w+\.md)\)", reference.render_reference())

    assert names
    assert [name for name in names if not (DOCS / name).is_file()] == []
