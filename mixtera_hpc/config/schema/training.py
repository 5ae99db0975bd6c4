"""Settings of the groups `training` and `checkpoint`: the reference trainer, a small GPT."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["CheckpointConfig", "TrainingConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The reference trainer: a small GPT, trained with AdamW."""

    num_steps: int = 100
    """Optimizer steps of the whole run."""
    num_layers: int = 4
    """Transformer blocks of the model."""
    num_heads: int = 4
    """Attention heads of each block."""
    embedding_dim: int = 128
    """Width of the model. A multiple of 2 × `training.num_heads`."""
    attention: Literal["sequence", "document"] = "sequence"
    """`sequence`: a token attends to all tokens before it in its sequence. `document`: only to those of its own
    document, and positions start anew with every document."""
    learning_rate: float = 1e-3
    """Largest learning rate, reached after the warm-up. Above 0."""
    warmup_steps: int = 10
    """Steps over which the learning rate rises to `training.learning_rate`."""
    anneal_from_step: int | None = None
    """Step from which the learning rate falls linearly from `training.anneal_from_rate` to 0 at
    `training.num_steps`; `mixtera-hpc fork` sets both. Null keeps the schedule."""
    anneal_from_rate: float = 0.0
    """Learning rate at `training.anneal_from_step`."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. Above 0."""
    micro_batch_size: int | None = None
    """Sequences per forward pass. Null means all sequences of the rank at once."""
    seed: int = 0
    """Seed of the initial weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device on which the model is trained. `auto`: a GPU if there is one."""
    num_threads: int = 1
    """CPU threads of torch in each rank."""
    validate_every: int = 0
    """Steps between two validations on the held-out samples (`query.holdout`); one more follows at the end. With 0
    there is no validation."""
    validate_steps: int = 8
    """Global batches per validation, always the same ones. Fewer if the held-out samples fill fewer."""
    validate_min_sequences: int = 1
    """Sequences of every domain in a validation, as far as it has held-out ones. If natural proportions give fewer, the
    domain gets these, and a validation more batches where needed; the mean loss stays that of natural proportions."""
    stop_after: int | None = None
    """Save and exit with code 75 after this step, as if a stop had been requested."""
    log_every: int = 1
    """Steps between two lines of `metrics/steps.jsonl`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the reference trainer: the steps at which it saves, and the number that stay."""

    every_steps: int = 0
    """Steps between two checkpoints. With 0 a run saves only at its end and when it is asked to stop."""
    keep: int = 2
    """Number of newest checkpoints that stay; older ones are removed."""
