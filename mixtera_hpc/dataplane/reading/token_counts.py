"""The checks that an index has the token counts of a run's tokenizer, and that all processes have this tokenizer."""

from hashlib import blake2b

from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, PropertyIndexError
from mixtera_hpc.index.chat_check import check_chat_template
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["check_same_tokenizer", "check_token_counts", "encoding_digest"]


def check_token_counts(config: Config, index: PropertyIndex, tokenizer: Tokenizer | None) -> None:
    """Refuse an index without the token counts that a run needs.

    Raises:
        PropertyIndexError: the index has no token counts, or those of another tokenizer.
        ConfigError: `dataplane.add_eos` is set, but no key says which token ends a document.
    """
    if config.mixture.unit != "tokens":
        return

    if not index.tables.has_tokens:
        raise PropertyIndexError(
            f"{index.path} holds no token counts, and mixture.unit=tokens needs them.\n"
            "  Build it again with dataplane.tokenizer set, or set mixture.unit=samples."
        )
    if tokenizer is None:
        return

    # Streams would contain one item per document that no token stands for.
    if config.dataplane.add_eos and tokenizer.eos_id is None:
        raise ConfigError(
            "dataplane.add_eos is true, but no key says which token ends a document.\n"
            "  Set dataplane.eos_token (dataplane.eos_id with dataplane.vocab_size), or dataplane.add_eos=false."
        )
    # Positions in streams are token counts: with another tokenizer every one of them would be wrong.
    if tokenizer.fingerprint != index.tokenizer_fingerprint:
        raise PropertyIndexError(
            f"{index.path} was built with tokenizer {str(index.tokenizer_fingerprint)[:12]}, but "
            f"{_configured_tokenizer(config)} is {tokenizer.fingerprint[:12]}. The file, dataplane.add_bos and "
            "dataplane.special_tokens_in_text must be those of the build.\n"
            "  Set them as for the build, or run mixtera-hpc index build again with these."
        )
    check_chat_template(index, tokenizer)


def encoding_digest(tokenizer: Tokenizer | None) -> str:
    """Return a digest of everything that decides the tokens of a document, in hexadecimal."""
    if tokenizer is None:
        return ""
    facts = (tokenizer.fingerprint, tokenizer.eos_id, tokenizer.added, tokenizer.chat)
    return blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def check_same_tokenizer(config: Config, digest: str, tokenizer: Tokenizer | None) -> None:
    """Refuse a tokenizer that encodes otherwise than that of rank 0, which has the `digest`.

    Every process reads the files for itself: they may have changed meanwhile, or differ between nodes.

    Raises:
        ConfigError: the files differ.
    """
    if encoding_digest(tokenizer) != digest:
        raise ConfigError(
            f"{_configured_tokenizer(config)} has other content in this process than on rank 0: the files were changed "
            "while the job started, or differ between nodes.\n"
            "  Put them where all nodes read the same files, and do not change them while a job runs."
        )


def _configured_tokenizer(config: Config) -> str:
    """Return the key and value that the tokenizer comes from."""
    plane = config.dataplane
    return f"dataplane.tokenizer={plane.tokenizer}" if plane.tokenizer else f"dataplane.vocab_size={plane.vocab_size}"
