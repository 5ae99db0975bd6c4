"""Open the data of a run as an attempt had it: index generation, lanes, drops, seed and sizes of an identity."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.files.journal_start import read_first_identity
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import BatchStageConfig, Config
from mixtera_hpc.core.holdout import Split
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.sample_subset import SampleSubset

__all__ = ["config_for_identity", "data_of_run", "pin_to_run", "subset_for_identity", "with_sizes_of_identity"]


def data_of_run(folder: RunFolder, split: Split = "train") -> tuple[Config, SampleSubset]:
    """Return the recorded configuration of a run, see `pin_to_run`, and the samples that it still serves."""
    config = pin_to_run(load_config(folder.config), folder.journal)
    return config, subset_of_run(folder, split)


def pin_to_run(config: Config, journal: Path) -> Config:
    """Return `config` with the generations of its indexes and the number of lanes that the run began with.

    An index may have been refreshed since, and the default number of lanes may be another one. What the user set stays.
    Price: one line of the journal.
    """
    identity = read_first_identity(journal)
    if not config.index.generations:
        config = _at_generations(config, identity.index)
    if config.dataplane.lanes is None:
        config = replace(config, dataplane=replace(config.dataplane, lanes=identity.lanes))
    return config


def config_for_identity(config: Config, identity: Mapping[str, Any]) -> Config:
    """Return `config` with the values of `identity` that run edits, a refresh or another default may have changed."""
    config = with_sizes_of_identity(config, identity)
    plane = replace(config.dataplane, lanes=identity["lanes"])
    return replace(_at_generations(config, identity["index"]), dataplane=plane)


def with_sizes_of_identity(config: Config, identity: Mapping[str, Any]) -> Config:
    """Return `config` with the values of `identity` that run edits may have changed: seed, batches and sequences."""
    plane = replace(
        config.dataplane,
        seed=identity["seed"],
        global_batch_size=identity["global_batch_size"],
        batch_schedule=[BatchStageConfig(start=start, size=size) for start, size in identity["batch_schedule"]],
        seq_len=identity["seq_len"],
    )
    return replace(config, dataplane=plane)


def subset_for_identity(identity: Mapping[str, Any]) -> SampleSubset:
    """Return the samples that an attempt with `identity` served."""
    split: Split = identity["holdout"][0] if identity["holdout"] else "train"
    return SampleSubset(split=split, drop=tuple(identity["drop"]))


def _at_generations(config: Config, fingerprints: Sequence[str] | None) -> Config:
    """Return `config` with this generation of each index; unchanged if it reads another number of indexes."""
    if fingerprints is None or len(fingerprints) != len(config.index.paths_to_read):
        return config
    return replace(config, index=replace(config.index, generations=list(fingerprints)))
