"""Build the object that decides the weights of every chunk from the `mixture` of a configuration.

`make_mixer` builds that object for a run, for one stage of a schedule, and for a mixture that is requested during the
run: always from a `MixtureConfig` and the `MixtureContext` of the run. The weights, bounds and schedules
themselves are computed in `core.mixing`.
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.config.batch_ramp import batch_schedule_of
from mixtera_hpc.config.mixture.domain_tree import display_name, domain_entries
from mixtera_hpc.config.schema import Config, DomainConfig, MixtureConfig, StageConfig
from mixtera_hpc.core.domain_keys import DomainKey, KeyValue, canonical_key, parse_domain_key
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.mixing.bounds import domain_bounds, project_to_bounds
from mixtera_hpc.core.mixing.named_parameters import FROM_RUN, resolve_named
from mixtera_hpc.core.mixing.weights import WeightNode, WeightRule, check_available, initial_weights
from mixtera_hpc.core.sequence_grid import SequenceGrid
from mixtera_hpc.dataplane.mixing.context import DomainSizes, MixtureContext
from mixtera_hpc.dataplane.mixing.dynamic_mixer import DynamicMixer, ReadLosses
from mixtera_hpc.dataplane.mixing.mixers import BoundedMixer, FixedMixer, Mixer, MixerStage, ScheduledMixer
from mixtera_hpc.dataplane.mixing.reference_runs import load_named_values
from mixtera_hpc.errors import MixtureError, did_you_mean

__all__ = [
    "config_bounds",
    "config_weights",
    "make_mixer",
    "max_epochs_per_domain",
    "query_weights",
]

Weights = NDArray[np.float64]
DomainIds = Mapping[frozenset[tuple[str, frozenset[KeyValue]]], int]
"""Canonical key of a domain → its domain_id."""

DEFAULT_MAX_EPOCHS = {"repeat": None, "redistribute": 1.0, "stop": 1.0}
"""`mixture.on_exhausted` → passes over a domain when `mixture.max_epochs` is null; None is endless."""

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
    _check_not_all_dropped(mixture, context)
    if mixture.kind != "schedule":
        return _bounded_mixer(mixture, mixture, context, learn)
    stages = mixture.schedule.stages
    if any(stage.kind == "dynamic" for stage in stages):
        # A stage that learns has bounds of its own: its domains of weight 0 stay at 0.
        return _scheduled_mixer(mixture, context, [_bounded_mixer(s, mixture, context, learn) for s in stages])
    mixer = _scheduled_mixer(mixture, context, [_single_mixer(s, mixture, context, learn) for s in stages])
    # Bounds hold for every stage of a schedule, so they go around all of it.
    bounds = config_bounds(mixture, context.domain_sizes)
    return mixer if bounds is None else BoundedMixer(mixer, *bounds)


def config_weights(part: MixtureConfig | StageConfig, mixture: MixtureConfig, domains: DomainSizes) -> Weights:
    """Return the initial weights of `mixture`, or of one stage of its schedule; shape (K,), sum 1.

    Args:
        part: `mixture` itself, or a stage of its schedule. A schedule begins with the weights of its first stage.

    Raises:
        MixtureError: the mixture names a domain that the run does not have, or natural shares are requested and there
            is no data.
    """
    if part is mixture and mixture.kind == "schedule":
        return config_weights(mixture.schedule.stages[0], mixture, domains)
    return initial_weights(_weight_rule(part, mixture, domains.keys), domains.sizes, domains.budget)


def config_bounds(mixture: MixtureConfig, domains: DomainSizes) -> tuple[Weights, Weights] | None:
    """Return floor and cap of every domain, shape (K,) each; None if the mixture has no bounds.

    Raises:
        MixtureError: see `core.mixing.bounds.domain_bounds`.
    """
    # Two spellings of one key, such as a value and a list of it, are the same domain.
    by_key = {canonical_key(entry.key): entry.domain for entry in domain_entries(mixture)}
    configs = [by_key.get(canonical_key(key), DomainConfig()) for key in domains.keys]
    return domain_bounds(
        [domain.floor for domain in configs],
        [domain.cap for domain in configs],
        default_floor=mixture.floor,
        default_cap=mixture.cap,
        sizes=domains.sizes,
        names=[display_name(key) for key in domains.keys],
    )


def query_weights(
    config: Config, keys: tuple[DomainKey, ...], *, rows: NDArray[np.int64], tokens: NDArray[np.int64] | None
) -> Weights | None:
    """Return the initial weights of selected domains, to show them before a run; shape (K,). None if they are unknown.

    They are unknown if they depend on tokens and the index has not counted any, or if nothing is selected. A run
    refuses a weight on an empty domain; this function returns it.

    Args:
        keys: keys of the domains.
        rows: samples of each domain; shape (K,).
        tokens: tokens of each domain, without special tokens, shape (K,); None if the index has not counted them.

    Raises:
        MixtureError: see `config_weights` and `config_bounds`.
    """
    plane = config.dataplane
    in_tokens = config.mixture.unit == "tokens"
    sizes = tokens if in_tokens else rows
    if sizes is None:
        sizes = np.zeros_like(rows)
    grid = SequenceGrid.of_unit(in_tokens, plane.seq_len, plane.overlap_one_token)
    budget = grid.stride * batch_schedule_of(plane).sequences_before(config.training.num_steps)
    domains = DomainSizes(keys=keys, sizes=sizes, budget=budget)
    try:
        weights = config_weights(config.mixture, config.mixture, domains)
    except MixtureError:
        if sizes.any():
            raise
        return None  # Natural shares of nothing.
    bounds = config_bounds(config.mixture, domains) if sizes.any() else None
    return weights if bounds is None else project_to_bounds(weights, *bounds)


def max_epochs_per_domain(mixture: MixtureConfig, num_domains: int) -> Weights:
    """Return the passes over each domain before it is exhausted, `inf` for endless; shape (K,)."""
    # A mixture without domains has as many as the index gives it, all with the default.
    default = DEFAULT_MAX_EPOCHS[mixture.on_exhausted] if mixture.max_epochs is None else mixture.max_epochs
    own = [entry.domain.max_epochs for entry in domain_entries(mixture)] or [None] * num_domains
    limits = [default if limit is None else limit for limit in own]
    return np.array([np.inf if limit is None else limit for limit in limits], np.float64)


def _scheduled_mixer(mixture: MixtureConfig, context: MixtureContext, mixers: Sequence[Mixer]) -> Mixer:
    """Build the schedule over the mixers of all stages."""
    schedule = mixture.schedule
    stages = [MixerStage(start=stage.start, mixer=mixer) for stage, mixer in zip(schedule.stages, mixers, strict=True)]
    timeline = context.timeline
    # Starts in tokens count predicted tokens, which `items_before` counts too.
    position_of = timeline.step_of if schedule.unit == "steps" else timeline.items_before
    return ScheduledMixer(stages, schedule.shape, position_of)


def _bounded_mixer(
    part: StageConfig | MixtureConfig, mixture: MixtureConfig, context: MixtureContext, learn: bool
) -> Mixer:
    """Build the mixer of one stage, or of a mixture that is not a schedule, within its bounds."""
    mixer = _single_mixer(part, mixture, context, learn)
    bounds = config_bounds(mixture, context.domain_sizes)
    if bounds is None:
        return mixer
    floor, cap = bounds
    if part.kind == "dynamic":
        # Weight 0 is 0: neither a floor nor what other domains leave may raise it.
        is_mixed = config_weights(part, mixture, context.domain_sizes) > 0
        floor = np.where(is_mixed, floor, 0.0)
        cap = np.where(is_mixed, cap, 0.0)
        _check_room(cap)
    return BoundedMixer(mixer, floor, cap)


def _check_room(cap: Weights) -> None:
    """Refuse caps that leave a part of a learned mixture unassigned, because the other domains have weight 0."""
    if cap.sum() < 1 - 1e-9:
        raise MixtureError(
            f"The caps of the domains with a weight sum to {cap.sum():.6g}, and the other domains have weight 0. Raise "
            "mixture.cap, or give more domains a weight."
        )


def _single_mixer(
    part: StageConfig | MixtureConfig, mixture: MixtureConfig, context: MixtureContext, learn: bool
) -> Mixer:
    """Build the mixer of one stage, or of a mixture that is not a schedule."""
    weights = config_weights(part, mixture, context.domain_sizes)
    check_available(weights, context.domain_sizes.sizes, context.names)
    if part.kind != "dynamic" or not learn:
        return FixedMixer(weights)
    parameters = dict(part.algorithm)
    name = str(parameters.pop("name", "ado"))
    mixed = np.flatnonzero(weights > 0).tolist()
    resolved = resolve_named(parameters, context.names, mixed, load_named_values)
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
        context.timeline.chunk_steps,
        context.feedback_lag,
        read_losses,
        graph_digest,
    )


def _check_not_all_dropped(mixture: MixtureConfig, context: MixtureContext) -> None:
    """Refuse a mixture of dropped domains only. If some domains remain, they take the shares of the others.

    The stages of a schedule count together: a stage of dropped domains may already have ended.
    """
    # Shares are computed over all samples, dropped ones included, so a drop alone does not change them.
    parts = mixture.schedule.stages if mixture.kind == "schedule" else [mixture]
    requested = np.sum([config_weights(part, mixture, context.domain_sizes) for part in parts], axis=0) > 0
    if (requested & context.has_samples).any():
        return
    names = [name for name, is_requested in zip(context.names, requested, strict=True) if is_requested]
    more = ", …" if len(names) > MAX_NAMES else ""
    raise MixtureError(
        f"All domains of the mixture have been dropped: {', '.join(names[:MAX_NAMES])}{more}.\n"
        "  Give a domain that still has samples a weight, or drop less."
    )


def _weight_rule(part: MixtureConfig | StageConfig, mixture: MixtureConfig, keys: Sequence[DomainKey]) -> WeightRule:
    """Return the rule for the initial weights of `part`; a stage without domains takes those of `mixture`."""
    # A remainder belongs to the list of domains that it completes.
    source = part if part.domains else mixture
    ids = {canonical_key(key): domain for domain, key in enumerate(keys)}
    names = [display_name(key) for key in keys]
    nodes = _nodes(source.domains, {}, ids, names)
    if source.domains and source.remainder is not None:
        nodes.append(_leaf(source.remainder, {}, ids, names))
    return WeightRule(
        nodes=tuple(nodes),
        natural=part.kind == "natural",
        temperature=1.0 if part.temperature is None else part.temperature,
        unimax_epochs=part.unimax_epochs,
    )


def _nodes(domains: Sequence[DomainConfig], group_key: DomainKey, ids: DomainIds, names: list[str]) -> list[WeightNode]:
    """Return the nodes of a list of domains and groups."""
    nodes = []
    for domain in domains:
        key = {**group_key, **parse_domain_key(domain.key)}
        if domain.domains:
            members = tuple(_nodes(domain.domains, key, ids, names))
            nodes.append(WeightNode(weight=domain.weight, members=members))
        else:
            nodes.append(_leaf(domain, key, ids, names))
    return nodes


def _leaf(domain: DomainConfig, key: DomainKey, ids: DomainIds, names: list[str]) -> WeightNode:
    """Return the node of one domain; refuse a domain that the run does not have."""
    if canonical_key(key) not in ids:
        name = display_name(key)
        raise MixtureError(
            f"{name} is not a domain of this run. Weights can change in an existing run, domains cannot."
            f"{did_you_mean(name, names)}"
        )
    return WeightNode(weight=domain.weight, domain=ids[canonical_key(key)])
