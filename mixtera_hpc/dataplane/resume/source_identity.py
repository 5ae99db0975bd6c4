"""The identity of what a run serves: the values that must be equal for a state or a journal to belong to it."""

from typing import Any

from mixtera_hpc.config.batch_ramp import batch_stages
from mixtera_hpc.config.mixture.domain_tree import domain_entries, domain_fractions
from mixtera_hpc.config.schema import Config, MixtureConfig, QueryConfig
from mixtera_hpc.dataplane.reading.packing.sequence_order import packing_identity
from mixtera_hpc.dataplane.reading.shared_index import IndexDescription
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.tokens.definition import AddedTokens
from mixtera_hpc.tokens.tokenizer import Tokenizer

__all__ = ["source_identity"]


def source_identity(
    config: Config, index: IndexDescription, subset: SampleSubset, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return what identifies the data of a run; fit for JSON."""
    plane = config.dataplane
    mixture = config.mixture
    return {
        "index": index.fingerprints,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "where": index.where,
        "drop": list(subset.drop),
        "holdout": _holdout_identity(config.query, subset),
        "domains": index.domain_names,
        "fraction": domain_fractions(mixture, len(index.domain_names)),
        "unit": mixture.unit,
        "on_exhausted": mixture.on_exhausted,
        "max_epochs": _epoch_limits(mixture),
        "seq_len": plane.seq_len,
        "overlap_one_token": plane.overlap_one_token,
        "added_tokens": _added_tokens(tokenizer),
        "global_batch_size": plane.global_batch_size,
        "batch_schedule": batch_stages(plane),
        "last_batch": plane.last_batch,
        "chunk_steps": plane.chunk_steps,
        "feedback_lag": plane.feedback_lag,
        "seed": plane.seed,
        "shuffle": plane.shuffle,
        "window_bytes": plane.window_bytes,
        "lanes": plane.lanes,
        **packing_identity(plane),
    }


def _added_tokens(tokenizer: Tokenizer | None) -> list[list[int]]:
    """Return the special tokens that every document begins and ends with."""
    added = tokenizer.added if tokenizer else AddedTokens()
    return [list(added.before), list(added.after)]


def _holdout_identity(query: QueryConfig, subset: SampleSubset) -> list[Any] | None:
    """Return what decides which samples are held out; None when none are."""
    return [subset.split, query.holdout.fraction, query.holdout.seed] if query.holdout.fraction else None


def _epoch_limits(mixture: MixtureConfig) -> float | list[float | None] | None:
    """Return `mixture.max_epochs`, or a list with each domain's limit when some domains have their own."""
    # Where all domains share one limit, the identity holds the value that the user wrote.
    own_limits = [entry.domain.max_epochs for entry in domain_entries(mixture)]
    if all(limit is None for limit in own_limits):
        return mixture.max_epochs
    return [mixture.max_epochs if limit is None else limit for limit in own_limits]
