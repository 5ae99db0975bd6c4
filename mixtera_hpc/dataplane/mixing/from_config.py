"""From `mixture` in a configuration to what decides the weights of every chunk.

`make_mixer` is all there is to a mixture: a change of mind in a running job makes another one over the same `MixtureContext`, and a
schedule makes one per stage.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.domain_tree import DomainSizes, domain_bounds, domain_entries, initial_weights
from mixtera_hpc.config.schema import MixtureConfig, StageConfig
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.mixing.weights import check_available
from mixtera_hpc.dataplane.mixing.mixers import (
    BoundedMixer,
    DynamicMixer,
    FixedMixer,
    Mixer,
    MixerStage,
    ScheduledMixer,
)
from mixtera_hpc.errors import MixtureError

__all__ = ["MAX_EPOCHS_DEFAULT", "ChunkTimeline", "MixtureContext", "make_mixer", "max_epochs_per_domain"]

Weights = NDArray[np.float64]

MAX_EPOCHS_DEFAULT = {"repeat": None, "redistribute": 1.0, "stop": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimeline:
    """Where the chunks of a mixture lie: of a run's first one, or of one that took its place at a later chunk."""

    chunk_steps: int
    items_per_step: int
    """Predicted tokens, or samples, of a global batch."""
    step: int = 0
    """The first step of its chunk 0."""
    items: int = 0
    """Items served before that; see `Era.items`."""

    def step_of(self, chunk: int) -> int:
        """The first step of `chunk`."""
        return self.step + chunk * self.chunk_steps

    def items_before(self, chunk: int) -> int:
        """Items served before `chunk`."""
        return self.items + chunk * self.chunk_steps * self.items_per_step


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureContext:
    """What of a run its mixtures depend on; the same whatever mixture is served."""

    domain_sizes: DomainSizes
    names: tuple[str, ...]
    """Of the domains."""
    has_samples: NDArray[np.bool_]
    """Which of them have samples left, after what was dropped; shape (K,)."""
    timeline: ChunkTimeline
    feedback_lag: int
    """In chunks."""


def make_mixer(mixture: MixtureConfig, ground: MixtureContext, *, learn: bool = True) -> Mixer:
    """What decides the weights of every chunk.

    Args:
        mixture: its domains are among those of `mixture_context`; the others get weight 0.
        learn: False leaves dynamic mixtures at the weights they begin with, to look ahead.

    Raises:
        MixtureError: it names a domain that is not the run's, wishes for one without samples or for dropped ones only, or its
            floors and caps leave no mixture at all.
    """
    scheduled = mixture.kind == "schedule"
    mixer = _scheduled(mixture, ground, learn) if scheduled else _plain(mixture, mixture, ground, learn)
    _check_left(mixture, ground)
    limits = domain_bounds(mixture, ground.domain_sizes)
    return mixer if limits is None else BoundedMixer(mixer, *limits)


def max_epochs_per_domain(mixture: MixtureConfig, num_domains: int) -> Weights:
    """Passes over each domain before it is exhausted, `inf` for endless; shape (K,)."""
    default = MAX_EPOCHS_DEFAULT[mixture.on_exhausted] if mixture.max_epochs is None else mixture.max_epochs
    own = [leaf.domain.max_epochs for leaf in domain_entries(mixture)] or [None] * num_domains
    return np.array([np.inf if e is None else e for e in (default if e is None else e for e in own)], np.float64)


def _scheduled(mixture: MixtureConfig, ground: MixtureContext, learn: bool) -> Mixer:
    schedule = mixture.schedule
    stages = [MixerStage(start=s.start, mixer=_plain(s, mixture, ground, learn)) for s in schedule.stages]
    timeline = ground.timeline
    return ScheduledMixer(
        stages, schedule.shape, timeline.step_of if schedule.unit == "steps" else timeline.items_before
    )


def _plain(stage: StageConfig | MixtureConfig, mixture: MixtureConfig, ground: MixtureContext, learn: bool) -> Mixer:
    """The mixer of a mixture that is no schedule, or of one stage."""
    weights = initial_weights(stage, mixture, ground.domain_sizes)
    check_available(weights, ground.domain_sizes.sizes, ground.names)
    if stage.kind != "dynamic" or not learn:
        return FixedMixer(weights)
    parameters = dict(stage.algorithm)
    algorithm = make_algorithm(str(parameters.pop("name", "ado")), parameters)
    return DynamicMixer(algorithm, weights, ground.timeline.chunk_steps, ground.feedback_lag)


def _check_left(mixture: MixtureConfig, ground: MixtureContext) -> None:
    """Refuse a mixture of dropped domains only; where some are left, theirs are the shares of the others.

    Stages of a schedule count together: those of dropped domains may be over.
    """
    parts = mixture.schedule.stages if mixture.kind == "schedule" else [mixture]
    wished = np.sum([initial_weights(part, mixture, ground.domain_sizes) for part in parts], axis=0) > 0
    if not (wished & ground.has_samples).any():
        names = [name for name, is_wished in zip(ground.names, wished, strict=True) if is_wished]
        raise MixtureError(
            f"All that the mixture serves has been dropped: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}.\n"
            "  Give a domain that has samples left a weight, or drop less."
        )
