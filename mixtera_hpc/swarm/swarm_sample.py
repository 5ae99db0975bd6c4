"""Sample a swarm for a configuration: open the data, find the bounds, and write the mixtures of its proxies."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.mixture.domain_tree import domain_fractions
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.mixing.configured_weights import config_bounds, max_epochs_per_domain
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.errors import ConfigError, DataError, MixtureError, pluralize
from mixtera_hpc.launch.prepare import with_absolute_paths
from mixtera_hpc.swarm.mixture_file import mixture_text, without_fractions, written_weights
from mixtera_hpc.swarm.mixture_space import MixtureSpace, epoch_caps
from mixtera_hpc.swarm.sampling import default_num_proxies, sample_mixtures, tempered
from mixtera_hpc.swarm.swarm_folder import SwarmFolder, SwarmRecord
from mixtera_hpc.swarm.swarm_reuse import EarlierSwarm
from mixtera_hpc.swarm.tables import SwarmTable, table_text
from mixtera_hpc.swarm.training_phases import TrainingPhases

__all__ = ["sample_swarm"]

FIXED_KINDS = ("natural", "static", "hierarchical")
"""Kinds of mixtures that a swarm can be sampled around."""

NOT_IDENTITY = ("swarm", "job", "cluster", "environment", "sweep", "run", "plan", "track")
"""Groups that change no loss of a proxy. The settings of `swarm` count by the mixtures and bounds that they give."""


def sample_swarm(
    folder: SwarmFolder, config: Config, overrides: Sequence[str], earlier: EarlierSwarm | None = None
) -> SwarmRecord:
    """Sample the mixtures of all proxies and write them; proxies that exist stay as they are.

    Args:
        folder: where the swarm is written.
        config: the configuration of the proxies. Its mixture gives domains, prior and bounds.
        overrides: the overrides as typed.
        earlier: an earlier swarm over some of the domains, whose proposal keeps its ratios.

    Raises:
        ConfigError: the configuration measures no held-out losses, or its mixture changes during a run.
        MixtureError: no mixture lies within the bounds.
        DataError: the folder has another swarm.
    """
    _check_measurable(config)
    config = with_absolute_paths(replace(config, run=replace(config.run, name=folder.name, id=None)))
    if config.dataplane.lanes is None and folder.record.exists():
        # Added proxies have the number of lanes of the earlier ones.
        lanes = folder.read().config.dataplane.lanes
        config = replace(config, dataplane=replace(config.dataplane, lanes=lanes))
    source = open_source(config, Local())
    # A query may leave some values of `mixture.group_by` without samples.
    present = np.flatnonzero(source.mixture_context.domain_sizes.sizes > 0)
    whole = _whole_sizes(source)
    space = _space(source, present, whole)
    if earlier is not None:
        space = earlier.grouped(space)
    record = _sampled(source, present, whole, space, overrides)
    _check_same_domains(record, source.mixture_context.domain_sizes.sizes[present])
    _check_extends(folder, record)
    _write(folder, record, earlier)
    return record


def _sampled(
    source: Source,
    present: NDArray[np.int64],
    whole: NDArray[np.int64],
    space: MixtureSpace,
    overrides: Sequence[str],
) -> SwarmRecord:
    """Return the record of a swarm over the domains `present`, with its sampled mixtures."""
    config = source.config
    domains = source.mixture_context.domain_sizes
    num = config.swarm.num_proxies
    if num is None:
        num = default_num_proxies(space)
    return SwarmRecord(
        config=config,
        overrides=tuple(overrides),
        names=space.names,
        keys=tuple(domains.keys[domain] for domain in present),
        sizes=whole[present],
        prior=space.prior,
        low=space.low,
        high=space.high,
        basis=space.basis,
        phases=space.phases,
        limit=space.limit,
        starts=np.array(TrainingPhases.of(config).starts),
        mixtures=written_weights(sample_mixtures(space, num, config.swarm), space.num_phases),
    )


def _check_measurable(config: Config) -> None:
    """Refuse a configuration whose proxies would have no held-out loss, or no fixed mixture."""
    if config.mixture.kind not in FIXED_KINDS:
        raise ConfigError(
            f"mixture.kind is {config.mixture.kind}, but a swarm needs a mixture that is the same during a whole run: "
            f"{', '.join(FIXED_KINDS)}.\n  Set mixture=natural and mixture.group_by=[PROPERTY], or mixture.domains."
        )
    if not config.training.validate_every and not config.job.command and config.swarm.num_proxies != 0:
        raise ConfigError(
            "A swarm compares proxies by their held-out losses, but training.validate_every is 0.\n"
            "  Set query.holdout.fraction, e.g. to 0.05, and training.validate_every to training.num_steps."
        )


def _space(source: Source, present: NDArray[np.int64], whole: NDArray[np.int64]) -> MixtureSpace:
    """Return the mixtures of the domains `present` that are allowed in the proxies and in the final run."""
    if len(present) < 2:
        raise MixtureError(
            f"The mixture has {pluralize(len(present), 'domain')} with samples, and a swarm compares at least two.\n"
            "  Set mixture.domains, or mixture.group_by=[PROPERTY]."
        )
    config = source.config
    domains = source.mixture_context.domain_sizes
    num_domains = len(domains.sizes)
    bounds = config_bounds(config.mixture, domains)
    if bounds is None:
        bounds = (np.zeros(num_domains), np.ones(num_domains))
    low, high = bounds

    limits = max_epochs_per_domain(config.mixture, num_domains)
    # A proxy must not end before its last step because a domain lacks a part of a sequence.
    spare = 2 * source.grid.length
    most = epoch_caps(domains.sizes, limits, domains.budget, spare)
    if config.swarm.target_tokens is not None:
        most = np.minimum(most, epoch_caps(whole, limits, config.swarm.target_tokens))
    prior = tempered(np.array(source.weights), config.swarm.temperature)
    return MixtureSpace.of_domains(
        tuple(source.names[domain] for domain in present),
        prior[present],
        low[present],
        high[present],
        limit=most[present],
        phases=TrainingPhases.of(config).shares,
    )


def _whole_sizes(source: Source) -> NDArray[np.int64]:
    """Return the items that the domains have without `mixture.fraction`; shape (K,)."""
    config = source.config
    domains = source.mixture_context.domain_sizes
    if domain_fractions(config.mixture, len(domains.sizes)) is None:
        return domains.sizes
    whole = open_source(replace(config, mixture=without_fractions(config.mixture)), Local())
    return whole.mixture_context.domain_sizes.sizes


def _check_same_domains(record: SwarmRecord, sizes: NDArray[np.int64]) -> None:
    """Refuse domains whose samples change when their keys are written out, as the mixtures of proxies have them."""
    if not len(record.mixtures):
        return
    mixture = record.mixture_of(record.mixtures[0])
    source = open_source(replace(record.config, mixture=mixture), Local())
    written = source.mixture_context.domain_sizes.sizes
    if len(written) != len(sizes) or (written != sizes).any():
        different = [n for n, a, b in zip(record.names, sizes, written, strict=False) if a != b]
        raise MixtureError(
            f"{', '.join(different[:5]) or 'A domain'} has other samples if its key is written out, because samples "
            "have several values of a property.\n  Write the domains in mixture.domains instead of mixture.group_by."
        )


def _check_extends(folder: SwarmFolder, record: SwarmRecord) -> None:
    """Refuse a folder with another swarm; one with fewer or more proxies is the same swarm."""
    if not folder.record.exists():
        return
    before = folder.read()
    known = min(len(before.mixtures), len(record.mixtures))
    same = _identity(before) == _identity(record) and np.array_equal(before.mixtures[:known], record.mixtures[:known])
    if not same:
        raise DataError(
            f"{folder.path} has a swarm with another configuration, and only swarm.num_proxies can be changed.\n"
            "  Give another folder, or remove this one."
        )


def _identity(record: SwarmRecord) -> dict[str, object]:
    """Return the values that must not change when proxies are added."""
    plain = record.to_plain()
    config = dict(plain["config"])
    for group in NOT_IDENTITY:
        config.pop(group)
    return {**{k: v for k, v in plain.items() if k not in ("mixtures", "overrides")}, "config": config}


def _write(folder: SwarmFolder, record: SwarmRecord, earlier: EarlierSwarm | None) -> None:
    runs = folder.proxy_names(len(record.mixtures))
    for run, weights in zip(runs, record.mixtures, strict=True):
        text = mixture_text(record.mixture_of(weights), f"Proxy {run} of a swarm.")
        folder.write(folder.mixture_file(run), text)
    table = SwarmTable(runs=tuple(runs), columns=record.columns, values=record.mixtures)
    folder.write(folder.ratios, table_text(table))
    if earlier is not None:
        folder.write(folder.earlier_ratios, table_text(earlier.ratios))
        folder.write(folder.earlier_metrics, table_text(earlier.metrics))
    folder.write_json(folder.record, record.to_plain())  # This file makes the folder a swarm, so it comes last.
