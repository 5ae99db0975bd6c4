"""The state of a data plane: one array, the same on every rank, at any time, small."""

from typing import Any

import numpy as np
import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.plane_state import PlaneState, pack_state
from mixtera_hpc.dataplane.resume.stream_version import StreamVersion
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks

WORDS = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=3", "dataplane.audit=true"]
KIB = 1024


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS])


@pytest.fixture(scope="module")
def expected(config: Config) -> list[Any]:
    with DataPlane.open(config, Local()) as plane:
        return take(plane, 8)


def take(plane: DataPlane, count: int) -> list[Any]:
    return [batch.digests for _, batch in zip(range(count), plane, strict=False)]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_state_is_one_array_of_bytes_and_equal_on_every_rank(
    config: Config, expected: list[Any], steps: int
) -> None:
    def serve(comm: ThreadCommunicator) -> dict[str, Any]:
        with DataPlane.open(config, comm) as plane:
            take(plane, steps)
            return plane.state_dict()

    states = run_ranks(2, serve)
    assert [list(state) for state in states] == [["plane"], ["plane"]]
    assert states[0]["plane"].dtype == np.uint8
    assert states[0]["plane"].tobytes() == states[1]["plane"].tobytes()
    with DataPlane.open(config, Local()) as plane:
        plane.load_state_dict(states[1])
        assert take(plane, 8 - steps) == expected[steps:]


def test_a_state_can_be_loaded_after_one_was_asked_for(config: Config, expected: list[Any]) -> None:
    with DataPlane.open(config, Local()) as plane:
        take(plane, 5)
        saved = plane.state_dict()
    with DataPlane.open(config, Local()) as plane:
        plane.state_dict()
        plane.load_state_dict(saved)
        assert plane.next_step == 5
        assert plane.state_dict()["plane"].tobytes() == saved["plane"].tobytes()
        assert take(plane, 3) == expected[5:]


def test_a_state_before_the_first_batch_leaves_the_journal_without_an_attempt(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        first = plane.state_dict()["plane"]
        assert first.tobytes() == plane.state_dict()["plane"].tobytes()
        assert plane.next_step == 0


def test_every_rank_may_give_the_state_as_a_tensor(config: Config, expected: list[Any]) -> None:
    with DataPlane.open(config, Local()) as plane:
        take(plane, 2)
        saved = {"plane": torch.from_numpy(plane.state_dict()["plane"])}

    def serve(comm: ThreadCommunicator) -> list[Any]:
        with DataPlane.open(config, comm) as plane:
            plane.load_state_dict(saved)
            return take(plane, 6)

    parts = run_ranks(2, serve)
    assert [[*one, *two] for one, two in zip(*parts, strict=True)] == expected[2:]


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"json": {}, "arrays": {}}, ValueError, r"keys \['arrays', 'json'\], but expects 'plane'"),
        ({"plane": np.zeros(100, np.uint8)}, DataError, "cannot be read"),
        ({"plane": np.zeros(0, np.uint8)}, DataError, "cannot be read"),
        ({"plane": pack_state({"version": 1}, {})}, ConfigError, "has version 1"),
    ],
)
def test_something_else_than_a_state_is_refused(
    config: Config, state: dict[str, Any], error: type[Exception], message: str
) -> None:
    with DataPlane.open(config, Local()) as plane, pytest.raises(error, match=message):
        plane.load_state_dict(state)


def test_a_truncated_state_is_refused(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        saved = plane.state_dict()["plane"]
        for size in range(0, len(saved), 7):
            with pytest.raises(DataError, match="cannot be read"):
                plane.load_state_dict({"plane": saved[:size]})


def test_a_state_of_1000_domains_takes_at_most_64_kib() -> None:
    rng = np.random.default_rng(0)
    domains = [f"source=collection {number}, language=l{number % 97}" for number in range(1000)]
    # Counters of a long run: random numbers do not compress.
    plan = ChunkPlan(
        chunk=1 << 20,
        first_step=1 << 26,
        num_steps=64,
        last=False,
        cursors=rng.integers(1 << 36, size=1000),
        lags=rng.integers(-(1 << 16), 1 << 16, size=1000),
        weights=rng.integers(1 << 32, size=1000),
    )
    state = PlaneState(
        next_step=1 << 26,
        plan=plan,
        mixer={},
        num_fed=1 << 26,
        decisions=[],
        stream_version=StreamVersion(
            number=1, skips=(), origins=rng.integers(1 << 40, size=1000), begins=rng.integers(1 << 40, size=1000)
        ),
        identity={"index": ["f" * 32], "domains": domains, "max_epochs": [2.0] * 1000},
    )
    content = state.to_array()
    assert content.nbytes <= 64 * KIB
    restored = PlaneState.from_array(content)
    assert restored.plan.digest == plan.digest
    assert restored.identity == state.identity
