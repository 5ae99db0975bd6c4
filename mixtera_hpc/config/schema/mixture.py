"""Settings of the group `mixture`: the domains and the proportions in which they are served."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DomainConfig", "MixtureConfig", "ScheduleConfig", "StageConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainConfig:
    """One domain of the mixture, or a group of domains."""

    key: dict[str, Any] = field(default_factory=dict)
    """Property → value, pattern (`c4*`, or `{matches: c4-.*-v[12]}`), range of a number (`{min: 0.3, below: 0.7}`, or
    `max` for an end that belongs to it), null, or a list of these. A sample belongs to the first domain, in written
    order, whose key it matches. The members of a group must match the key of the group as well."""
    weight: float | None = None
    """Share of the mixture; for a member of a group, share of the group. At least 0. Siblings without weights share in
    proportion to their sizes."""
    floor: float | None = None
    """Smallest share of the mixture, between 0 and 1. Null means `mixture.floor`."""
    cap: float | None = None
    """Largest share of the mixture, between 0 and 1. Null means `mixture.cap`."""
    max_epochs: float | None = None
    """Passes over this domain before it is exhausted. Null means `mixture.max_epochs`."""
    fraction: float | None = None
    """Share of the training samples of this domain that the run uses, above 0 and at most 1. Null means
    `mixture.fraction`."""
    loss_weight: float | None = None
    """Factor on the loss of this domain, apart from how often it is served: batches carry it as `loss_weights`, and the
    reference trainer multiplies the loss with it. Null means 1. At least 0."""
    domains: list["DomainConfig"] = field(default_factory=list)
    """The members of a group, for `mixture.kind=hierarchical`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One mixture of a schedule."""

    start: float
    """Start of the stage, in `mixture.schedule.unit`. The first stage begins at 0."""
    kind: Literal["natural", "static", "hierarchical", "dynamic"] = "static"
    """Like `mixture.kind`. A dynamic stage uses the losses of all steps since the first step of the run."""
    domains: list[DomainConfig] = field(default_factory=list)
    """Keys and weights. Domains of the mixture that are not listed get weight 0. An empty list takes
    `mixture.domains`."""
    remainder: DomainConfig | None = None
    """Like `mixture.remainder`; needs `domains`."""
    normalize: bool = False
    """Like `mixture.normalize`."""
    temperature: float | None = None
    """Like `mixture.temperature`."""
    unimax_epochs: float | None = None
    """Like `mixture.unimax_epochs`."""
    algorithm: dict[str, Any] = field(default_factory=lambda: {"name": "ado"})
    """Like `mixture.algorithm`."""

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Accept the name of an algorithm for a mapping with its `name`."""
        return _with_algorithm_name(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Mixtures that follow each other. A chunk uses the weights that apply at its first step."""

    unit: Literal["steps", "tokens"] = "steps"
    """Unit of `start` of a stage: optimizer steps, or predicted tokens of all ranks together."""
    shape: Literal["stepwise", "linear", "cosine"] = "stepwise"
    """Transition of weights from one stage to the next: at once when it starts, or gradually between the two starts."""
    stages: list[StageConfig] = field(default_factory=list)
    """The stages, in the order of `start`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureConfig:
    """The domains and the proportions in which they are served."""

    kind: Literal["natural", "static", "hierarchical", "schedule", "arbitrary", "dynamic"] = "natural"
    """`natural`: domain sizes in the index. `static`: fixed weights. `hierarchical`: weights of groups and of their
    members. `schedule`: mixtures that follow each other. `arbitrary`: index order, without domains. `dynamic`: weights
    that an algorithm learns during training (docs/mixtures.md)."""
    unit: Literal["tokens", "samples"] = "tokens"
    """Unit of weights and batches: packed sequences of tokens, or samples."""
    domains: list[DomainConfig] = field(default_factory=list)
    """The domains. An empty list makes one domain for each distinct value of `mixture.group_by`, or a single domain of
    all samples."""
    group_by: list[Any] = field(default_factory=list)
    """Properties whose distinct values (combinations of values, for several properties) become the domains. Used when
    `mixture.domains` is empty. A number has buckets: `{quality: {buckets: [0, 0.3, 0.7, 1]}}` for [0, 0.3), [0.3, 0.7)
    and [0.7, 1]."""
    remainder: DomainConfig | None = None
    """One more domain, the last one, of all samples that match no key in `mixture.domains`, for example `{weight:
    0.1}`. Beside buckets in `mixture.group_by`, `{}` makes it of the samples that are in no bucket."""
    normalize: bool = False
    """Scale weights that do not sum to 1, instead of refusing them."""
    temperature: float | None = None
    """Natural weights become size^(1/temperature). 1 keeps them; larger values make the domains more equal. Above 0."""
    unimax_epochs: float | None = None
    """Natural weights become as equal as possible with at most this many passes over each domain within
    `training.num_steps` (UniMax). Above 0."""
    floor: float | None = None
    """Smallest share of every domain, between 0 and 1, for every kind of mixture. Null means no lower bound."""
    cap: float | None = None
    """Largest share of every domain, between 0 and 1, for every kind of mixture. Null means no upper bound."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The stages of `mixture.kind=schedule`."""
    on_exhausted: Literal["repeat", "redistribute", "stop"] = "repeat"
    """Action when a domain was served `max_epochs` times. `repeat` and `stop`: the data end. `redistribute`: its
    share goes to the other domains in proportion to their weights."""
    max_epochs: float | None = None
    """Passes over a domain before it is exhausted. Null: unlimited for `repeat`, 1 for `redistribute` and `stop`. Above
    0."""
    fraction: float = 1.0
    """Share of the training samples of every domain that the run uses, above 0 and at most 1: a run with a tenth of the
    budget and a tenth of the samples repeats its data as often as the full run. A hash of each sample decides, with
    `query.holdout.seed`; a larger share keeps the samples of a smaller one, and held-out samples stay the same."""
    algorithm: dict[str, Any] = field(default_factory=lambda: {"name": "ado"})
    """The mixing algorithm of `mixture.kind=dynamic`: its `name` and its parameters, for example
    `{name: ado, warmup: 200}`, or only its name. The import path of a class, such as `my_package.MyAlgorithm`, is a
    name too (docs/mixtures.md)."""

    @classmethod
    def complete(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Accept the name of an algorithm for a mapping with its `name`."""
        return _with_algorithm_name(data)


def _with_algorithm_name(data: Mapping[str, Any]) -> Mapping[str, Any]:
    name = data.get("algorithm")
    return {**data, "algorithm": {"name": name}} if isinstance(name, str) else data
