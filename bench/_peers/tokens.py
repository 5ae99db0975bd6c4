"""Stored token ids (uint16) to sequences of 2,048 tokens (and one more), as int64, in batches of 32.

The files are those of Megatron: `NAME.bin` holds the ids of all documents, `NAME.idx` says where they begin.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._peers.workload import Workload, load_order

__all__ = ["SEQUENCES_PER_BATCH", "SEQ_LEN"]

SEQ_LEN = 2048
SEQUENCES_PER_BATCH = 32
VOCAB_SIZE = 32_768
DOCUMENTS_AT_ONCE = 256
TOKEN_BYTES = 2


def memcpy(work: Workload) -> Iterator[int]:
    """Copy the files from beginning to end, uint16 to int64; nothing is shuffled."""
    size = SEQ_LEN * SEQUENCES_PER_BATCH
    while True:
        for tokens in _mapped(work):
            for first in range(0, len(tokens) - size, size):
                yield tokens[first : first + size].astype(np.int64).size


def numpy_gather(work: Workload) -> Iterator[int]:
    """Gather documents in our order; pack them, with loss mask and document ids."""
    order = load_order(work.folder / "order-tokens.npz")
    maps = [_map(path) for path in order.shards]
    first_token = order.offset // TOKEN_BYTES
    last_token = (order.offset + order.length) // TOKEN_BYTES
    places = list(zip(order.shard.tolist(), first_token.tolist(), last_token.tolist(), strict=True))
    rest = np.zeros(0, np.uint16)
    rest_ids = np.zeros(0, np.int32)
    while True:
        for first in range(0, len(places), DOCUMENTS_AT_ONCE):
            documents = [maps[shard][begin:end] for shard, begin, end in places[first : first + DOCUMENTS_AT_ONCE]]
            lengths = [len(document) for document in documents]
            # The rest of the last group begins a new count of documents.
            numbers = np.arange(1, len(documents) + 1, dtype=np.int32)
            tokens = np.concatenate([rest, *documents])
            ids = np.concatenate([rest_ids, np.repeat(numbers, lengths)])
            count = (len(tokens) - 1) // SEQ_LEN
            rest = tokens[count * SEQ_LEN :]
            rest_ids = ids[count * SEQ_LEN :] - np.int32(len(documents))
            yield _sequences(tokens, ids, count)[0].shape[0] * SEQ_LEN


def _sequences(tokens: NDArray[Any], ids: NDArray[np.int32], count: int) -> tuple[NDArray[Any], ...]:
    """Return tokens, document ids and loss mask of `count` sequences that overlap by one token."""
    batch = _windows(tokens)[:count].astype(np.int64)
    document_ids = _windows(ids)[:count]
    document_ids = document_ids - document_ids[:, :1]
    loss_mask = document_ids[:, 1:] == document_ids[:, :-1]
    return batch, document_ids, loss_mask


def _windows(values: NDArray[Any]) -> NDArray[Any]:
    return np.lib.stride_tricks.sliding_window_view(values, SEQ_LEN + 1)[::SEQ_LEN]


def torchdata(work: Workload) -> Iterator[int]:
    """Shuffle fixed windows of mapped files with a StatefulDataLoader; documents inside stay in file order."""
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Windows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self._maps = _mapped(work)
            self._places = [(n, i) for n, m in enumerate(self._maps) for i in range((len(m) - 1) // SEQ_LEN)]

        def __len__(self) -> int:
            return len(self._places)

        def __getitem__(self, item: int) -> Any:
            number, window = self._places[item]
            tokens = self._maps[number][window * SEQ_LEN : (window + 1) * SEQ_LEN + 1]
            return torch.from_numpy(tokens.astype(np.int64))

    loader = StatefulDataLoader(Windows(), SEQUENCES_PER_BATCH, shuffle=True)
    while True:
        for batch in loader:
            yield batch.shape[0] * SEQ_LEN


def olmo_loop(work: Workload) -> Iterator[int]:
    """Shuffle fixed windows; open the file and read the bytes of each, as OLMo's dataset does."""
    import torch

    sizes = [(path, path.stat().st_size // TOKEN_BYTES // SEQ_LEN) for path in _files(work)]
    places = [(path, i * SEQ_LEN * TOKEN_BYTES) for path, count in sizes for i in range(count)]
    random = np.random.Generator(np.random.Philox(0))
    while True:
        batch = []
        for item in random.permutation(len(places)).tolist():
            path, offset = places[item]
            with path.open("rb") as file:
                file.seek(offset)
                tokens = np.frombuffer(file.read(SEQ_LEN * TOKEN_BYTES), np.uint16)
            batch.append(torch.tensor(tokens.astype(np.int_), dtype=torch.long))
            if len(batch) == SEQUENCES_PER_BATCH:
                yield torch.stack(batch).numel()
                batch = []


def litdata(work: Workload) -> Iterator[int]:
    """Shuffle chunks, and blocks inside of them, with LitData's TokensLoader over optimized data."""
    import litdata as library
    import torch

    folder = work.own("litdata") / "tokens"
    if not (folder / "index.json").exists():
        library.optimize(
            _whole_file,
            list(map(str, _files(work))),
            str(folder),
            chunk_size=(SEQ_LEN + 1) * 4096,
            num_workers=1,
            item_loader=library.TokensLoader(),
        )
    loader = library.TokensLoader(block_size=SEQ_LEN + 1)
    dataset = library.StreamingDataset(str(folder), item_loader=loader, shuffle=True, seed=0)
    batches = library.StreamingDataLoader(
        dataset, batch_size=SEQUENCES_PER_BATCH, num_workers=0, collate_fn=lambda items: torch.stack(items).long()
    )
    while True:
        for batch in batches:
            yield batch.shape[0] * SEQ_LEN


def _whole_file(path: str) -> Iterator[Any]:
    """Yield the tokens of a file in parts, for LitData's `optimize`."""
    import torch

    tokens = _map(Path(path))
    for first in range(0, len(tokens), 1 << 16):
        yield torch.from_numpy(tokens[first : first + (1 << 16)].astype(np.int32))


def megatron(work: Workload) -> Iterator[int]:
    """Blend one GPTDataset per domain in natural proportions; torch's DataLoader makes batches."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    # A blend of several datasets asks for the rank.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    prefixes = [str(path.with_suffix("")) for path in _files(work)]
    sizes = [path.stat().st_size / TOKEN_BYTES for path in _files(work)]
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ_LEN,
        blend=(prefixes, sizes),
        split="1,0,0",
        path_to_cache=str(work.own("megatron")),
        tokenizer=_MegatronTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    num_sequences = int(sum(sizes)) // SEQ_LEN
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [num_sequences, 0, 0], lambda: True, config)
    loader = torch.utils.data.DataLoader(builder.build()[0], batch_size=SEQUENCES_PER_BATCH)
    while True:
        for batch in loader:
            yield batch["tokens"].numel()


class _MegatronTokenizer:
    """The part of a tokenizer that a GPTDataset uses."""

    vocab_size = VOCAB_SIZE
    eod = VOCAB_SIZE - 1
    pad = VOCAB_SIZE - 1
    unique_identifiers = {"vocab": str(VOCAB_SIZE)}  # noqa: RUF012 (read only)


def _files(work: Workload) -> list[Path]:
    return sorted(work.tokens.glob("*.bin"))


def _mapped(work: Workload) -> list[NDArray[np.uint16]]:
    return [_map(path) for path in _files(work)]


def _map(path: Path) -> NDArray[np.uint16]:
    # Slices of a plain array are made faster than those of a memmap.
    return np.asarray(np.memmap(path, np.uint16, mode="r"))
