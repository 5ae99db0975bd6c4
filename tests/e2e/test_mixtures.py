"""Every kind of mixture on a real data plane: served proportions, and resuming in the middle of a chunk."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import Batch, DataPlane

BATCH = 16
STEPS = 24
CHUNK_STEPS = 3
A = "{key: {source: 'a*'}"
B = "{key: {source: [difflib, enum]}"
KINDS = {
    "natural": ["mixture.group_by=[source]", "mixture.temperature=3.0"],
    "unimax": ["mixture=unimax", "mixture.group_by=[source]", "mixture.cap=0.3"],
    "static": [f"mixture.domains=[{A}, weight: 0.7}}, {B}, weight: 0.2}}]", "mixture.remainder={weight: 0.1}"],
    "hierarchical": [
        f"mixture.domains=[{{key: {{tags: def}}, weight: 0.6, domains: [{A}}}, {B}}}]}}, "
        "{key: {tags: null}, weight: 0.4}]"
    ],
    "schedule": [
        f"mixture.domains=[{A}}}, {B}}}]",
        "mixture.schedule.shape=linear",
        "mixture.schedule.stages=[{start: 0, kind: natural}, {start: 9, kind: dynamic, algorithm: {name: odm}}]",
    ],
    "dynamic": ["mixture.group_by=[source]", "mixture.algorithm={name: loss-proportional}", "mixture.floor=0.02"],
    "arbitrary": ["dataplane.shuffle=none"],
}


def open_plane(collection: list[str], kind: str, unit: str) -> DataPlane:
    plain = [override for override in collection if not override.startswith("mixture.")]
    group = kind if kind != "unimax" else "natural"
    shape = [f"dataplane.global_batch_size={BATCH}", f"dataplane.chunk_steps={CHUNK_STEPS}", "dataplane.seq_len=32"]
    overrides = [*plain, *shape, f"mixture.unit={unit}", f"mixture.kind={group}", "dataplane.audit=true", *KINDS[kind]]
    return DataPlane.open(compose(overrides), Local())


def train(plane: DataPlane, steps: int) -> list[Batch]:
    """Take `steps` batches and record a loss that falls and differs by domain, per token or per sample."""
    batches = []
    for batch in plane:
        batches.append(batch)
        losses = 1.0 + batch.domain_ids + 3.0 / (1 + batch.step)
        if batch.payloads is None:
            losses = np.broadcast_to(losses[:, None], batch.loss_mask.shape)
        plane.record(batch, losses)
        if batch.step == steps - 1:
            break
    return batches


def content(batches: list[Batch]) -> list[Any]:
    return [(b.step, b.domain_ids.tolist(), b.digests or [repr(p) for p in b.payloads or []]) for b in batches]


@pytest.mark.parametrize("unit", ["tokens", "samples"])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_middle_of_a_chunk_changes_nothing(collection: list[str], kind: str, unit: str) -> None:
    with open_plane(collection, kind, unit) as plane:
        whole = content(train(plane, STEPS))
    with open_plane(collection, kind, unit) as plane:
        first = content(train(plane, 10))
        state = plane.state_dict()
    with open_plane(collection, kind, unit) as plane:
        plane.load_state_dict(state)
        rest = content(train(plane, STEPS))
    assert first + rest == whole


@pytest.mark.parametrize(
    ("kind", "weights"), [("static", [0.7, 0.2, 0.1]), ("natural", None), ("unimax", None), ("hierarchical", None)]
)
def test_served_proportions_equal_the_weights(collection: list[str], kind: str, weights: list[float] | None) -> None:
    with open_plane(collection, kind, "tokens") as plane:
        expected = plane._resources.source.weights
        served = np.bincount(np.concatenate([b.domain_ids for b in train(plane, STEPS)]), minlength=plane.num_domains)
    assert weights is None or expected.tolist() == pytest.approx(weights)
    assert np.abs(served - expected * BATCH * STEPS).max() < 1


def test_arbitrary_serves_every_sample_once_in_index_order(collection: list[str]) -> None:
    with open_plane(collection, "arbitrary", "samples") as plane:
        ids = [p["meta"]["id"] for b in train(plane, STEPS) for p in b.payloads or []]
    assert ids == list(range(BATCH * STEPS))


def test_a_schedule_ends_with_the_learned_weights_of_its_last_stage(collection: list[str]) -> None:
    with open_plane(collection, "schedule", "tokens") as plane:
        natural = plane._resources.source.weights
        batches = train(plane, STEPS)
    early = np.concatenate([batch.domain_ids for batch in batches[:3]])
    late = np.concatenate([batch.domain_ids for batch in batches[12:24]])
    assert abs(np.mean(early == 0) - natural[0]) < 1 / (3 * BATCH)
    assert abs(np.mean(late == 0) - natural[0]) > 0.05, "the learned weights equal the initial ones"


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_schedule_by_tokens_counts_predicted_tokens(collection: list[str], overlap: str) -> None:
    """The second stage starts after 9 steps of 16 sequences of 2 predicted tokens, with and without overlap.

    Without overlap, a sequence takes 3 tokens of its stream, of which 2 are predicted.
    """
    plain = [override for override in collection if not override.startswith("mixture.")]
    stages = f"[{{start: 0, domains: [{A}, weight: 1}}]}}, {{start: {9 * BATCH * 2}, domains: [{B}, weight: 1}}]}}]"
    shape = [f"dataplane.global_batch_size={BATCH}", "dataplane.chunk_steps=3", "dataplane.seq_len=2"]
    mixture = ["mixture=schedule", "mixture.schedule.unit=tokens", "mixture.schedule.shape=stepwise"]
    words = [*plain, *shape, *mixture, f"mixture.schedule.stages={stages}", f"dataplane.overlap_one_token={overlap}"]
    with DataPlane.open(compose(words), Local()) as plane:
        domains = [set(batch.domain_ids.tolist()) for batch in train(plane, 12)]
    assert domains == [{0}] * 9 + [{1}] * 3
