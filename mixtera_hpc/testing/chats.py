"""Conversations, and tokenizers with chat templates, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from mixtera_hpc.tokens.chat_tokens import NOT_TRAINED

__all__ = ["CHATS", "FORGETFUL", "TEMPLATES", "hf_tokenizer", "share_form", "split_marks", "write_tokenizer"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation -%}
            {{- message['content'] + '<|im_end|>\\n' }}
        {%- endgeneration -%}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
INST_MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>"
    "{% elif m.role == 'assistant' %}{% generation %} {{ m.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
TOOLS_MARKED = (
    "{{ bos_token }}{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>' }}{%- endif %}"
    "{%- for m in messages %}{%- if loop.index0 > 20 %}{%- break %}{%- endif %}"
    "{{ '<|im_start|>' + m.role + '|' }}{%- if m.role == 'assistant' %}{% generation %}"
    "{%- if m.reasoning_content is defined %}{{ '[' + m.reasoning_content + ']' }}{%- endif %}"
    "{%- if m.tool_calls is defined %}{{ m.tool_calls | tojson(indent=1) }}{%- else %}{{ m.content }}{%- endif %}"
    "{{ eos_token }}{% endgeneration %}{%- else %}{{ m.content }}{%- endif %}{{ '<|im_end|>' }}{%- endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}last: {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
"""It renders the last answer in another way than earlier ones, like templates that remove old reasoning."""

TEMPLATES = {
    "chatml": CHATML,
    "chatml_marked": CHATML_MARKED,
    "inst": INST,
    "inst_marked": INST_MARKED,
    "tools_marked": TOOLS_MARKED,
}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "How many moons?"}, {"role": "assistant", "content": "Two moons."}],
    [
        {"role": "system", "content": "Be short — naïve café, 漢字."},
        {"role": "user", "content": " leading and trailing "},
        {"role": "assistant", "content": "  Yes,\n\n\tit is 🙂🙂.  "},
        {"role": "user", "content": "And e\u0301?"},
        {"role": "assistant", "content": "No"},
    ],
    [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "don't " * 40}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "bye"}],
]

_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def hf_tokenizer(kind: str) -> HfTokenizer:
    """Return a small trained tokenizer: `byte_level`, `metaspace` or `adds_bos`, which begins texts with `<s>`."""
    tokenizer = HfTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))  # noqa: S106 - a token of text
    initial: list[str] = []
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer = HfTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        initial = pre_tokenizers.ByteLevel.alphabet()
    texts = [message["content"] for chat in CHATS for message in chat] + ["<|im_start|>assistant\n [INST] [/INST]"]
    special = [AddedToken(text, special=True) for text in _SPECIAL]
    tokenizer.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=initial, show_progress=False),
    )
    if kind == "adds_bos":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tokenizer(folder: Path, template: str | None, kind: str = "byte_level") -> Path:
    """Write a tokenizer's folder, as transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    hf_tokenizer(kind).save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True, "__type": "AddedToken"},
        "unk_token": "<unk>",
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def share_form(chat: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a chat in the form of ShareGPT."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in chat]


def split_marks(tokens: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Return tokens without their marks, and which of them are trained; shape (n,) each."""
    return tokens & ~NOT_TRAINED, tokens < NOT_TRAINED
