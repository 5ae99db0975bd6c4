"""Promises 2 and 3 for whole runs: any mixture and job shape, stopped anywhere, serves what one rank serves."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.testing.communicators import CHECKS
from mixtera_hpc.testing.thread_ranks import run_ranks

from .examples import whole_runs

BATCH = 12
STEPS = 14
PAIR = [{"key": {"source": "argparse"}, "weight": 0.7}, {"key": {"source": ["ast", "enum"]}, "weight": 0.3}]
LEARNED = {"kind": "dynamic", "algorithm": {"name": "ado", "warmup": 3, "refit_interval": 3}}
MIXTURES: list[dict[str, Any]] = [
    {"kind": "natural", "group_by": ["source"]},
    {"kind": "natural", "group_by": ["source"], "temperature": 3.0, "floor": 0.02},
    {"kind": "static", "domains": PAIR},
    {"kind": "static", "domains": [PAIR[0] | {"weight": 0.6}], "remainder": {"weight": 0.4}},
    {
        "kind": "hierarchical",
        "domains": [{"weight": 0.8, "domains": PAIR}, {"key": {"source": "inspect"}, "weight": 0.2}],
    },
    {
        "kind": "schedule",
        "schedule": {
            "shape": "linear",
            "stages": [
                {"start": 0, "domains": PAIR},
                {"start": 9, "domains": [PAIR[0] | {"weight": 0.2}, PAIR[1] | {"weight": 0.8}]},
            ],
        },
    },
    {"kind": "arbitrary"},
    {**LEARNED, "group_by": ["source"]},
    {**LEARNED, "group_by": ["source"], "cap": 0.5},
    {"kind": "dynamic", "group_by": ["source"], "algorithm": {"name": "odm"}},
]


@dataclass(frozen=True)
class Attempt:
    """The shape of one job, and where it stops."""

    ranks: int
    group: int
    prefetch: int
    steps: int
    workers: int = 0


SHAPES = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (4, 4)]
ATTEMPTS = st.lists(
    st.builds(
        lambda shape, prefetch, steps: Attempt(shape[0], shape[1], prefetch, steps),
        st.sampled_from(SHAPES),
        st.integers(1, 5),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=3,
)
WITH_WORKERS = st.lists(
    st.builds(Attempt, st.integers(1, 2), st.just(1), st.integers(1, 5), st.integers(0, 7), st.integers(1, 3)),
    min_size=1,
    max_size=2,
)
"""Processes take most of a second to start."""
RUNS = st.fixed_dictionaries(
    {
        "unit": st.sampled_from(["tokens", "samples"]),
        "on_exhausted": st.sampled_from(["repeat", "redistribute", "stop"]),
        "max_epochs": st.sampled_from([None, 0.5, 1.0, 2.0]),
    }
)
PLANES = st.fixed_dictionaries(
    {
        "seq_len": st.sampled_from([5, 32, 150]),
        "overlap_one_token": st.booleans(),
        "chunk_steps": st.integers(1, 5),
        "feedback_lag": st.integers(2, 3),
        "seed": st.integers(0, 3),
        "shuffle": st.sampled_from(["none", "block", "window", "window", "sequence"]),
        "window_bytes": st.sampled_from([1, 5000, 20_000, 100_000, 10**9]),
        "lanes": st.sampled_from([1, 2, 3, None, 500]),
        "pack": st.sampled_from(["concat", "best_fit"]),
        "pack_group": st.sampled_from([2, 3, 8]),
        "balance": st.sampled_from(["none", "attention"]),
        "balance_group": st.sampled_from([None, 2, 4, 12]),
    }
)


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    words = [w for w in collection if not w.startswith("mixture.group_by")]
    return compose_plain([*words, f"dataplane.global_batch_size={BATCH}", "dataplane.audit=true"])


Served = dict[int, dict[int, str]]
"""Step → position → content."""


def serve(
    config: Config, comm: Communicator, until: int, state: Any
) -> tuple[list[tuple[int, list[int], list[str]]], Any]:
    served = []
    with DataPlane.open(config, comm) as plane:
        if state is not None:
            plane.load_state_dict(state if comm.rank == 0 else None)
        batches = iter(plane)
        while plane.next_step < until and (batch := next(batches, None)) is not None:
            served.append((batch.step, batch.positions.tolist(), content(batch)))
            if batch.tokens.size:
                plane.record(batch, 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None] + batch.step))
        saved = plane.state_dict()
    return served, saved


def content(batch: Batch) -> list[str]:
    contents = batch.digests or [json.dumps(p, sort_keys=True) for p in batch.payloads or []]
    return [
        f"{domain} {text} {batch.plan_digest}" for domain, text in zip(batch.domain_ids.tolist(), contents, strict=True)
    ]


def combine(parts: list[list[tuple[int, list[int], list[str]]]], group: int) -> Served:
    """Combine what ranks were served; ranks of a group must have been served the same."""
    served: Served = {}
    for first in range(0, len(parts), group):
        assert all(part == parts[first] for part in parts[first : first + group])
        for step, positions, texts in parts[first]:
            for position, text in zip(positions, texts, strict=True):
                assert position not in served.setdefault(step, {})
                served[step][position] = text
    return served


@whole_runs(60)
@given(st.sampled_from(MIXTURES), RUNS, PLANES, ATTEMPTS)
def test_a_run_of_any_attempts_serves_what_one_rank_serves_in_one_attempt(
    plain: dict[str, Any], mixture: dict[str, Any], run: dict[str, Any], plane: dict[str, Any], attempts: list[Attempt]
) -> None:
    check_attempts(plain, {**mixture, **run}, plane, attempts)


@whole_runs(6)
@given(st.sampled_from(MIXTURES), RUNS, PLANES, WITH_WORKERS)
def test_content_does_not_depend_on_the_number_of_workers(
    plain: dict[str, Any], mixture: dict[str, Any], run: dict[str, Any], plane: dict[str, Any], attempts: list[Attempt]
) -> None:
    check_attempts(plain, {**mixture, **run}, plane, attempts)


def check_attempts(
    plain: dict[str, Any], mixture: dict[str, Any], plane: dict[str, Any], attempts: list[Attempt]
) -> None:
    def config(attempt: Attempt) -> Config:
        shape = {
            "model_parallel_size": attempt.group,
            "prefetch_batches": attempt.prefetch,
            "workers": attempt.workers,
        }
        return from_plain(
            Config,
            {
                **plain,
                "mixture": {**plain["mixture"], **mixture},
                "dataplane": {**plain["dataplane"], **plane, **shape},
            },
        )

    whole, _ = serve(config(Attempt(1, 1, 4, 0)), Local(), STEPS, None)
    expected = combine([whole], 1)
    state = None
    done = 0
    served = Served()
    for attempt in [*attempts, Attempt(2, 1, 2, STEPS)]:
        until = min(done + attempt.steps, STEPS)
        parts = run_ranks(attempt.ranks, lambda comm, a=attempt, u=until, s=state: serve(config(a), comm, u, s))  # type: ignore[misc]
        for step, positions in combine([part for part, _ in parts], attempt.group).items():
            assert step not in served
            served[step] = positions
        state = parts[0][1]
        done = until
        assert state is not None
    assert served == expected


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("ranks", [1, 3])
def test_thread_ranks_conform_to_the_communicator_protocol(check: Callable[[Communicator], None], ranks: int) -> None:
    run_ranks(ranks, check)
