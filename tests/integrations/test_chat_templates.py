"""Chat templates render, encode and mark conversations as transformers' `apply_chat_template` does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.testing.chats import CHATS, TEMPLATES, split_marks, write_tokenizer
from mixtera_hpc.tokens.chat_template import Conversation
from mixtera_hpc.tokens.tokenizer import EncodingSettings, load_tokenizer

transformers = pytest.importorskip("transformers", reason="the extra `integrations` is not installed")

MARKED = [name for name in TEMPLATES if name.endswith("marked")]
TOOLS = [{"type": "function", "function": {"name": "moons", "parameters": {"planet": "<Mars & 'co'>"}}}]
CALL = [
    {"role": "user", "content": "moons?"},
    {"role": "assistant", "thinking": "look", "tool_calls": [{"name": "moons", "arguments": {"planet": "Mars"}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]


def both(folder: Path, chat: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """Return the tokens and masks of a chat by transformers and by us."""
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, EncodingSettings(chat_loss=options.pop("loss", "assistant")))
    assert tokenizer.chat is not None
    expected = theirs.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, tools=options.get("tools")
    )
    text = tokenizer.chat.render(Conversation(messages=chat, tools=options.get("tools")))
    assert str(text) == theirs.apply_chat_template(chat, tokenize=False, tools=options.get("tools"))
    tokens, trained = split_marks(tokenizer.encode_each([text])[0])
    return (expected["input_ids"], expected["assistant_masks"]), (tokens.tolist(), trained.astype(int).tolist())


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "adds_bos"])
@pytest.mark.parametrize("template", MARKED)
def test_tokens_and_mask_are_those_of_transformers(template: str, kind: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, TEMPLATES[template], kind)
    for chat in CHATS:
        expected, given = both(folder, chat)
        assert given == expected
        assert 0 < sum(given[1]) < len(given[1])


def test_tools_and_reasoning_reach_the_template(tmp_path: Path) -> None:
    expected, given = both(write_tokenizer(tmp_path, TEMPLATES["tools_marked"]), CALL, tools=TOOLS)
    assert given == expected


@pytest.mark.parametrize("template", ["chatml", "inst"])
def test_without_generation_blocks_the_tokens_are_the_same_and_the_answers_are_found(
    template: str, tmp_path: Path
) -> None:
    plain = write_tokenizer(tmp_path / "plain", TEMPLATES[template])
    marked = write_tokenizer(tmp_path / "marked", TEMPLATES[f"{template}_marked"])
    for chat in CHATS:
        (tokens, _), given = both(plain, chat)
        assert given[0] == tokens
        assert given == both(marked, chat)[0]


def test_with_all_tokens_trained_the_tokens_are_the_same(tmp_path: Path) -> None:
    (tokens, _), given = both(write_tokenizer(tmp_path, TEMPLATES["chatml"]), CHATS[1], loss="all")
    assert given == (tokens, np.ones(len(tokens), int).tolist())
