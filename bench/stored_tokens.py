"""Tokens per CPU-second from Megatron files to packed batches, next to a numpy gather in the same order.

    python -m bench stored_tokens

Seven domains in SlimPajama's proportions, documents of 250 tokens on average, sequences of 2,048, documents shuffled.
The same documents are stored in 7 and in 420 shards, all in the page cache. The gather gets the place of every document
in one array in memory, and makes the tokens, the document of each token and the loss mask. With `shuffle=sequence`, a
loop of one copy per sequence is the limit. Megatron-core makes one sequence at a time, without the document of each
token. All figures are CPU times of one process, medians of interleaved rounds. Prints a table and writes
bench/out/stored_tokens.json.
"""

import functools
import itertools
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._corpus import FOLDER, SHARES, make_once
from bench._figures import print_header, print_line, ratio
from bench._results import write_results
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.megatron import write_megatron

NUM_DOCUMENTS = 200_000
MEAN_TOKENS = 250
LOG_SIGMA = 0.8
"""Standard deviation of the logarithm of document lengths."""
VOCAB_SIZE = 50_000
SEQ_LEN = 2048
BATCH = 64
LARGE_BATCH = 256
"""Sequences per step; the larger ones with `shuffle=sequence` only."""
SETTLE_S = 0.05
"""After a round, a reading thread fills its queue. The round has the CPU time of that, and began with a full queue."""
STEPS_PER_ROUND = 128
"""A multiple of the steps of any read, which are 64 at most: all rounds find as many documents as they copy."""
MEGATRON_SEQUENCES = 640
"""Sequences per round; Megatron-core is slower, and needs no more for the same precision."""
ROUNDS = 7
SHARDS = (7, 420)


