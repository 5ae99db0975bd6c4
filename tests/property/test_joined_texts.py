"""Documents that are encoded together have the tokens that they have one by one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from mixtera_hpc.tokens import gigatoken_encode, joined_texts
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.joined_texts import BORDER
from mixtera_hpc.tokens.token_memory import TokenMemory
from mixtera_hpc.tokens.tokenizer import EncodingSettings, GigatokenTokenizer

END = "<|endoftext|>"
SETTINGS = {
    "EOS": EncodingSettings(),
    "none": EncodingSettings(add_eos=False),
    "special tokens in texts": EncodingSettings(special_tokens_in_text="allow"),
}
PARTS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\x00",
        "The quick",
        " fox's",
        END,
        BORDER[:5],
        BORDER[5:],
        "\x1d",
        "漢字",
        "🙂",
        "e\u0301",
        "a" * 700,
    ]
)
TEXTS = st.lists(PARTS | st.text(max_size=5), max_size=6).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GigatokenTokenizer]:
    """Return byte-level tokenizers that add no, one, two and three special tokens to a document."""
    texts = [f"The quick brown fox no. {i} doesn't jump;\n\n naïve 漢字 🙂" for i in range(50)]
    path = train_bpe(texts, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")
    plain = path.read_bytes()
    made = {name: GigatokenTokenizer(plain, settings) for name, settings in SETTINGS.items()}
    for name, template in {"BOS": f"{END} $A", "two BOS": f"{END} {END} $A"}.items():
        file = HfTokenizer.from_file(str(path))
        file.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(END, 0)])
        definition = file.to_str().encode()
        made[f"{name} and EOS"] = GigatokenTokenizer(definition)
        made[name] = GigatokenTokenizer(definition, SETTINGS["none"])
    return made


@given(
    st.lists(TEXTS, max_size=12), st.sampled_from([1, 10, 1000, 1 << 15]), st.sampled_from([0, 50, 500]), st.booleans()
)
def test_tokens_and_counts_are_those_of_single_documents(
    tokenizers: dict[str, GigatokenTokenizer], texts: list[str], at_once: int, long_text: int, has_border: bool
) -> None:
    if has_border:
        texts = [*texts, f"a{BORDER}b"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_texts, "CHARACTERS_PER_CALL", at_once)
        for name, tokenizer in tokenizers.items():
            patch.setattr(gigatoken_encode, "LONG_TEXT", 1 << 17)
            each = [tokenizer.encode_each([text])[0].tolist() for text in texts]
            patch.setattr(gigatoken_encode, "LONG_TEXT", long_text)
            assert tokenizer.count_each(texts).tolist() == list(map(len, each)), name
            tokens, offsets = tokenizer.encode_batch(texts)
            assert [tokens[i:j].tolist() for i, j in itertools.pairwise(offsets)] == each, name
            added = tokenizer.added
            memory = TokenMemory()
            memory.append(np.ones(2, np.uint32))
            tokens, starts, sizes = tokenizer.encode_documents(texts, memory)
            served = [tokens[start : start + size].tolist() for start, size in zip(starts, sizes, strict=True)]
            assert served == [[*added.before, *ids, *added.after] for ids in each], name


def test_documents_that_are_encoded_together_follow_each_other_in_memory(
    tokenizers: dict[str, GigatokenTokenizer],
) -> None:
    texts = ["The quick", " fox", "", "jumps" * 9000, "a"]
    for name, tokenizer in tokenizers.items():
        tokens, starts, sizes = tokenizer.encode_documents(texts)
        # Without special tokens, an unused token lies between two documents.
        gap = 0 if tokenizer.added.before or tokenizer.added.after else 1
        assert starts.tolist() == (np.cumsum(sizes + gap) - sizes - gap).tolist(), name
        assert len(tokens) == int((sizes + gap).sum()), name


def test_long_texts_and_lone_surrogates_are_encoded_one_by_one(
    tokenizers: dict[str, GigatokenTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_texts, "MAX_JOINED_CHARACTERS", 20)
    tokenizer = tokenizers["EOS"]
    texts = ["The quick", "fox " * 10]
    assert tokenizer.count_each(texts).tolist() == [len(tokens) for tokens in tokenizer.encode_each(texts)]
    errors = []
    for encode in (tokenizer.encode_each, tokenizer.count_each, tokenizer.encode_batch, tokenizer.encode_documents):
        with pytest.raises(Exception) as caught:  # The library's own error.
            encode(["a", "\ud800"])
        errors.append(repr(caught.value))
    assert len(set(errors)) == 1
