"""What is written down while a run goes on: five streams of events, each a file `metrics/<stream>.jsonl`.

K is the number of domains; lists over domains are in domain_id order. Every event also carries `time` (UTC, ISO 8601) and
`attempt`, which the tracker adds. A number that does not exist (a loss of no tokens) is null.
"""

from typing import TypedDict

__all__ = ["AttemptEvent", "CommEvent", "MixtureEvent", "StepEvent", "ValidationEvent"]


class AttemptEvent(TypedDict, total=False):
    """`attempts.jsonl`: one line when an attempt begins; what the other streams' numbers refer to."""

    step: int
    """The first step this attempt takes."""
    num_steps: int
    """Steps of the whole run."""
    num_ranks: int
    num_nodes: int
    hostname: str
    """Of rank 0."""
    device: str
    """What the trainer computes on, e.g. `cpu` or `NVIDIA GH200 120GB`."""
    num_parameters: int
    vocab_size: int
    seq_len: int
    global_batch_size: int
    domains: list[str]
    """Names of the K domains."""


class StepEvent(TypedDict, total=False):
    """`steps.jsonl`: one line every `training.log_every` steps, covering the `num_steps` steps that end with `step`."""

    step: int
    """The last step covered, from 0."""
    num_steps: int
    loss: float | None
    """Mean over all counted tokens of the steps covered, nats."""
    tokens: int
    """Counted (predicted) tokens of the steps covered, over all ranks."""
    tokens_per_s: float
    step_s: float
    """Wall time of a step on rank 0, mean over the steps covered."""
    data_wait_s: float
    """Part of `step_s` that rank 0 waited for its batch."""
    learning_rate: float
    num_ranks: int
    num_nonfinite: int
    """Sequences whose loss was not finite; they are in no other number but `domain_sequences`."""
    domain_loss: list[float | None]
    domain_tokens: list[int]
    domain_sequences: list[int]


class MixtureEvent(TypedDict, total=False):
    """`mixture.jsonl`: one line per chunk, written by the data plane."""

    step: int
    """The chunk's first step."""
    chunk: int
    domains: list[str]
    """Names of the K domains."""
    weights: list[float]
    """The wish."""
    served: list[float]
    """Share of each domain in everything served before the chunk."""
    cursors: list[int]
    """Where each domain's stream stands when the chunk begins."""
    epochs: list[float]
    """Passes over each domain when the chunk begins; 1.25 is one and a quarter."""


class CommEvent(TypedDict, total=False):
    """`comm.jsonl`: what the ranks' talking takes on rank 0, written by the data plane.

    One line per chunk with `plan_s` and `broadcast_s`, one per step with `reduce_s`.
    """

    step: int
    plan_s: float
    broadcast_s: float
    """From posting to completion; the steps meanwhile go on."""
    reduce_s: float
    """What training waited for the reduction of the step's losses; 0 when it was done before it was needed."""


class ValidationEvent(TypedDict, total=False):
    """`validation.jsonl`: one line every `training.validate_every` steps, and one at the end."""

    step: int
    """Steps that had been taken."""
    loss: float | None
    """Mean over all counted tokens, nats."""
    domain_loss: list[float | None]
    domain_tokens: list[int]
    num_nonfinite: int
