"""Tokens that begin and end a document, and special tokens inside of it: as Hugging Face's `tokenizers` has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.definition import AddedTokens
from mixtera_hpc.tokens.tokenizer import EncodingSettings, load_tokenizer

TEXTS = [
    *("", " ", "  ", "\n", "\t\n ", "\x00", "a", "the quick brown fox", "The  Quick\n\nbrown", " leading", "trailing "),
    *("naïve café", "漢字と仮名", "🙂🙂", "e\u0301 é", "a" * 3000, "1234567890 3.14", "don't we'll I'm", "\ufeffmark"),
    *("one<s>two</s>three", "<s>", "x <|endoftext|> y", "[CLS] [SEP] <tool>call</tool>"),
]
"""White space, scripts, a combining accent, a BOM, a NUL, repetitions, contractions, and texts of special tokens."""

BOS = "<s>"
EOS = "</s>"
SPECIAL = [AddedToken("<unk>", special=True), AddedToken(BOS, special=True), AddedToken(EOS, special=True)]
LLAMA_PATTERN = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")


def byte_level(**options: Any) -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def split_byte_level(**options: Any) -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(LLAMA_PATTERN, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return tokenizer


def metaspace() -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def prefix_space() -> HfTokenizer:
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def word_piece() -> HfTokenizer:
    tokenizer = HfTokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def word_level() -> HfTokenizer:
    tokenizer = HfTokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def unigram() -> HfTokenizer:
    tokenizer = HfTokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def trained(base: HfTokenizer, added: str | None = None, tokens: tuple[AddedToken, ...] = ()) -> HfTokenizer:
    """Train a small model, and give it a post-processor.

    Args:
        base: an empty tokenizer.
        added: `bos`, `bos+eos`, `bert`, `roberta`, `nested`, or None for a post-processor that adds nothing.
        tokens: more added tokens.
    """
    trainer: Any = trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=400, show_progress=False)
    if isinstance(base.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(special_tokens=SPECIAL, vocab_size=400, show_progress=False)
    elif isinstance(base.model, models.WordLevel):
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    elif isinstance(base.model, models.Unigram):
        trainer = trainers.UnigramTrainer(special_tokens=SPECIAL[:1], unk_token="<unk>", vocab_size=60)
    elif isinstance(base.pre_tokenizer, (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence)):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            special_tokens=SPECIAL, vocab_size=400, initial_alphabet=alphabet, show_progress=False
        )
    base.train_from_iterator(TEXTS[7:20] * 3, trainer)
    if isinstance(base.model, models.Unigram):
        base.add_special_tokens(SPECIAL[1:])  # Behind the model's own pieces.
    base.add_tokens(list(tokens))

    bos = (BOS, base.token_to_id(BOS))
    eos = (EOS, base.token_to_id(EOS))
    both = [bos, eos]
    post_processors: dict[str | None, Callable[[], Any]] = {
        None: lambda: processors.ByteLevel(),
        "bos": lambda: processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=both),
        "two": lambda: processors.TemplateProcessing(single=f"{EOS} {BOS} $A", special_tokens=both),
        "bos+eos": lambda: processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=both),
        "bert": lambda: processors.BertProcessing(eos, bos),
        "roberta": lambda: processors.RobertaProcessing(eos, bos),
        "nested": lambda: processors.Sequence([processors.ByteLevel(), post_processors["bos"]()]),
    }
    base.post_processor = post_processors[added]()
    return base


TOKENIZERS = {
    "gpt2": lambda: trained(byte_level()),
    "gpt2_bos": lambda: trained(byte_level(), "bos"),
    "gpt2_nested": lambda: trained(byte_level(), "nested"),
    "llama3": lambda: trained(split_byte_level(ignore_merges=True), "bos"),
    "llama3_two": lambda: trained(split_byte_level(ignore_merges=True), "two"),
    "llama2": lambda: trained(metaspace(), "bos"),
    "roberta": lambda: trained(prefix_space(), "roberta"),
    "tools": lambda: trained(byte_level(), "bos+eos", (AddedToken("<tool>"), AddedToken("</tool>", lstrip=True))),
    "stripping": lambda: trained(byte_level(), "bos", (AddedToken("fox", single_word=True, normalized=False),)),
    "bert": lambda: trained(word_piece(), "bert"),
    "words": lambda: trained(word_level()),
    "unigram": lambda: trained(unigram(), "bos+eos"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, make in TOKENIZERS.items():
        make().save(str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in TOKENIZERS}


@pytest.mark.parametrize("in_text", ["text", "allow"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_documents_are_encoded_as_by_tokenizers(name: str, in_text: Any, files: dict[str, Path]) -> None:
    reference = HfTokenizer.from_file(str(files[name]))
    reference.encode_special_tokens = in_text == "text"
    adds_eos = reference.encode("a").tokens[-1] == EOS
    ours = load_tokenizer(files[name], EncodingSettings(special_tokens_in_text=in_text, add_eos=adds_eos))
    encoded = {
        text: [*ours.added.before, *ids.tolist(), *ours.added.after]
        for text, ids in zip(TEXTS, ours.encode_each(TEXTS), strict=True)
    }
    assert encoded == {text: reference.encode(text).ids for text in TEXTS}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_text_of_a_special_token_gives_the_token_only_on_request(name: str, files: dict[str, Path]) -> None:
    eos_id = HfTokenizer.from_file(str(files[name])).token_to_id(EOS)
    for in_text, expected in (("text", False), ("allow", True)):
        tokenizer = load_tokenizer(files[name], EncodingSettings(special_tokens_in_text=in_text))  # type: ignore[arg-type]
        assert (eos_id in tokenizer.encode_each([f"one{EOS}two"])[0]) == expected


def test_a_model_that_encodes_a_special_token_itself_is_refused(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(models.Unigram([("<unk>", 0.0), (EOS, -1.0), ("a", -2.0)], unk_id=0))
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"encodes the text '</s>' as its special token 1"):
        load_tokenizer(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json", EncodingSettings(special_tokens_in_text="allow")).eos_id == 1


class TestAddedTokens:
    """Tokens that begin and end a document."""

    @pytest.fixture
    def folder(self, files: dict[str, Path], tmp_path: Path) -> Path:
        """Return a folder with a tokenizer whose post-processor adds nothing, and a `tokenizer_config.json`."""
        (tmp_path / "tokenizer.json").write_bytes(files["gpt2"].read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": {"content": EOS}}))
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "add_bos", "before"),
        [
            *(("gpt2", None, []), ("gpt2_bos", None, [BOS]), ("gpt2_bos", False, []), ("gpt2_bos", True, [BOS])),
            *(("llama3_two", None, [EOS, BOS]), ("bert", None, [BOS]), ("gpt2_nested", True, [BOS])),
        ],
    )
    def test_add_bos(self, name: str, add_bos: bool | None, before: list[str], files: dict[str, Path]) -> None:
        reference = HfTokenizer.from_file(str(files[name]))
        tokenizer = load_tokenizer(files[name], EncodingSettings(add_bos=add_bos))
        expected = tuple(reference.token_to_id(token) for token in before)
        assert tokenizer.added == AddedTokens(expected, (reference.token_to_id(EOS),))

    def test_bos_is_taken_from_the_tokenizer_config(self, folder: Path) -> None:
        assert load_tokenizer(folder).added.before == ()
        assert load_tokenizer(folder, EncodingSettings(add_bos=True)).added.before == (1,)

    def test_an_unknown_bos_cannot_be_added(self, files: dict[str, Path]) -> None:
        with pytest.raises(ConfigError, match=r"dataplane\.add_bos is true, but neither"):
            load_tokenizer(files["gpt2"], EncodingSettings(add_bos=True))

    def test_what_the_post_processor_adds_at_the_end_is_never_replaced_silently(self, files: dict[str, Path]) -> None:
        with pytest.raises(ConfigError, match=r"adds </s> to the end of a text, but the token .* is <s>"):
            load_tokenizer(files["bert"], EncodingSettings(eos_token=BOS))
        assert load_tokenizer(files["bert"], EncodingSettings(eos_token=BOS, add_eos=False)).added.after == ()

    def test_the_fingerprint_depends_on_what_token_counts_depend_on(self, files: dict[str, Path]) -> None:
        settings = [
            *(EncodingSettings(), EncodingSettings(add_bos=False), EncodingSettings(special_tokens_in_text="allow")),
            *(EncodingSettings(add_bos=True), EncodingSettings(add_eos=False)),
        ]
        fingerprints = [load_tokenizer(files["gpt2_bos"], setting).fingerprint for setting in settings]
        assert len(set(fingerprints[:3])) == 3
        assert set(fingerprints[3:]) == {fingerprints[0]}

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"eos_token": [EOS]}, r"eos_token in .*tokenizer_config\.json is \['</s>'\], but must be the text of one"),
            ({"eos_token": {"x": 1}}, r"eos_token in .* is \{'x': 1\}, but must be the text of one token"),
            ({"bos_token": {"content": None}}, r"bos_token in .* is \{'content': None\}, but must be"),
            ({"bos_token": 3}, r"bos_token in .* is 3, but must be the text of one token"),
            ([], r"tokenizer_config\.json holds no JSON object"),
            ({"eos_token": "<end>"}, r"eos_token is '<end>', but the tokenizer has no such token"),
        ],
    )
    def test_a_wrong_tokenizer_config_is_named(self, config: Any, message: str, folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(folder)


class TestRefusedFiles:
    """Files that hold another kind of tokenizer, or a random one."""

    def test_dropout(self, files: dict[str, Path], tmp_path: Path) -> None:
        content = json.loads(files["gpt2"].read_text())
        content["model"]["dropout"] = 0.1
        (tmp_path / "t.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=r'"dropout": 0\.1'):
            load_tokenizer(tmp_path / "t.json")

    @pytest.mark.parametrize(
        ("name", "kind"), [("t.model", "a SentencePiece model"), ("t.tiktoken", "a tiktoken file")]
    )
    def test_other_kinds(self, name: str, kind: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"\x0a\x01")
        for given in (tmp_path, tmp_path / name):
            with pytest.raises(ConfigError, match=rf"holds {kind} and no tokenizer\.json\.\n.*\n.*from_pretrained"):
                load_tokenizer(given)

    def test_a_post_processor_of_an_unknown_type(self, files: dict[str, Path], tmp_path: Path) -> None:
        content = json.loads(files["gpt2"].read_text())
        content["post_processor"] = {"type": "Mystery"}
        (tmp_path / "t.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="unknown type 'Mystery'"):
            load_tokenizer(tmp_path / "t.json")


class TestServedDocuments:
    """A run over texts and over stored token ids."""

    @pytest.fixture
    def overrides(self, files: dict[str, Path], tmp_path: Path) -> list[str]:
        """Return the overrides for an index of texts, and of the same documents as token ids in a Megatron file."""
        data = tmp_path / "data"
        data.mkdir()
        texts = [text for text in TEXTS if text]
        (data / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tokenizer = load_tokenizer(files["llama3"])
        ids = [ids.tolist() for ids in tokenizer.encode_each(texts)]
        begin = list(tokenizer.added.before)
        end = list(tokenizer.added.after)
        # With and without the tokens that begin and end a document.
        stored = [[*(begin if i % 2 else []), *of_text, *(end if i % 3 else [])] for i, of_text in enumerate(ids)]
        write_megatron(data / "b.bin", stored)
        return [
            f"data.root={data}",
            f"index.path={tmp_path / 'i.h5'}",
            f"dataplane.tokenizer={files['llama3']}",
            "mixture.on_exhausted=stop",
            "dataplane.seq_len=31",
            "dataplane.shuffle=none",
            "dataplane.overlap_one_token=false",
            "dataplane.global_batch_size=1",
        ]

    @pytest.mark.parametrize("add_bos", ["null", "false"])
    def test_every_document_has_them_once(self, add_bos: str, overrides: list[str], files: dict[str, Path]) -> None:
        config = compose([*overrides, f"dataplane.add_bos={add_bos}"])
        build_index(config)
        with DataPlane.open(config, comm=Local()) as plane:
            batches = list(plane)
        tokens = np.concatenate([batch.tokens[0] for batch in batches])
        positions = np.concatenate([batch.position_ids[0] for batch in batches])

        tokenizer = load_tokenizer(files["llama3"], EncodingSettings(add_bos=config.dataplane.add_bos))
        texts = [text for text in TEXTS if text]
        expected = [
            [*tokenizer.added.before, *ids.tolist(), *tokenizer.added.after] for ids in tokenizer.encode_each(texts)
        ]
        stream = [token for document in [*expected, *expected] for token in document]
        assert tokens.tolist() == stream[: len(tokens)]
        assert len(tokens) > len(stream) - 32
        begins = np.cumsum([0, *map(len, [*expected, *expected])])
        begins = begins[begins < len(tokens)]
        assert (positions[begins] == 0).all()

    def test_an_index_built_otherwise_is_refused(self, overrides: list[str]) -> None:
        build_index(compose(overrides))
        for change in ("dataplane.add_bos=false", "dataplane.special_tokens_in_text=allow"):
            with pytest.raises(PropertyIndexError, match=r"run mixtera-hpc index build again"):
                DataPlane.open(compose([*overrides, change]), comm=Local())
