"""Chat rows (`data.text=chat:PATH`): from the messages of a row to its document.

The messages are a list of `{role, content}` (OpenAI) or of `{from, value}` (ShareGPT, LLaVA). A document is their text
by the chat template of the tokenizer's folder; without a tokenizer, which only counts tokens, it is the plain messages.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixtera_hpc.errors import UserError
from mixtera_hpc.formats.batching.row_paths import path_forms
from mixtera_hpc.tokens.chat_template import ChatTemplate, Conversation

__all__ = [
    "CHAT_PREFIX",
    "chat_documents",
    "chat_path",
    "is_chat",
    "stored_chat_text",
    "stored_template",
    "value_at",
    "without_template",
]

CHAT_PREFIX = "chat:"
_TEMPLATE = " template:"
"""Comes between the path and the digest of the template in the text that an index stores."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHARE_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Values of `from` → the role."""


def is_chat(text: str | None) -> bool:
    """Return whether `data.text` names messages."""
    return text is not None and text.startswith(CHAT_PREFIX)


def chat_path(text: str) -> str:
    """Return the path of the messages in a row."""
    return text.removeprefix(CHAT_PREFIX).partition(_TEMPLATE)[0]


def stored_chat_text(text: str, template: ChatTemplate | None) -> str:
    """Return what an index stores for `data.text`, with the digest of the template that counted its tokens."""
    path = f"{CHAT_PREFIX}{chat_path(text)}"
    return path if template is None else f"{path}{_TEMPLATE}{template.digest}"


def stored_template(text: str | None) -> str:
    """Return the digest of the template in a stored text; empty without one."""
    return text.partition(_TEMPLATE)[2] if text is not None and is_chat(text) else ""


def without_template(text: str | None) -> str | None:
    """Return the value of `data.text` for a stored text."""
    return text.partition(_TEMPLATE)[0] if text is not None and is_chat(text) else text


def chat_documents(
    path: str, template: ChatTemplate | None, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[tuple[int, str]]]:
    """Return the document of each row, and (position, problem) of rows that have none, ascending.

    Raises:
        ConfigError: the template does not fit these conversations.
    """
    documents: list[str] = []
    problems = []
    for number, row in enumerate(rows):
        try:
            conversation = _conversation_of(row, path)
            documents.append(conversation.plain_text() if template is None else template.render(conversation))
        except UserError as error:
            error.add_note(f"the conversation begins with {str(value_at(row, path))[:200]}")
            raise
        except ValueError as error:
            documents.append("")
            problems.append((number, str(error)))
    return documents, problems


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, which `row_paths` defines; None if there is none."""
    for keys in path_forms(path):
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _conversation_of(row: Mapping[str, Any], path: str) -> Conversation:
    """Return the conversation of a row.

    Raises:
        ValueError: the messages or tools are not what the formats above define.
    """
    messages = value_at(row, path)
    if not isinstance(messages, list):
        raise ValueError(f"{path!r} of data.text is {_kind(messages)}, but must be a list of messages")
    if not messages:
        raise ValueError(f"{path!r} of data.text is an empty conversation")
    return Conversation(
        messages=[_message_of(number, message) for number, message in enumerate(messages)], tools=_tools_of(row)
    )


def _message_of(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_kind(message)}, but must be an object")
    # In Parquet every message has all keys.
    values = {key: value for key, value in message.items() if value is not None}
    if "role" not in values and "from" in values:
        values = _from_share_form(number, values)
    role = values.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")

    if isinstance(values.get("content"), list):
        values["content"] = "".join(_text_of_part(number, part) for part in values["content"])
    # An answer may consist of tool calls alone.
    if "content" not in values and not (role == "assistant" and values.keys() - {"role"}):
        raise ValueError(f"message {number} has no content")
    if not isinstance(values.get("content", ""), str):
        raise ValueError(f"the content of message {number} is {_kind(values['content'])}, but must be text")
    return values


def _from_share_form(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    sender = values["from"]
    if sender not in SHARE_ROLES:
        raise ValueError(f"message {number} is from the unknown {sender!r}; known are {', '.join(SHARE_ROLES)}")
    if "value" not in values:
        raise ValueError(f"message {number} has no value")
    return {"role": SHARE_ROLES[sender], "content": values["value"]}


def _text_of_part(number: int, part: Any) -> str:
    """Return the text of one part of a message's content; images cannot be tokens."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
    raise ValueError(f"message {number} has a part of the type {kind!r}; only parts of text can be tokens")


def _tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the descriptions of tools beside the messages: a list, or its JSON."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"'tools' is not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"'tools' is {_kind(tools)}, but must be a list")
    return tools


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
