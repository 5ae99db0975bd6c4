"""Tell the user that texts are encoded by the slower of two libraries, and why."""

import logging

from mixtera_hpc.tokens.tokenizer import HuggingFaceTokenizer, Tokenizer

__all__ = ["warn_of_slow_encoding"]

logger = logging.getLogger("mixtera_hpc")


def warn_of_slow_encoding(tokenizer: Tokenizer | None) -> None:
    """Log a warning if gigatoken does not encode a tokenizer. Call it on one rank, before many texts are encoded."""
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.slow_because is not None:
        logger.warning(
            "dataplane.tokenizer is encoded by Hugging Face's tokenizers, about 50 times slower than by gigatoken: %s. "
            "If training waits for data, raise dataplane.workers, or tokenize once with mixtera-hpc tokenize.",
            tokenizer.slow_because,
        )
