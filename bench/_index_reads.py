"""Reading through an index: raw JSON lines to packed batches or samples, next to bare loops over the same rows."""

import functools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from bench._corpus import make_tokenizer
from bench._figures import FigureLine, rate, ratio
from bench._format_digests import SOURCE
from bench._index_builds import BUILT
from bench._row_loops import TEXT_ROW, decode_in_order, decode_shuffled, shuffled_rows, tokenize
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import PlannerState
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.tokens.tokenizer import load_tokenizer

__all__ = ["read_lines"]

ROUNDS = 3


def read_lines(data: Path, num_steps: int) -> Iterator[FigureLine]:
    """Measure the rates of packed batches at two sequence lengths, and of samples."""
    settings = [f"data.root={data}", SOURCE, f"index.path={BUILT}", f"dataplane.tokenizer={make_tokenizer()}"]
    settings += ["mixture.group_by=[source]", "dataplane.audit=false"]
    for seq_len, batch in ((1024, 64), (8192, 32)):
        steps = max(4, num_steps * 1024 * 64 // (seq_len * batch))
        shape = [f"dataplane.seq_len={seq_len}", f"dataplane.global_batch_size={batch}"]
        yield from _token_lines(compose([*settings, *shape]), steps)
    samples = compose([*settings, "mixture.unit=samples", "dataplane.global_batch_size=256"])
    yield from _sample_lines(samples, num_steps)


def _token_lines(config: Config, num_steps: int) -> Iterator[FigureLine]:
    """Compare with the bare tokenizer over the texts that ours tokenizes, in the same order, both freshly loaded."""
    texts = _tokenized_texts(open_source(config, Local()), num_steps)
    shard = min(Path(config.data.root).iterdir())
    places = shuffled_rows(shard)
    decoder = msgspec.json.Decoder(TEXT_ROW)
    ours: list[float] = []
    tokenizing: list[float] = []
    in_order: list[float] = []
    shuffled: list[float] = []
    for _ in range(ROUNDS):
        source = open_source(config, Local())
        tokenizer = load_tokenizer(make_tokenizer())
        ours.append(rate(functools.partial(_serve, source, num_steps)) / 1e6)
        tokenizing.append(rate(functools.partial(tokenize, tokenizer, texts, _num_tokens)) / 1e6)
        in_order.append(rate(lambda: decode_in_order(shard, decoder)))
        shuffled.append(rate(lambda: decode_shuffled(shard, places, decoder)))

    name = f"raw JSONL → packed batches, seq_len {config.dataplane.seq_len:,}"
    served = statistics.median(ours)
    tokenized = statistics.median(tokenizing)
    yield ratio(name, served, "Mtok/s", "bare gigatoken, same texts", tokenized, 0.8)
    tokens_per_row = tokenize(load_tokenizer(make_tokenizer()), texts, _num_tokens) / len(texts)
    for rows, order in ((in_order, "over lines"), (shuffled, "at shuffled rows")):
        decoded = statistics.median(rows) * tokens_per_row / 1e6
        both = 1 / (1 / tokenized + 1 / decoded)
        yield ratio(name, served, "Mtok/s", f"msgspec {order}, then gigatoken", both, 0.8)


def _sample_lines(config: Config, num_steps: int) -> Iterator[FigureLine]:
    """Compare with bare decoding of the same rows."""
    source = open_source(config, Local())
    shard = min(Path(config.data.root).iterdir())
    places = shuffled_rows(shard)
    ours: list[float] = []
    in_order: list[float] = []
    shuffled: list[float] = []
    for _ in range(ROUNDS):
        ours.append(rate(functools.partial(_serve, source, num_steps)))
        in_order.append(rate(lambda: decode_in_order(shard, msgspec.json.Decoder())))
        shuffled.append(rate(lambda: decode_shuffled(shard, places, msgspec.json.Decoder())))

    name = "raw JSONL → samples, shuffled"
    served = statistics.median(ours)
    yield ratio(name, served, "rows/s", "msgspec over lines, in file order", statistics.median(in_order), 0.3)
    yield ratio(name, served, "rows/s", "msgspec, a pread a row, shuffled", statistics.median(shuffled), 0.5)


def _num_tokens(encoded: list[Any]) -> int:
    return sum(map(len, encoded))


def _serve(source: Source, num_steps: int) -> int:
    """Serve some steps; return the number of their tokens or samples."""
    return sum(batch.tokens.size or len(batch.payloads or []) for batch in _batches(source, num_steps))


def _batches(source: Source, num_steps: int) -> Iterator[Any]:
    """Yield the batches of some steps, read in this thread."""
    maker = BatchMaker(source, BatchSlice(), audit=False)
    state = PlannerState.start(source.num_domains)
    step = 0
    while step < num_steps:
        plan, state = source.planner.plan(state, source.weights)
        for batch in maker.batches(plan, 0):
            yield batch
            step += 1
    maker.close()


class _RecordingTokenizer:
    """A tokenizer that records the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def encode_each(self, documents: list[str]) -> Any:
        self.texts += documents
        return self._tokenizer.encode_each(documents)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _tokenized_texts(source: Source, num_steps: int) -> list[str]:
    """Return the texts that some steps tokenize, in order."""
    recording = _RecordingTokenizer(source.tokenizer)
    for _ in _batches(replace(source, tokenizer=recording), num_steps):  # type: ignore[arg-type]
        pass
    return recording.texts
