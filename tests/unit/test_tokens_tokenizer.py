"""Both tokenizer libraries implement one protocol, tested on tokenizers trained here."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, pre_tokenizers, processors

from mixtera_hpc.errors import ConfigError
from mixtera_hpc.testing.tokenizers import CHECKS, DOCUMENTS
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import (
    EncodingSettings,
    GigatokenTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    check_same_encoding,
    load_tokenizer,
)

LIBRARIES = [GigatokenTokenizer, HuggingFaceTokenizer]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(DOCUMENTS[:60], 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.mark.parametrize("library", LIBRARIES)
def test_tokens_decode_to_the_documents(library: Callable[[bytes], Tokenizer], path: Path) -> None:
    tokens, offsets = library(path.read_bytes()).encode_batch(DOCUMENTS)
    decoder = HfTokenizer.from_file(str(path))
    encoded = [tokens[start:stop].tolist() for start, stop in itertools.pairwise(offsets)]
    assert [decoder.decode(ids, skip_special_tokens=False) for ids in encoded] == DOCUMENTS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_conforms_to_the_protocol(
    library: Callable[[bytes], Tokenizer], check: Callable[[Tokenizer], None], path: Path
) -> None:
    check(library(path.read_bytes()))


def test_both_libraries_encode_equally(path: Path) -> None:
    definition = path.read_bytes()
    check_same_encoding(GigatokenTokenizer(definition), HuggingFaceTokenizer(definition), DOCUMENTS)


def test_the_first_document_that_two_tokenizers_encode_differently_is_shown(path: Path, tmp_path: Path) -> None:
    other = train_bpe(["entirely different words " * 20], 300, tmp_path / "other.json")
    with pytest.raises(ConfigError, match=r"The quick brown fox no\. 0"):
        check_same_encoding(load_tokenizer(path), load_tokenizer(other), DOCUMENTS)


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_special_token_is_added_and_nothing_is_truncated(library: Callable[[bytes], Tokenizer], path: Path) -> None:
    wrapped = HfTokenizer.from_file(str(path))
    end = ("<|endoftext|>", 0)
    wrapped.post_processor = processors.TemplateProcessing(single=f"{end[0]} $A {end[0]}", special_tokens=[end])
    wrapped.enable_truncation(3)
    tokens, _ = library(wrapped.to_str().encode()).encode_batch(["the quick brown fox jumps"])
    plain, _ = library(path.read_bytes()).encode_batch(["the quick brown fox jumps"])
    assert tokens.tolist() == plain.tolist() and len(plain) > 3


def test_hugging_face_loads_a_file_that_gigatoken_does_not_support(tmp_path: Path) -> None:
    words = HfTokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode_batch(["a c b"])[0].tolist() == [0, 2, 1]


def test_a_folder_is_accepted_for_its_tokenizer_json(path: Path) -> None:
    assert load_tokenizer(path.parent).fingerprint == load_tokenizer(path).fingerprint


def test_the_fingerprint_depends_on_the_content_of_the_file_only(path: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.json").write_bytes(path.read_bytes())
    (tmp_path / "changed.json").write_bytes(path.read_bytes() + b" ")
    fingerprint = load_tokenizer(path).fingerprint
    assert load_tokenizer(tmp_path / "copy.json").fingerprint == fingerprint
    assert load_tokenizer(tmp_path / "changed.json").fingerprint != fingerprint


def test_the_end_token_is_found_by_common_name_by_request_or_in_the_config(path: Path, tmp_path: Path) -> None:
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    assert load_tokenizer(path).eos_id == 0
    assert load_tokenizer(path, EncodingSettings(eos_token="!")).eos_id == vocabulary["!"]
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert load_tokenizer(tmp_path).eos_id == vocabulary["a"]


def test_a_vocabulary_without_a_known_end_token_has_none(path: Path, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(path.read_text().replace("<|endoftext|>", "<|whatever|>"))
    assert load_tokenizer(tmp_path / "t.json").eos_id is None


def test_an_unknown_end_token_is_refused_with_near_misses(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataplane\.eos_token is '<\|endoftxt\|>'.*Did you mean '<\|endoftext\|>'"):
        load_tokenizer(path, EncodingSettings(eos_token="<|endoftxt|>"))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe"])
def test_a_missing_or_invalid_file_is_refused_with_its_path(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"dataplane\.tokenizer is '.*broken\.json'.*\n  .*tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")
