"""YAML files that are written here mean the same to every reader."""

from pathlib import Path

import pytest

from mixtera_hpc.config.yaml_files import dump_yaml, load_yaml, parse_yaml_text, read_yaml

WORDS = [
    *("308870072333", "012345678901", "12345e678901", "1e5", "-1E+5", "0e0", "1.e5", ".5", "1_000", "0x1f", "007"),
    *("true", "no", "null", "~", "nan", "inf", ".inf", "10:20", "2024-01-01", "1.2.3", "e1", "1e", "", " a", "a: b"),
    *("a\x85b", "\u2028", "a\u2029"),
]


@pytest.mark.parametrize("word", WORDS)
def test_texts_stay_texts_for_all_readers(word: str, tmp_path: Path) -> None:
    """OmegaConf and Hydra read 1e5 as a number, and PyYAML does not."""
    plain = {"text": word, "list": [word], word or "key": 1}
    path = tmp_path / "file.yaml"
    path.write_text(dump_yaml(plain))
    assert load_yaml(path) == read_yaml(path) == plain


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    plain = {"numbers": [0, -7, 1e-05, 2.5e300, 0.1, True, None]}
    path = tmp_path / "file.yaml"
    path.write_text(dump_yaml(plain))
    assert load_yaml(path) == read_yaml(path) == plain


@pytest.mark.parametrize("word", ["308870072333", "012", "1e5", "true", "nan", "2024-01-01"])
def test_a_text_is_read_as_typed(word: str) -> None:
    assert parse_yaml_text("key", word) == parse_yaml_text("key", f"'{word}'") == word
    assert parse_yaml_text("key", f"[{word}, x]") == [word, "x"]
    assert parse_yaml_text("key", "null") is None
