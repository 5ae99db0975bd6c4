"""Build the object that decides the weights of every chunk from the `mixture` of a configuration.

`make_mixer` builds that object for a run, for one stage of a schedule, and for a mixture that is requested during the
run: always from a `MixtureConfig` and the `MixtureContext` of the run. The weights and bounds come from
`configured_weights`.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.schema import MixtureConfig, StageConfig
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.mixing.named_parameters import FROM_RUN, resolve_named
from mixtera_hpc.core.mixing.weights import check_available
from mixtera_hpc.dataplane.mixing.configured_weights import config_bounds, config_weights
from mixtera_hpc.dataplane.mixing.context import MixtureContext
from mixtera_hpc.dataplane.mixing.dynamic_mixer import DynamicMixer, ReadLosses
from mixtera_hpc.dataplane.mixing.mixers import BoundedMixer, FixedMixer, Mixer, MixerStage, ScheduledMixer
from mixtera_hpc.dataplane.mixing.reference_runs import load_named_values
from mixtera_hpc.errors import MixtureError, list_names

__all__ = ["make_mixer"]

Weights = NDArray[np.float64]

MAX_NAMES = 5
"""Domain names listed in a message."""


def make_mixer(mixture: MixtureConfig, context: MixtureContext, *, learn: bool = True) -> Mixer:
    """Build the object that decides the weights of every chunk.

    Args:
        mixture: its domains are among those of `context`; all other domains get weight 0.
        learn: False keeps dynamic mixtures at their initial weights, for a forecast or on a rank that decides nothing.

    Raises:
        MixtureError: the mixture names a domain that the run does not have, requests a domain without samples, requests
            dropped domains only, or its floors and caps leave no mixture.
    """
    builder = _MixerBuilder(mixture=mixture, context=context, learn=learn)
    builder.check_not_all_dropped()
    if mixture.kind != "schedule":
        return builder.bounded_mixer(mixture)
    stages = mixture.schedule.stages
    if any(stage.kind == "dynamic" for stage in stages):
        # A stage that learns has bounds of its own: its domains of weight 0 stay at 0.
        return builder.scheduled_mixer([builder.bounded_mixer(stage) for stage in stages])
    mixer = builder.scheduled_mixer([builder.mixer(stage) for stage in stages])
    # Bounds hold for every stage of a schedule, so they go around all of it.
    bounds = config_bounds(mixture, context.domain_sizes)
    return mixer if bounds is None else BoundedMixer(mixer, *bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _MixerBuilder:
    """Build the mixers of the parts of one mixture; a part is the mixture itself, or a stage of its schedule."""

    mixture: MixtureConfig
    context: MixtureContext
    learn: bool

    def check_not_all_dropped(self) -> None:
        """Refuse a mixture of dropped domains only. If some domains remain, they take the shares of the others.

        The stages of a schedule count together: a stage of dropped domains may already have ended.
        """
        # Shares are computed over all samples, dropped ones included, so a drop alone does not change them.
        parts = self.mixture.schedule.stages if self.mixture.kind == "schedule" else [self.mixture]
        requested = np.sum([self.weights(part) for part in parts], axis=0) > 0
        if (requested & self.context.has_samples).any():
            return
        names = [name for name, is_requested in zip(self.context.names, requested, strict=True) if is_requested]
        raise MixtureError(
            f"All domains of the mixture have been dropped: {list_names(names, MAX_NAMES)}.\n"
            "  Give a domain that still has samples a weight, or drop less."
        )

    def weights(self, part: MixtureConfig | StageConfig) -> Weights:
        """Return the initial weights of a part; shape (K,), sum 1."""
        return config_weights(part, self.mixture, self.context.domain_sizes)

    def mixer(self, part: MixtureConfig | StageConfig) -> Mixer:
        """Build the mixer of a part that is not a schedule."""
        weights = self.weights(part)
        check_available(weights, self.context.domain_sizes.sizes, self.context.names)
        if part.kind != "dynamic" or not self.learn:
            return FixedMixer(weights)
        return self._dynamic_mixer(part, weights)

    def bounded_mixer(self, part: MixtureConfig | StageConfig) -> Mixer:
        """Build the mixer of a part that is not a schedule, within its bounds."""
        mixer = self.mixer(part)
        bounds = config_bounds(self.mixture, self.context.domain_sizes)
        if bounds is None:
            return mixer
        floor, cap = bounds
        if part.kind == "dynamic":
            # Weight 0 is 0: neither a floor nor what other domains leave may raise it.
            is_mixed = self.weights(part) > 0
            floor = np.where(is_mixed, floor, 0.0)
            cap = np.where(is_mixed, cap, 0.0)
            _check_room(cap)
        return BoundedMixer(mixer, floor, cap)

    def scheduled_mixer(self, mixers: Sequence[Mixer]) -> Mixer:
        """Build the schedule over the mixers of all stages."""
        schedule = self.mixture.schedule
        stages = [
            MixerStage(start=stage.start, mixer=mixer) for stage, mixer in zip(schedule.stages, mixers, strict=True)
        ]
        timeline = self.context.timeline
        # Starts in tokens count predicted tokens, which `items_before` counts too.
        position_of = timeline.step_of if schedule.unit == "steps" else timeline.items_before
        return ScheduledMixer(stages, schedule.shape, position_of)

    def _dynamic_mixer(self, part: MixtureConfig | StageConfig, weights: Weights) -> Mixer:
        """Build a mixer whose algorithm learns from `weights` on."""
        parameters = dict(part.algorithm)
        name = str(parameters.pop("name", "ado"))
        mixed = np.flatnonzero(weights > 0).tolist()
        resolved = resolve_named(parameters, self.context.names, mixed, load_named_values)
        read_losses = None
        if FROM_RUN in parameters or isinstance(parameters.get("reference_losses"), str):
            read_losses = ReadLosses(
                values=resolved["reference_losses"],
                algorithm_with=lambda losses: make_algorithm(name, {**resolved, "reference_losses": losses}),
            )
        graph_digest = None
        if isinstance(parameters.get("graph"), str):
            graph_digest = zlib.crc32(repr(resolved["graph"]).encode())
        return DynamicMixer(
            make_algorithm(name, resolved),
            weights,
            self.context.timeline.chunk_steps,
            self.context.feedback_lag,
            read_losses,
            graph_digest,
        )


def _check_room(cap: Weights) -> None:
    """Refuse caps that leave a part of a learned mixture unassigned, because the other domains have weight 0."""
    if cap.sum() < 1 - 1e-9:
        raise MixtureError(
            f"The caps of the domains with a weight sum to {cap.sum():.6g}, and the other domains have weight 0. Raise "
            "mixture.cap, or give more domains a weight."
        )
