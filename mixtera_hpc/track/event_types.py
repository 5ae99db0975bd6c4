"""The metric events of a run: seven streams, each recorded in a file `metrics/<stream>.jsonl`.

K is the number of domains. Lists over domains are in domain_id order. Every event also has `time` (UTC, ISO 8601) and
`attempt`, which the tracker adds. A number that is not defined (the mean loss over no tokens) is null.
"""

from typing import TypedDict

__all__ = ["AttemptEvent", "CommEvent", "HostsEvent", "MixtureEvent", "StepEvent", "ValidationEvent"]


class AttemptEvent(TypedDict, total=False):
    """`attempts.jsonl`: one line at the start of an attempt, with the settings that the other streams refer to."""

    step: int
    """First step of this attempt."""
    num_steps: int
    """Number of steps of the whole run; 0 if it is not known."""
    num_ranks: int
    num_nodes: int
    hostname: str
    """Host of rank 0."""
    device: str
    """Device of the trainer, e.g. `cpu` or `NVIDIA GH200 120GB`."""
    num_parameters: int
    vocab_size: int
    seq_len: int
    global_batch_size: int
    lanes: int | None
    """Number of lanes of `dataplane.shuffle=window`; null for other orders."""
    domains: list[str]
    """Names of the K domains."""


class StepEvent(TypedDict, total=False):
    """`steps.jsonl`: one line every `training.log_every` steps, over the `num_steps` steps that end with `step`."""

    step: int
    """Last step covered; the first step of a run is 0."""
    num_steps: int
    loss: float | None
    """Mean loss over all counted tokens of the steps covered, in nats."""
    tokens: int
    """Counted (predicted) tokens of the steps covered, over all ranks."""
    tokens_per_s: float
    step_s: float
    """Mean wall time of a step on rank 0, over the steps covered."""
    data_wait_s: float
    """The part of `step_s` in which rank 0 waited for its batch, or for the batches of other ranks."""
    learning_rate: float
    num_ranks: int
    num_nonfinite: int
    """Sequences whose loss was not finite. Of the other numbers only `domain_sequences` includes them."""
    stage_s: dict[str, float]
    """Seconds of the slowest rank in every stage, mean over the steps covered, to 4 %. `wait`: for the rank's own
    reading; `plan` (rank 0) and `broadcast` (other ranks): for the plan; `reduce`: for other ranks' losses. Beside the
    trainer: `read` (waiting for storage or for a core), `decode`, `tokenize`, `pack` (with `data.transform`)."""
    stage_max_s: dict[str, float]
    """The longest of these times in a single step."""
    stage_rank: dict[str, int]
    """The rank that took so long; `hosts.jsonl` names its node."""
    domain_loss: list[float | None]
    domain_tokens: list[int]
    domain_sequences: list[int]
    scalar_NAME: list[float | None]
    """Mean of a scalar of `dataplane.scalars` over the sequences of each domain."""
    scalar_NAME_out_of_range: int
    """Values of it that were beyond the declared scale, or not finite; excluded from the mean."""


class HostsEvent(TypedDict, total=False):
    """`hosts.jsonl`: one line at the start of an attempt, written by the data plane."""

    step: int
    """First step of this attempt."""
    hosts: list[tuple[str, int]]
    """Names of nodes, each with the number of consecutive ranks on it."""


class MixtureEvent(TypedDict, total=False):
    """`mixture.jsonl`: one line per chunk, written by the data plane."""

    step: int
    """First step of the chunk."""
    chunk: int
    domains: list[str]
    """Names of the K domains."""
    weights: list[float]
    """Requested weights of the chunk."""
    served: list[float]
    """Share of each domain in all sequences served before the chunk."""
    cursors: list[int]
    """Sequences served from each domain's stream before the chunk."""
    epochs: list[float]
    """Epochs of each domain served before the chunk; 1.25 is one and a quarter."""
    hears_losses: bool
    """True if losses were recorded in the last `dataplane.feedback_lag` + 2 chunks; only if the mixture learns."""
    num_failed_updates: int
    """Updates of the mixing algorithm that raised an exception so far; only if there are any. The weights before them
    stay in force."""
    problem: str
    """The newest of these exceptions."""
    num_nonfinite: list[int]
    """Learned values of the mixing algorithm. An array is recorded only in the events in which it differs from the one
    recorded before, with 6 digits; null for domains of weight 0. This one: sequences whose loss was not finite."""
    credit: list[float]
    """ADO: moving average of the served shares."""
    speed: list[float]
    """ADO: speed at which the loss falls, in nats per sequence of any domain."""
    epsilon: list[float]
    """ADO: the laws are loss = epsilon + beta · n^-alpha, n in sequences of all domains. Irreducible loss, nats."""
    beta: list[float]
    """ADO: reducible loss at n = 1."""
    alpha: list[float]
    """ADO: exponents. With `variant: default` they lie halfway between the best fit and the mean of all exponents that
    fit the losses, and `epsilon`, `beta` and `speed` belong to these exponents."""
    best_beta: list[float]
    """ADO with `variant: default`: beta of the best fit."""
    best_alpha: list[float]
    """ADO with `variant: default`: alpha of the best fit."""
    residual: list[float]
    """ADO: root mean square of log(fitted loss) - log(observed loss) of the best fit."""
    law_status: list[int]
    """ADO: 0 no law yet, 1 fitted in the last refit, 2 older."""
    law_bounds: list[int]
    """ADO: bounds that the best fit (`best_beta`, `best_alpha`) lies on, as a sum: 1 and 2 beta, 4 and 8 alpha (lower,
    upper). Above 0 the losses do not determine the law."""
    reward: list[float]
    """ODM: decayed mean reward."""
    score: list[float]
    """Exponentiated gradient: excess loss, nats."""
    average_weight: list[float]
    """Exponentiated gradient: mean of all weights so far, which DoReMi gives to the next run."""
    reference_loss: list[float]
    """Exponentiated gradient: losses of the reference."""
    last_loss: list[float]
    """Loss-proportional, Aioli: newest loss."""
    summed_loss: list[float]
    """Skill-It: losses of the last evaluations."""
    influence: list[float]
    """Aioli: amount by which each domain lowered the losses of all domains in the last round."""
    base_weight: list[float]
    """Aioli: the mixture outside its bursts."""


class CommEvent(TypedDict, total=False):
    """`comm.jsonl`: the time that communication takes on rank 0, written by the data plane.

    One line per chunk with `plan_s` and `broadcast_s`; with several ranks, one per step with `reduce_s`.
    """

    step: int
    plan_s: float
    broadcast_s: float
    """From the start of the broadcast to its completion. Training continues meanwhile."""
    reduce_s: float
    """Time that training waited for the reduction of the step's losses; 0 if it was complete before it was needed."""


class DataEndEvent(TypedDict, total=False):
    """`data_end.jsonl`: one line when the end of the data is planned, written by the data plane."""

    step: int
    """Number of steps that the data has."""
    unit: str
    """`tokens` or `samples`."""
    last_batch: str
    """`dataplane.last_batch`."""
    left_over: int
    """Sequences (or samples) that do not fill the last global batch: served with padding, or not at all."""
    left_over_tokens: int
    """Tokens of the domains that end, which do not fill a sequence and are not served."""


class ValidationEvent(TypedDict, total=False):
    """`validation.jsonl`: one line every `training.validate_every` steps, and one at the end."""

    step: int
    """Number of steps taken before the validation."""
    loss: float | None
    """Mean loss in natural proportions of the domains, in nats."""
    domain_loss: list[float | None]
    domain_tokens: list[int]
    num_nonfinite: int