def main() -> None:
    """Measure, print and write all results."""
    with tempfile.TemporaryDirectory() as scratch:
        rates = measure(Path(scratch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print_header()
    lines = [
        ratio(f"{shards} shards", medians[f"{shards} shards"] / 1e6, "M tokens/s", limit, medians[other] / 1e6, goal)
        for shards, limit, other, goal in (
            (7, "numpy gather, same order, mask and ids", "gather", 0.5),
            (7, "Megatron-core GPTDataset", "megatron", 5),
            (420, "7 shards", "7 shards", 0.8),
        )
        if other in medians
    ]
    for batch in (BATCH, LARGE_BATCH):
        copies = ("M tokens/s", "the same contiguous copies, mask and ids", medians[f"copies, {batch}"] / 1e6, 0.5)
        lines.append(ratio(f"shuffle=sequence, {batch} per step", medians[f"sequences, {batch}"] / 1e6, *copies))
    for line in lines:
        print_line(line)
    for name, values in rates.items():
        sequence_us = SEQ_LEN / statistics.median(values) * 1e6
        print(f"{name:14} {sequence_us:.1f} µs per sequence; {', '.join(f'{v / 1e6:.1f}' for v in values)} M tokens/s")
    write_results("stored_tokens", {"rates": rates, "lines": [asdict(line) for line in lines]})


def measure(scratch: Path) -> dict[str, list[float]]:
    """Return the tokens per CPU-second of every round, by what was measured."""
    works: dict[str, Callable[[], int]] = {}
    for shards in SHARDS:
        config = run_config(make_corpus(shards), scratch / f"{shards}.h5")
        build_index(config)
        works[f"{shards} shards"] = Served(config)
        if shards == SHARDS[0]:
            works["gather"] = Gather(config)
            works["best_fit"] = Served(replace(config, dataplane=replace(config.dataplane, pack="best_fit")))
            for batch in (BATCH, LARGE_BATCH):
                plane = replace(config.dataplane, shuffle="sequence", global_batch_size=batch)
                sequences = replace(config, dataplane=plane)
                works[f"sequences, {batch}"] = Served(sequences)
                works[f"copies, {batch}"] = Copies(sequences)
            add_megatron(works, Path(config.data.root))
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _, (name, work) in itertools.product(range(ROUNDS), works.items()):
        began_s = time.process_time()
        tokens = work()
        time.sleep(SETTLE_S)
        rates[name].append(tokens / (time.process_time() - began_s))
    return rates


def make_corpus(num_shards: int) -> Path:
    """Return a folder with the documents in `num_shards` shards; write it unless it exists."""
    return make_once(FOLDER / f"tokens-{num_shards}", functools.partial(write_corpus, num_shards // len(SHARES)))


def write_corpus(shards_per_domain: int, folder: Path, num_documents: int = NUM_DOCUMENTS) -> None:
    """Write the token files of all domains."""
    random = np.random.Generator(np.random.Philox(0))
    # A log-normal variable has the mean exp(mu + sigma² / 2).
    mu = np.log(MEAN_TOKENS) - LOG_SIGMA**2 / 2
    for name, share in SHARES.items():
        (folder / name).mkdir(exist_ok=True)
        for number in range(shards_per_domain):
            count = int(num_documents * share / shards_per_domain)
            lengths = np.clip(random.lognormal(mu, LOG_SIGMA, count), 5, 20_000).astype(np.int64)
            ids = random.integers(1, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
            ends = np.cumsum(lengths)
            # Every document ends with the end-of-text token, 0.
            ids[ends - 1] = 0
            write_megatron(folder / name / f"{number:04d}.bin", np.split(ids, ends[:-1]))


def run_config(root: Path, index: Path) -> Config:
    """Return the configuration of a run over a corpus."""
    sizes = [f"dataplane.seq_len={SEQ_LEN}", f"dataplane.global_batch_size={BATCH}"]
    return compose([*token_settings(root, index), *sizes])


def token_settings(root: Path, index: Path) -> list[str]:
    """Return the overrides of a corpus, without the size of batches."""
    return [
        f"data.root={root}",
        f"index.path={index}",
        "data.properties.source=__parent__",
        "mixture=natural",
        "mixture.group_by=[source]",
        f"dataplane.vocab_size={VOCAB_SIZE}",
        "dataplane.eos_id=0",
        # Read in this process, whose CPU time is measured.
        "dataplane.workers=0",
    ]


class Served:
    """Batches of the public `DataPlane`."""

    def __init__(self, config: Config) -> None:
        self._plane = DataPlane.open(config, Local())
        self._batches = iter(self._plane)
        next(self._batches)

    def __call__(self) -> int:
        """Take the batches of a round; return their tokens."""
        return sum(batch.tokens.size for batch in itertools.islice(self._batches, STEPS_PER_ROUND))


class Gather:
    """A loop in numpy that makes the same batches from known places of documents."""

    def __init__(self, config: Config) -> None:
        source = open_source(config, Local())
        self._batch = config.dataplane.global_batch_size
        root = Path(source.index.data_root)
        shards = [np.fromfile(root / path, np.uint16) for path in source.index.shard_paths]
        sizes = np.array([len(ids) for ids in shards])
        self._ids = np.concatenate(shards)
        self._batches = itertools.cycle(list(_places(source, np.cumsum(sizes) - sizes)))

    def __call__(self) -> int:
        """Make the batches of a round; return their tokens."""
        return sum(self._make(*next(self._batches)) for _ in range(STEPS_PER_ROUND))

    def _make(self, starts: NDArray[Any], lengths: NDArray[Any], is_beginning: NDArray[Any]) -> int:
        before = np.cumsum(lengths) - lengths
        place = np.repeat(starts - before, lengths)
        place += np.arange(len(place))
        shape = (self._batch, SEQ_LEN + 1)
        tokens = self._ids[place].astype(np.int64).reshape(shape)
        document_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).reshape(shape)
        mask = np.ones(len(place), np.bool_)
        mask[before[is_beginning]] = False
        loss_mask = mask.reshape(shape)[:, 1:]
        return int(tokens.size + 0 * document_ids[0, 0] + 0 * loss_mask[0, 0])


class Copies(Gather):
    """A loop that copies whole sequences, whose documents follow each other in one file."""

    def _make(self, starts: NDArray[Any], lengths: NDArray[Any], is_beginning: NDArray[Any]) -> int:
        length = SEQ_LEN + 1
        before = np.cumsum(lengths) - lengths
        firsts = np.minimum(starts[before % length == 0], len(self._ids) - length)
        tokens = np.empty((self._batch, length), np.int64)
        for row, first in enumerate(firsts.tolist()):
            tokens[row] = self._ids[first : first + length]
        document_ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths).reshape(tokens.shape)
        mask = np.ones(tokens.size, np.bool_)
        mask[before[is_beginning]] = False
        loss_mask = mask.reshape(tokens.shape)[:, 1:]
        return int(tokens.size + 0 * document_ids[0, 0] + 0 * loss_mask[0, 0])


def _places(source: Source, shard_starts: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Yield for the steps of a round: place and length of every piece of a document, and whether it begins one."""
    streams = source.streams()
    batch = source.config.dataplane.global_batch_size
    state = PlannerState.start(source.num_domains)
    num_steps = 0
    while num_steps < ROUNDS * STEPS_PER_ROUND:
        plan, state = source.planner.plan(state, source.weights)
        slots = slots_of_plan(source, plan)
        sequences = source.lanes.sequence(slots.domain, slots.ordinal)
        for first in range(0, plan.num_steps * batch, batch):
            pieces = []
            for slot in range(first, first + batch):
                domain = int(slots.domain[slot])
                start, stop = source.span(domain, int(sequences[slot]), 1)
                documents = streams.documents(domain, start, stop)
                block = documents.block
                places = shard_starts[source.blocks.shard[block]]
                places += (source.blocks.offset[block] + documents.offset) // 2 + documents.first
                pieces.append((places, documents.last - documents.first, documents.first == 0))
            starts, lengths, is_beginning = map(np.concatenate, zip(*pieces, strict=True))
            yield starts, lengths, is_beginning
        num_steps += plan.num_steps


def add_megatron(works: dict[str, Callable[[], int]], root: Path) -> None:
    """Add Megatron-core's blend of the same files, if it is installed."""
    try:
        # Heavy, and only the peer needs them.
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    except ImportError as error:
        print(f"Megatron-core is absent: {error}")
        return
    torch.set_num_threads(1)
    names = list(SHARES)
    tokenizer = types.SimpleNamespace(vocab_size=VOCAB_SIZE, eod=0, pad=-1, unique_identifiers={"name": "bench"})
    settings = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LEN,
        blend=([str(root / name / "0000") for name in names], [SHARES[name] for name in names]),
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
    )
    num_sequences = ROUNDS * MEGATRON_SEQUENCES
    built: Any = BlendedMegatronDatasetBuilder(GPTDataset, [num_sequences, 0, 0], lambda: True, settings).build()
    numbers = iter(range(num_sequences))
    works["megatron"] = lambda: sum(
        len(built[0][number]["tokens"]) for number in itertools.islice(numbers, MEGATRON_SEQUENCES)
    )


if __name__ == "__main__":
    main()
