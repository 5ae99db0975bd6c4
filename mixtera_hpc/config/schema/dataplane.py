"""Settings of the group `dataplane`: how samples become the batches of every rank."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["BatchStageConfig", "DataPlaneConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStageConfig:
    """One stage of a batch ramp."""

    start: int
    """First step of the stage, above 0. Steps that `resume --skip-steps` skips count too."""
    size: int
    """Sequences (or samples) of one step, over all ranks, from this step on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneConfig:
    """Rules by which samples become the batches of every rank."""

    tokenizer: str | None = None
    """Path of a Hugging Face `tokenizer.json`. Required by `mixture.unit=tokens`, unless all shards hold token ids."""
    vocab_size: int | None = None
    """Used instead of a tokenizer when all shards hold token ids (Megatron): the largest id plus one."""
    eos_id: int | None = None
    """The token id that ends a document. Used with `dataplane.vocab_size`."""
    seq_len: int = 1024
    """Predicted tokens per sequence. A sequence holds one token more."""
    overlap_one_token: bool = True
    """True: each sequence begins with the last token of the one before, so that every token is predicted once. False:
    no token appears in two sequences, and every (seq_len + 1)th token is never predicted."""
    global_batch_size: int = 64
    """Sequences (or samples, with `mixture.unit=samples`) of one step, over all ranks."""
    batch_schedule: list[BatchStageConfig] = field(default_factory=list)
    """Batch ramp: stages in ascending order of `start`. Before the first one, steps have
    `dataplane.global_batch_size`. For example `[{start: 1000, size: 128}, {start: 2000, size: 256}]`."""
    last_batch: Literal["drop", "pad"] = "drop"
    """The sequences (or samples) at the end of the data that do not fill a global batch. `drop`: they are not served.
    `pad`: one more batch serves them. The rows that are left over have `is_padding` set and count nowhere."""
    chunk_steps: int = 8
    """Steps per chunk. The weights of the mixture change at chunk boundaries only, and each chunk costs one
    broadcast."""
    feedback_lag: int = 2
    """Losses of chunk c change the weights of chunk c + feedback_lag and later ones. At least 2."""
    seed: int = 0
    """Seed of every shuffle, 0 to 2**63 - 1."""
    shuffle: Literal["none", "block", "window", "sequence"] = "window"
    """`none`: index order. `block`: blocks in random order. `window`: blocks in random order, and rows in random order
    inside windows of `dataplane.window_bytes`; sequences come from `dataplane.lanes` windows in turn. `sequence`:
    documents in index order, and the sequences of each epoch in random order (docs/packing.md)."""
    window_bytes: int = 8388608
    """Decoded bytes of the blocks whose rows are shuffled together, at least one block; for
    `dataplane.shuffle=window`. The bytes of compressed blocks are estimated."""
    lanes: int | None = None
    """Parts into which the windows of an epoch are cut, 1 to 65536, for `dataplane.shuffle=window`. Sequences are taken
    from the lanes in turn, and those of a step go to ranks by lane. More lanes mix better and need more memory. Null:
    one for every 32 sequences of the largest global batch, a power of two from 16 to 1024; fewer for compressed data
    whose windows need more than 640 MiB. A run keeps the number that it began with."""
    pack: Literal["concat", "best_fit"] = "concat"
    """The way from documents to sequences. `concat`: one document after the other, cut where a sequence ends.
    `best_fit`: the documents of `dataplane.pack_group` sequences are reordered so that few are cut. Nothing is padded
    or lost (docs/packing.md)."""
    pack_group: int = 64
    """Consecutive sequences of a domain that `dataplane.pack=best_fit` packs together, 2 to 4096."""
    balance: Literal["none", "attention", "cost"] = "none"
    """The order of the sequences inside a step. `none`: that of the plan. `attention`: ordered inside groups of
    `dataplane.balance_group` positions so that the sums of squares of document lengths are nearly equal on all ranks.
    `cost`: the same for samples and their `dataplane.sample_cost`. The content of a step stays the same
    (docs/packing.md)."""
    balance_group: int | None = None
    """Neighbouring positions of the global batch that `dataplane.balance` orders together; must divide
    `dataplane.global_batch_size`. Null: the largest divisor up to 64."""
    sample_cost: str | None = None
    """With `mixture.unit=samples`: the number property that is the cost of a sample, for example its text and image
    tokens; `tokens` and `bytes` are built in. `transform`: the function `data.transform` gives the cost."""
    sample_budget: float | None = None
    """With `dataplane.sample_cost`: the samples of a rank are cut into micro-batches that cost at most this. All ranks
    get the same number of micro-batches; those at the end may be empty (docs/packing.md). Null: no micro-batches."""
    add_bos: bool | None = None
    """Begin every document with the token that begins a text. Null does what the tokenizer's post-processor does, for
    example Llama's `<s>`."""
    add_eos: bool = True
    """End every document with the end-of-text token."""
    eos_token: str | None = None
    """Text of the end-of-text token. Null takes it from the tokenizer's files."""
    special_tokens_in_text: Literal["text", "allow"] = "text"
    """The text of a special token, such as `<|endoftext|>`, inside a document. `text`: encoded like any other text.
    `allow`: encoded as the special token."""
    chat_loss: Literal["assistant", "all"] = "assistant"
    """Tokens of a conversation (`data.text=chat:PATH`) that count. `assistant`: those that the assistant wrote. `all`:
    also those of the other messages and of the chat template."""
    predict_across_documents: bool = False
    """Count the loss of the first token of a document, which is predicted from the document before it."""
    prefetch_batches: int = 4
    """Batches that are prepared ahead of the trainer."""
    workers: int | None = None
    """Processes that read and tokenize for each rank. With 0 a thread of the rank reads, which holds up the trainer's
    own Python code. Null means 1 for tokens where a rank has two cores or more, else 0. At most 4 for each core of a
    rank (`job.cpus_per_rank`), or 64 where the cores are not known."""
    model_parallel_size: int = 1
    """Number of neighbouring ranks that receive the same batch: tensor × pipeline × context parallel size. Must divide
    the number of ranks."""
    delivery: Literal["each", "lead"] = "each"
    """Delivery of a batch to a model-parallel group. `each`: every rank reads and tokenizes it. `lead`: the first rank
    of the group does, and passes it on; needs `mixture.unit=tokens`."""
    comm: Literal["auto", "local", "mpi", "torch"] = "auto"
    """Communication between ranks. `auto`: through torch's process group if it is initialised, else MPI if mpiexec or
    srun started several processes, else this process is alone. Fewer ranks than the launcher started are refused."""
    watchdog_s: float = 60
    """Seconds without progress after which the ranks at fault are named in the log, in the run folder and by `status`.
    0 turns the watchdog off; a stop request while a rank is stopped or stuck is then not honoured."""
    watchdog_trainer_s: float = 1800
    """The same limit for the time in the trainer's own code (compile, save, validate) while no rank waits for it."""
    watchdog: Literal["warn", "abort"] = "warn"
    """Action after the same time again without progress. `warn`: none. `abort`: all ranks end with an error."""
    scalars: dict[str, float] = field(default_factory=dict)
    """Numbers of every sequence that the trainer records besides the loss, such as `{grad_norm: 10.0}`: name → scale,
    its largest absolute value. Values beyond it are counted and left out (`DataPlane.record`)."""
    audit: bool = False
    """Log a digest of every sequence (or sample) handed to the trainer, for `mixtera-hpc trace --verify`."""
    record_losses: bool = False
    """Log the mean loss of every sequence (or sample) that the trainer records, for `mixtera-hpc trace --worst`:
    4 bytes per sequence, and 20 bytes per step and rank."""
