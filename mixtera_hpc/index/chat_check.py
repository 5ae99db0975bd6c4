"""The check that conversations are rendered by the chat template that counted their tokens."""

from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.formats.chat_rows import stored_template
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["check_chat_template", "check_has_template"]


def check_has_template(text: str | None, tokenizer: Tokenizer) -> None:
    """Refuse to count the tokens of conversations without a template.

    Raises:
        ConfigError: the folder of the tokenizer has none.
    """
    if tokenizer.chat is None:
        raise ConfigError(
            f"data.text is {text}, but no chat template is beside dataplane.tokenizer.\n"
            "  Add chat_template to the tokenizer_config.json in its folder, or a file chat_template.jinja."
        )


def check_chat_template(index: PropertyIndex, tokenizer: Tokenizer | None) -> None:
    """Refuse another chat template than that of the build: conversations would have other tokens.

    Raises:
        PropertyIndexError: the templates differ, or the tokenizer has none.
    """
    digests = {stored_template(text) for text in index.shard_texts()} - {""}
    given = tokenizer.chat.digest if tokenizer is not None and tokenizer.chat is not None else None
    for digest in sorted(digests):
        if digest != given:
            now = "there is none" if given is None else f"it is {given[:12]} now"
            raise PropertyIndexError(
                f"The conversations of {index.path} were rendered with the chat template {digest[:12]}, but beside "
                f"dataplane.tokenizer {now}.\n"
                "  Restore chat_template.jinja and tokenizer_config.json, or run mixtera-hpc index build again."
            )
