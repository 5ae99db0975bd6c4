"""The table of what is measured: sections, and the systems of each. A system is opened by `call(workload, **options)`.

The first system of a section is the reference: the ratio of another one is the rate of the first, divided by its own
in the same round. So it says how often faster the first is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench._peers.environments import OURS

__all__ = ["SECTIONS", "Section", "System"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the table."""

    name: str
    order: str = ""
    """Order of what it serves, in words."""
    call: str
    """`module.function` below `bench._peers`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = OURS
    is_published: bool = True
    """False for a peer that was given a faster decoder than its own or that of Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One table: the same work by several systems, or by ours for several sizes."""

    key: str
    title: str
    text: str
    unit: str
    systems: tuple[System, ...]


SHUFFLED_MIXED = "rows shuffled, domains mixed exactly"
FILE_ORDER = "file order"
OUR_ORDER = "that of Mixtera-HPC"
ROWS_SHUFFLED = "rows shuffled"
WINDOWS_SHUFFLED = "fixed windows of the files shuffled"


def _ours(call: str, data: str, **options: Any) -> System:
    return System(name="Mixtera-HPC", order=SHUFFLED_MIXED, call=f"ours.{call}", options={"data": data, **options})


def _bare(name: str, order: str, call: str) -> System:
    return System(name=name, order=order, call=call)


def _peer(environment: str, name: str, order: str, call: str, **options: Any) -> System:
    return System(
        name=name,
        order=order,
        call=call,
        options=options,
        environment=environment,
        is_published="msgspec" not in name,
    )


def _series(call: str, data: str, name: str, option: str, values: tuple[Any, ...]) -> tuple[System, ...]:
    """Return ours for several values: `{}` in `data` is the value, or else it is given as `option`."""
    return tuple(
        System(
            name=name.format(f"{value:,}") if value != 1 else name.format(1).removesuffix("s"),
            call=f"ours.{call}",
            options={"data": data.format(value), **({option: value} if option else {})},
        )
        for value in values
    )


DOCUMENTS = Section(
    key="documents",
    title="Documents",
    text="Rows of JSON lines (10 shards) to batches of 256 dicts.",
    unit="rows",
    systems=(
        _ours("documents", "jsonl-10"),
        _bare("msgspec, line by line", FILE_ORDER, "documents.in_file_order"),
        _bare("a positioned read and msgspec per row", OUR_ORDER, "documents.in_our_order"),
        _peer("torchdata", "torchdata, json", ROWS_SHUFFLED, "documents.torchdata", decoder="json"),
        _peer("torchdata", "torchdata, msgspec", ROWS_SHUFFLED, "documents.torchdata", decoder="msgspec"),
        _peer("litdata", "LitData, msgspec", "chunks shuffled, and rows in them", "documents.litdata"),
        _peer("huggingface", "Hugging Face datasets, map style", ROWS_SHUFFLED, "documents.huggingface"),
        _peer("grain", "Grain, msgspec", ROWS_SHUFFLED, "documents.grain"),
    ),
)

PACKED = Section(
    key="packed",
    title="Text to packed tokens",
    text="The same rows, tokenized and packed to sequences of 1,024, in batches of 64 sequences or of 256 documents, "
    "which is about as much. Mixtera-HPC also makes loss masks and document ids, the others only tokens.",
    unit="tokens",
    systems=(
        _ours("sequences", "jsonl-10"),
        _bare("gigatoken on texts in memory, not packed", OUR_ORDER, "packed.bare_gigatoken"),
        _bare("msgspec, gigatoken, packing", FILE_ORDER, "packed.in_file_order"),
        _bare("positioned reads, msgspec, gigatoken, packing", OUR_ORDER, "packed.in_our_order"),
        _peer("torchdata", "torchdata, gigatoken", ROWS_SHUFFLED, "packed.torchdata", tokenizer="gigatoken"),
        _peer("torchdata", "torchdata, tokenizers", ROWS_SHUFFLED, "packed.torchdata", tokenizer="tokenizers"),
        _peer("huggingface", "Hugging Face map and group_texts", ROWS_SHUFFLED, "packed.huggingface"),
    ),
)

TOKENS = Section(
    key="tokens",
    title="Stored tokens",
    text="The same documents as token ids (uint16 Megatron files, one per domain) to batches of 32 sequences of 2,048.",
    unit="tokens",
    systems=(
        _ours("sequences", "tokens"),
        _bare("copy uint16 to int64", FILE_ORDER, "tokens.memcpy"),
        _bare("numpy gather, mask and document ids", OUR_ORDER, "tokens.numpy_gather"),
        _peer("torchdata", "torchdata, mapped files", WINDOWS_SHUFFLED, "tokens.torchdata"),
        _peer("torchdata", "loop over windows as in OLMo", WINDOWS_SHUFFLED, "tokens.olmo_loop"),
        _peer("litdata", "LitData TokensLoader", "chunks shuffled, and windows in them", "tokens.litdata"),
        _peer("megatron", "Megatron-core GPTDataset, blended", "documents and windows shuffled", "tokens.megatron"),
    ),
)

COMPRESSED = Section(
    key="compressed",
    title="Compressed shards",
    text="The same rows as 10 `.jsonl.zst` shards of one frame each, as SlimPajama has them, to batches of 256 dicts.",
    unit="rows",
    systems=(
        _ours("documents", "zst"),
        _bare("streams, buffer of 10,000 rows, msgspec", "shuffled in the buffer", "compressed.shuffle_buffer"),
        _peer(
            "huggingface",
            "Hugging Face streaming, buffer of 10,000 rows",
            "shuffled in the buffer",
            "compressed.huggingface",
        ),
    ),
)

NUM_RANKS = (1, 4, 16, 64)
RANKS_TEXT = "Rank 0 of a simulated job, which also plans. Its own part of a step is always {}."

SECTIONS = (
    DOCUMENTS,
    PACKED,
    TOKENS,
    COMPRESSED,
    Section(
        key="shards",
        title="Number of shards",
        text="The rows of the first table in more shards.",
        unit="rows",
        systems=_series("documents", "jsonl-{}", "{} shards", "", (10, 300, 5000)),
    ),
    Section(
        key="shards-tokens",
        title="Number of shards: stored tokens",
        text="The stored tokens of the table above in 60 shards per domain.",
        unit="tokens",
        systems=(
            System(name="7 shards", call="ours.sequences", options={"data": "tokens"}),
            System(name="420 shards", call="ours.sequences", options={"data": "tokens-420"}),
        ),
    ),
    Section(
        key="domains",
        title="Number of domains",
        text="The rows of the first table, divided into more domains, which occur in random order.",
        unit="rows",
        systems=(
            System(name="7 domains", call="ours.documents", options={"data": "jsonl-10"}),
            *_series("documents", "domains-{}", "{} domains", "", (100, 1000)),
        ),
    ),
    Section(
        key="ranks",
        title="One rank of many: documents",
        text=RANKS_TEXT.format("256 documents of JSON lines"),
        unit="rows",
        systems=_series("documents", "jsonl-10", "{} ranks", "num_ranks", NUM_RANKS),
    ),
    Section(
        key="ranks-packed",
        title="One rank of many: packed tokens",
        text=RANKS_TEXT.format("64 packed sequences of 1,024 tokens"),
        unit="tokens",
        systems=_series("sequences", "jsonl-10", "{} ranks", "num_ranks", NUM_RANKS),
    ),
    Section(
        key="ranks-zst",
        title="One rank of many: compressed frames",
        text=RANKS_TEXT.format("256 documents of `.jsonl.zst` shards with frames of 256 rows"),
        unit="rows",
        systems=_series("documents", "zst-frames", "{} ranks", "num_ranks", NUM_RANKS),
    ),
)
