"""A sample of the texts that a mixture selects, for work that needs documents and no run, such as a new tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError

__all__ = ["SampledText", "sample_texts"]

DOCUMENTS_PER_CHUNK = 1024
"""Documents that are read together, in the order of the disk."""


@dataclass(frozen=True, slots=True)
class SampledText:
    """One document of the sample."""

    domain: str
    text: str


def sample_texts(config: Config, max_bytes: int) -> Iterator[SampledText]:
    """Yield documents in the proportions of the mixture, each at most once, until their texts have `max_bytes` bytes.

    The weights are those of the first chunk, counted in documents. The same configuration gives the same documents.

    Args:
        config: `query` and `mixture` select the documents; a tokenizer is not needed.
        max_bytes: of UTF-8 text. There are fewer if the selected domains end before.

    Raises:
        ConfigError: a selected shard holds token ids instead of texts.
        MixtureError: a domain has no samples.
        PropertyIndexError: the index is missing or stale.
    """
    config = replace(
        config,
        mixture=replace(config.mixture, unit="samples", on_exhausted="redistribute", max_epochs=1),
        dataplane=replace(
            config.dataplane,
            tokenizer=None,
            vocab_size=None,
            global_batch_size=1,
            batch_schedule=[],
            chunk_steps=DOCUMENTS_PER_CHUNK,
        ),
    )
    source = open_source(config, Local())
    streams = source.streams()
    reader = DocumentReader(source)
    state = PlannerState.start(source.num_domains)
    try:
        while True:
            plan, after = source.planner.plan(state, source.weights)
            for domain, (start, stop) in enumerate(zip(state.cursors.tolist(), after.cursors.tolist(), strict=True)):
                for text in reader.texts(streams.documents(domain, start, stop)) if start < stop else ():
                    yield SampledText(source.names[domain], _checked(text))
                    max_bytes -= len(text.encode())
                    if max_bytes <= 0:
                        return
            if plan.last:
                return
            state = after
    finally:
        reader.close()


def _checked(text: object) -> str:
    if isinstance(text, str):
        return text
    raise ConfigError(
        "A selected shard holds token ids, but texts are needed.\n  Exclude it with query.where or data.exclude."
    )
