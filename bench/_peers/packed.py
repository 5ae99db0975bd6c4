"""Text to packed sequences of 1,024 tokens (and one more), as int64, by bare loops and by other systems."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench._peers.documents import MappedRows, lines, positioned_reads
from bench._peers.workload import ROWS_PER_BATCH, Workload

__all__ = ["SEQ_LEN", "Packer", "end_of_text", "gigatoken_encoder"]

SEQ_LEN = 1024
END_OF_TEXT = "<|endoftext|>"
GROUPED_ROWS = 4096
"""Documents that one call of `map` gets, for Hugging Face."""

Tokens = NDArray[np.uint32]
TextRow = msgspec.defstruct("TextRow", [("text", str)], gc=False)


def bare_gigatoken(work: Workload) -> Iterator[int]:
    """Encode texts that are in memory; nothing is packed."""
    encode, _ = gigatoken_encoder(work)
    decoder = msgspec.json.Decoder(TextRow)
    rows = next(positioned_reads(work.folder / "order-documents.npz", rows_per_batch=work.num_rows // 4))
    texts = [decoder.decode(row).text for row in rows]
    while True:
        for first in range(0, len(texts), ROWS_PER_BATCH):
            yield sum(map(len, map(encode, texts[first : first + ROWS_PER_BATCH])))


def in_file_order(work: Workload) -> Iterator[int]:
    """Decode, encode and pack in the order of the files; nothing is shuffled."""

    def batches() -> Iterator[list[bytes]]:
        while True:
            rows: list[bytes] = []
            for row in lines(work.jsonl):
                rows.append(row)
                if len(rows) == ROWS_PER_BATCH:
                    yield rows
                    rows = []

    yield from _decode_encode_pack(work, batches())


def in_our_order(work: Workload) -> Iterator[int]:
    """Read every row with one positioned read, in the order of our samples; decode, encode and pack it."""
    yield from _decode_encode_pack(work, positioned_reads(work.folder / "order-documents.npz"))


def torchdata(work: Workload, tokenizer: str) -> Iterator[int]:
    """Shuffle all rows with a StatefulDataLoader; encode and pack each batch in its collate function."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    if tokenizer == "gigatoken":
        encode, eos_id = gigatoken_encoder(work)
        encode_all: Callable[[list[str]], Sequence[Any]] = lambda texts: list(map(encode, texts))  # noqa: E731
    else:
        library, eos_id = _tokenizers(work)
        encode_all = lambda texts: [np.array(e.ids, np.uint32) for e in library.encode_batch_fast(texts)]  # noqa: E731
    pack = Packer(SEQ_LEN, eos_id).pack
    decoder = msgspec.json.Decoder(TextRow)
    loader = StatefulDataLoader(
        MappedRows(work.jsonl, decoder.decode),
        ROWS_PER_BATCH,
        shuffle=True,
        collate_fn=lambda rows: pack(encode_all([row.text for row in rows])),
    )
    while True:
        for batch in loader:
            yield len(batch) * SEQ_LEN


def huggingface(work: Workload) -> Iterator[int]:
    """Encode with `map`, then pack with the `group_texts` of the training examples; written to Arrow as they do."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    library, eos_id = _tokenizers(work)
    files = sorted(map(str, work.jsonl.iterdir()))
    texts = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work.own("huggingface")))
    texts = texts.shuffle(seed=0).select_columns(["text"])

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": [[*e.ids, eos_id] for e in library.encode_batch_fast(batch["text"])]}

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = [token for document in batch["input_ids"] for token in document]
        total = len(ids) // SEQ_LEN * SEQ_LEN
        sequences = [ids[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)]
        return {"input_ids": sequences, "labels": [sequence.copy() for sequence in sequences]}

    while True:
        for first in range(0, len(texts), GROUPED_ROWS):
            part = texts.select(range(first, min(first + GROUPED_ROWS, len(texts))))
            encoded = part.map(encode, batched=True, remove_columns=["text"])
            yield len(encoded.map(group_texts, batched=True, remove_columns=["input_ids"])) * SEQ_LEN


def _decode_encode_pack(work: Workload, batches: Iterator[list[bytes]]) -> Iterator[int]:
    encode, eos_id = gigatoken_encoder(work)
    pack = Packer(SEQ_LEN, eos_id).pack
    decode = msgspec.json.Decoder(TextRow).decode
    for rows in batches:
        yield len(pack([encode(decode(row).text) for row in rows])) * SEQ_LEN


def gigatoken_encoder(work: Workload) -> tuple[Callable[[str], Tokens], int]:
    """Return gigatoken's function for one text, and the id of the end-of-text token."""
    import gigatoken  # Installed in some of the environments only, like the libraries above.

    content = work.tokenizer.read_bytes()
    return gigatoken.Tokenizer.from_json(content).backend.encode, end_of_text(content)


def _tokenizers(work: Workload) -> tuple[Any, int]:
    import tokenizers

    content = work.tokenizer.read_bytes()
    return tokenizers.Tokenizer.from_buffer(content), end_of_text(content)


def end_of_text(content: bytes) -> int:
    """Return the id of the end-of-text token of a `tokenizer.json`."""
    return next(token["id"] for token in json.loads(content)["added_tokens"] if token["content"] == END_OF_TEXT)


class Packer:
    """Cut concatenated documents into sequences of `seq_len` + 1 tokens that overlap by one; keep the rest."""

    def __init__(self, seq_len: int, eos_id: int) -> None:
        self._seq_len = seq_len
        self._end = np.array([eos_id], np.uint32)
        self._rest = np.zeros(0, np.uint32)

    def pack(self, documents: Sequence[Tokens]) -> NDArray[np.int64]:
        """Return the sequences that the rest and the documents fill, shape (N, seq_len + 1)."""
        segments = [self._end] * (2 * len(documents) + 1)
        segments[0] = self._rest
        segments[1::2] = documents
        tokens = np.concatenate(segments)
        count = max(len(tokens) - 1, 0) // self._seq_len
        self._rest = tokens[count * self._seq_len :]
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self._seq_len + 1)[:: self._seq_len]
        return windows[:count].astype(np.int64)
