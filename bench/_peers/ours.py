"""Mixtera-HPC as a training script uses it: `DataPlane`, with defaults for everything that is not named here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._peers import packed, tokens
from bench._peers.corpora import document_bounds
from bench._peers.workload import ROWS_PER_BATCH, Order, Workload
from mixtera_hpc import DataPlane, compose
from mixtera_hpc.comm.communicator import COMPLETED_REQUEST, CollectiveRequest, Communicator, Local, Op
from mixtera_hpc.dataplane.reading.sample_transform import ServedSample
from mixtera_hpc.index.build.build import build_index

__all__ = ["DATA", "build", "documents", "record_order", "sequences"]

PACKED_SEQUENCES = 64
SOURCE = "data.properties.domain=meta.redpajama_set_name"
TEXT: dict[str, tuple[str, ...]] = {
    "jsonl-10": (SOURCE,),
    "jsonl-300": (SOURCE,),
    "jsonl-5000": (SOURCE,),
    "zst": (SOURCE,),
    "zst-frames": (SOURCE,),
    "domains-100": ("data.properties.domain={path: meta.part, pattern: '^(..)'}",),
    "domains-1000": ("data.properties.domain=meta.part",),
}
TOKENIZED = "jsonl-10"
"""The data set whose texts are also served as tokens."""
TOKENS = dict.fromkeys(
    ("tokens", "tokens-420"),
    ("data.properties.domain={path: __stem__, pattern: '^([^-]*)'}", f"dataplane.vocab_size={tokens.VOCAB_SIZE}"),
)
DATA = TEXT | TOKENS
"""Name of a data set → how its domains are found. It is the name of its folder, except for those of more domains."""


def documents(work: Workload, data: str, num_ranks: int = 1) -> Iterator[int]:
    """Serve documents, shuffled and mixed; with several ranks the part of rank 0."""
    for batch in _batches(work, data, num_ranks, *_unit_samples(num_ranks)):
        yield len(batch.payloads)


def sequences(work: Workload, data: str, num_ranks: int = 1) -> Iterator[int]:
    """Serve packed sequences, shuffled and mixed; with several ranks the part of rank 0. Counts tokens."""
    size = tokens.SEQUENCES_PER_BATCH if data in TOKENS else PACKED_SEQUENCES
    seq_len = tokens.SEQ_LEN if data in TOKENS else packed.SEQ_LEN
    settings = f"dataplane.seq_len={seq_len}", f"dataplane.global_batch_size={size * num_ranks}"
    for batch in _batches(work, data, num_ranks, *settings):
        yield batch.loss_mask.size


def _unit_samples(num_ranks: int) -> tuple[str, str]:
    return "mixture.unit=samples", f"dataplane.global_batch_size={ROWS_PER_BATCH * num_ranks}"


def _batches(work: Workload, data: str, num_ranks: int, *settings: str) -> Iterator[Any]:
    comm: Communicator = Local() if num_ranks == 1 else _FirstRank(num_ranks)
    with DataPlane.open(compose([*_overrides(work, data), *settings]), comm) as plane:
        yield from plane


def _overrides(work: Workload, data: str) -> list[str]:
    folder = "jsonl-10" if data.startswith("domains") else data
    overrides = [
        f"data.root={work.folder / folder}",
        f"index.path={work.own('mixtera-hpc') / f'{data}.h5'}",
        "mixture.group_by=[domain]",
        *DATA[data],
    ]
    if data in TOKENS:
        overrides.append(f"dataplane.eos_id={packed.end_of_text(work.tokenizer.read_bytes())}")
    elif data == TOKENIZED:
        overrides.append(f"dataplane.tokenizer={work.tokenizer}")
    else:
        overrides.append("mixture.unit=samples")
    return overrides


class _FirstRank(Local):
    """Rank 0 of a job whose other ranks say what it says. Four ranks share a node."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size  # type: ignore[misc]
        self.local_size = min(size, 4)  # type: ignore[misc]

    def Dup(self) -> "_FirstRank":
        return _FirstRank(self.size)

    def Allgather(self, buffer: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(buffer[None], self.size, axis=0)

    def Allreduce(self, buffer: NDArray[Any], op: Op = "sum") -> NDArray[Any]:
        return buffer * self.size if op == "sum" else buffer.copy()

    def Iallreduce(self, buffer: NDArray[Any], result: NDArray[Any], op: Op = "sum") -> CollectiveRequest:
        result[...] = self.Allreduce(buffer, op)
        return COMPLETED_REQUEST


def build(work: Workload, data: str) -> None:
    """Build the index of a data set anew, since another version of the code may have written the last one."""
    config = compose(_overrides(work, data))
    Path(config.index.path).unlink(missing_ok=True)
    build_index(config)


def record_order(work: Workload, data: str, path: Path) -> None:
    """Write the order in which one pass over the documents of a data set is served."""
    transform = f"data.transform={__name__}.place"
    places: list[tuple[str, int]] = []
    for batch in _batches(work, data, 1, *_unit_samples(1), transform):
        places += batch.payloads
        if len(places) >= work.num_rows:
            break
    root = work.folder / data
    names = sorted({name for name, _ in places})
    number = {name: position for position, name in enumerate(names)}
    shard = np.array([number[name] for name, _ in places])
    row = np.array([row for _, row in places])
    offset = np.zeros(len(places), np.int64)
    length = np.zeros(len(places), np.int64)
    for position, name in enumerate(names):
        starts, lengths = document_bounds(work, root / name)
        chosen = shard == position
        offset[chosen] = starts[row[chosen]]
        length[chosen] = lengths[row[chosen]]
    Order(shards=[root / name for name in names], shard=shard, offset=offset, length=length).save(path)


def place(row: Any, sample: ServedSample) -> tuple[str, int]:
    """Return where a document is, for `data.transform`."""
    return sample.shard, sample.row
