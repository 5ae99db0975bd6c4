"""The page of all verbs, `docs/cli.md`."""

from pathlib import Path

from mixtera_hpc.cli import reference
from mixtera_hpc.cli.main import VERBS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference.render_reference(), "run: make reference"


def test_every_verb_has_a_section_with_its_arguments() -> None:
    sections = reference.render_reference().split("\n### ")[1:]

    assert [section.split("\n")[0] for section in sections] == list(VERBS)
    assert all("\n| `" in section for section in sections if not section.startswith(("check", "doctor")))
