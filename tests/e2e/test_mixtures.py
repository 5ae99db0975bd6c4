"""Every kind of mixture, served by a real data plane: what comes out, and that a stop in the middle changes nothing."""

from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import Batch, DataPlane

BATCH, STEPS, CHUNK_STEPS = 16, 24, 3
A, B = "{key: {source: 'a*'}", "{key: {source: [difflib, enum]}"
KINDS = {
    "natural": ["mixture.group_by=[source]", "mixture.temperature=3.0"],
    "unimax": ["mixture=unimax", "mixture.group_by=[source]", "mixture.cap=0.3"],
    "static": [f"mixture.domains=[{A}, weight: 0.7}}, {B}, weight: 0.2}}]", "mixture.remainder={weight: 0.1}"],
    "hierarchical": [
        f"mixture.domains=[{{key: {{tags: def}}, weight: 0.6, domains: [{A}}}, {B}}}]}}, {{key: {{tags: null}}, weight: 0.4}}]"
    ],
    "schedule": [
        f"mixture.domains=[{A}}}, {B}}}]",
        "mixture.schedule.shape=linear",
        "mixture.schedule.stages=[{start: 0, kind: natural}, {start: 9, kind: dynamic, algorithm: {name: odm}}]",
    ],
    "dynamic": ["mixture.group_by=[source]", "mixture.algorithm={name: exponentiated-gradient}", "mixture.floor=0.02"],
    "arbitrary": ["dataplane.shuffle=none"],
}


def open_plane(collection: list[str], kind: str, unit: str) -> DataPlane:
    plain = [o for o in collection if not o.startswith("mixture.")]
    group = kind if kind != "unimax" else "natural"
    shape = [f"dataplane.global_batch_size={BATCH}", f"dataplane.chunk_steps={CHUNK_STEPS}", "dataplane.seq_len=32"]
    overrides = [*plain, *shape, f"mixture.unit={unit}", f"mixture.kind={group}", "dataplane.audit=true", *KINDS[kind]]
    return DataPlane.open(compose(overrides), Local())


def train(plane: DataPlane, steps: int) -> list[Batch]:
    """Losses that depend on the domain and fall; samples mode has none."""
    batches = []
    for batch in plane:
        batches.append(batch)
        losses = np.broadcast_to(1.0 + batch.domain_ids[:, None] + 3.0 / (1 + batch.step), batch.loss_mask.shape)
        plane.record(batch, losses)
        if batch.step == steps - 1:
            break
    return batches


def content(batches: list[Batch]) -> list[Any]:
    return [(b.step, b.domain_ids.tolist(), b.digests or [repr(p) for p in b.payloads or []]) for b in batches]


@pytest.mark.parametrize("unit", ["tokens", "samples"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_in_the_middle_of_a_chunk_changes_nothing(collection: list[str], kind: str, unit: str) -> None:
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
def test_what_is_served_is_what_query_promises(collection: list[str], kind: str, weights: list[float] | None) -> None:
    with open_plane(collection, kind, "tokens") as plane:
        promised = plane._source.weights
        served = np.bincount(np.concatenate([b.domain_ids for b in train(plane, STEPS)]), minlength=plane.num_domains)
    assert weights is None or promised.tolist() == pytest.approx(weights)
    assert np.abs(served - promised * BATCH * STEPS).max() < 1


def test_arbitrary_serves_every_sample_once_in_index_order(collection: list[str]) -> None:
    with open_plane(collection, "arbitrary", "samples") as plane:
        ids = [p["meta"]["id"] for b in train(plane, STEPS) for p in b.payloads or []]
    assert ids == list(range(BATCH * STEPS))


def test_a_schedule_ends_where_its_last_stage_is(collection: list[str]) -> None:
    with open_plane(collection, "schedule", "tokens") as plane:
        natural = plane._source.weights
        batches = train(plane, STEPS)
    early, late = (np.concatenate([b.domain_ids for b in batches[s]]) for s in (slice(0, 3), slice(12, 24)))
    assert abs(np.mean(early == 0) - natural[0]) < 1 / (3 * BATCH)
    assert abs(np.mean(late == 0) - natural[0]) > 0.05, "what was learned is not what it began with"


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_schedule_by_tokens_counts_predicted_tokens(collection: list[str], overlap: str) -> None:
    """At 9 steps of 16 sequences of 2: with overlap or without, where each takes 3 tokens of its stream."""
    plain = [o for o in collection if not o.startswith("mixture.")]
    stages = f"[{{start: 0, domains: [{A}, weight: 1}}]}}, {{start: {9 * BATCH * 2}, domains: [{B}, weight: 1}}]}}]"
    shape = [f"dataplane.global_batch_size={BATCH}", "dataplane.chunk_steps=3", "dataplane.seq_len=2"]
    mixture = ["mixture=schedule", "mixture.schedule.unit=tokens", "mixture.schedule.shape=stepwise"]
    words = [*plain, *shape, *mixture, f"mixture.schedule.stages={stages}", f"dataplane.overlap_one_token={overlap}"]
    with DataPlane.open(compose(words), Local()) as plane:
        domains = [set(batch.domain_ids.tolist()) for batch in train(plane, 12)]
    assert domains == [{0}] * 9 + [{1}] * 3
