"""Chat templates: from a conversation to its text, and the places in it that the assistant wrote.

A template is rendered as the library transformers does it, in Jinja's sandbox. Its `{% generation %}` blocks say what
the assistant wrote. In a template without them, an answer is what follows the messages before it and the generation
prompt, to the end of its turn. That needs two more renderings per answer. Price: about 30 µs per rendering.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NoReturn

from mixtera_hpc.errors import ConfigError

__all__ = ["ChatTemplate", "ChatText", "Conversation"]

Spans = tuple[tuple[int, int], ...]

_BEGIN = "\ufdd0"
_END = "\ufdd1"
"""Mark what a generation block renders. These two code points are reserved for the inner use of programs."""
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_SHOWN_ROLES = ("system", "developer", "user")
"""Roles whose messages a template must not leave out. Templates may shorten other ones, for example old reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages of a row, as templates expect them."""

    messages: list[dict[str, Any]]
    """Each has a `role`, and a `content` or tool calls."""
    tools: list[Any] | None = None
    """The descriptions of tools; None without any."""

    def plain_text(self) -> str:
        """Return the messages without a template, one after the other."""
        return "\n".join(f"{message['role']}: {_content_of(message)}" for message in self.messages)


class ChatText(str):
    """The text of a rendered conversation. It has special tokens, so that it is not encoded like other texts."""

    __slots__ = ("trained",)
    trained: Spans | None
    """The characters [start, stop) whose tokens are trained, ascending; None for all."""

    def __new__(cls, text: str, trained: Spans | None) -> "ChatText":
        """Return `text` with its trained characters."""
        made = super().__new__(cls, text)
        made.trained = trained
        return made

    def __getnewargs__(self) -> tuple[str, Spans | None]:  # type: ignore[override]
        """Return the arguments with which pickle and copy make it again."""
        return str(self), self.trained


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """The chat template of a tokenizer's folder."""

    source: str
    """The template, in Jinja's language."""
    special_tokens: Mapping[str, str]
    """Names of special tokens (`bos_token`) → their texts: the variables of the template."""
    refused: tuple[str, ...] = ()
    """Texts that messages must not contain, because they would become special tokens."""
    loss: Literal["assistant", "all"] = "assistant"
    """Tokens that are trained."""

    @property
    def digest(self) -> str:
        """Return a hex digest of all that decides the text of a conversation."""
        content = json.dumps([self.source, sorted(self.special_tokens.items())])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def render(self, conversation: Conversation) -> ChatText:
        """Return the text of a conversation.

        Raises:
            ValueError: the template refuses the conversation, or leaves out messages, or nothing would be trained.
            ConfigError: the template does not say what the assistant wrote, or has an error.
        """
        messages = [_with_reasoning(message) for message in conversation.messages]
        self._check_characters(conversation)
        text, spans = _without_marks(self._text(messages, conversation.tools))
        _check_complete(messages, text)
        if self.loss == "all":
            return ChatText(text, None)

        if not _GENERATION.search(self.source):
            spans = tuple(self._answers(text, messages, conversation.tools))
        spans = tuple((start, stop) for start, stop in spans if start < stop)
        if not spans:
            raise ValueError("the conversation has no answer of the assistant, so that nothing is trained")
        return ChatText(text, spans)

    def _check_characters(self, conversation: Conversation) -> None:
        """Raise ValueError if a message has a text that would be encoded as something else."""
        refused = _pattern_of((*self.refused, _BEGIN, _END))
        for number, message in enumerate(conversation.messages):
            for text in _texts_in(message):
                found = refused.search(text)
                if found is not None:
                    raise ValueError(
                        f"message {number} has the text {found[0]!r} of a special token "
                        "(dataplane.special_tokens_in_text=allow encodes it as the token)"
                    )

    def _answers(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> Iterator[tuple[int, int]]:
        """Yield the span of each answer of the assistant, for a template without generation blocks."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], tools, generation_prompt=True)
            through = self._text(messages[: number + 1], tools)
            if not (text.startswith(through) and through.startswith(before)):
                _refuse_template(number)
            yield len(before), len(through)

    def _text(self, messages: list[dict[str, Any]], tools: list[Any] | None, *, generation_prompt: bool = False) -> str:
        template = _compiled(self.source)
        # The template is a program of somebody else, which may raise anything.
        try:
            rendered: str = template.render(
                **self.special_tokens,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:
            if "strftime_now" in str(error):
                raise ConfigError(
                    "The chat template asks for today's date (strftime_now), so that a conversation would have other "
                    "tokens every day.\n  Write a date into a copy of the template."
                ) from None
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            raise ValueError(f"the chat template fails: {kind}{error}") from None
        return rendered


def _refuse_template(number: int) -> NoReturn:
    raise ConfigError(
        f"The chat template does not say which text is the assistant's: it renders the beginning of a conversation, to "
        f"message {number}, in another way than the whole.\n"
        "  Put {% generation %} and {% endgeneration %} around the assistant's text in a copy of the template, or "
        "train on all tokens with dataplane.chat_loss=all."
    )


def _check_complete(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raise ValueError if the text lacks a message: templates pass over roles that they do not know."""
    for number, message in enumerate(messages):
        if message["role"] in _SHOWN_ROLES and str(message.get("content", "")).strip() not in text:
            raise ValueError(f"the chat template leaves out message {number} of the role {message['role']!r}")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose reasoning has the names that templates use for it."""
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _content_of(message: Mapping[str, Any]) -> str:
    """Return the content of a message, and what else it has as JSON."""
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    return str(message.get("content", "")) + (json.dumps(others, ensure_ascii=False) if others else "")


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def _without_marks(marked: str) -> tuple[str, Spans]:
    """Remove the marks of generation blocks; return the text and the characters that were between them."""
    if _BEGIN not in marked:
        return marked, ()
    parts = re.split(f"[{_BEGIN}{_END}]", marked)
    # Outside and inside alternate, since blocks do not nest.
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return "".join(parts), tuple((ends[i], ends[i + 1]) for i in range(1, len(parts), 2))


@lru_cache(maxsize=8)
def _pattern_of(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Return the compiled template.

    Raises:
        ConfigError: the template is not valid.
    """
    # An optional package of the extra `chat`, and only templates need it.
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """The statement `{% generation %}` … `{% endgeneration %}`."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own name and type.

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}"

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"The chat template of dataplane.tokenizer is not valid: line {error.lineno}: {error.message}.\n"
            "  Correct chat_template.jinja, or chat_template in tokenizer_config.json."
        ) from None


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Replace Jinja's filter `tojson`, which escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    import jinja2  # As above.

    raise jinja2.TemplateError(message)
