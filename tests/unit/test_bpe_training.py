"""Training a custom tokenizer."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import load_tokenizer

DOCUMENTS = [f"some words and {i} numbers, {'xyz' * (i % 5)}" for i in range(200)]


def test_the_same_documents_give_the_same_file_in_another_process(tmp_path: Path) -> None:
    first = train_bpe(DOCUMENTS, 320, tmp_path / "a.json").read_bytes()
    program = (
        "import sys; from mixtera_hpc.tokens.bpe_training import train_bpe\n"
        "train_bpe([f\"some words and {i} numbers, {'xyz' * (i % 5)}\" for i in range(200)], 320, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "b.json"], check=True, timeout=600)
    assert (tmp_path / "b.json").read_bytes() == first


def test_every_byte_and_every_frequent_word_has_a_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_bpe(DOCUMENTS, 320, tmp_path / "t.json"))
    assert tokenizer.vocab_size == 320 and tokenizer.eos_id == 0
    assert len(tokenizer.encode_batch([" words"])[0]) == 1
    assert len(tokenizer.encode_batch(["\u0001\u00ff漢"])[0]) == 6


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        train_bpe(DOCUMENTS, 100, tmp_path / "t.json")


def test_no_temporary_file_remains(tmp_path: Path) -> None:
    train_bpe(DOCUMENTS, 260, tmp_path / "sub" / "t.json")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["t.json"]
