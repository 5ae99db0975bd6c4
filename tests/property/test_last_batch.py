"""`dataplane.last_batch=pad`: every sequence is served exactly once, and padding counts nowhere, on any ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.steps.digests import PADDING_DIGEST
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.list import SequenceFilter, list_sequences
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

NUM_ROWS = 480
ONE_EPOCH = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1", "dataplane.last_batch=pad"]


def config_of(collection: Sequence[str], unit: str, batch_size: int, *more: str) -> Config:
    sizes = [f"dataplane.global_batch_size={batch_size}", "dataplane.chunk_steps=3", "dataplane.seq_len=64"]
    return compose([*collection, *ONE_EPOCH, f"mixture.unit={unit}", *sizes, "dataplane.audit=true", *more])


def serve(config: Config, num_ranks: int, folder: RunFolder | None = None) -> list[list[Batch]]:
    """Serve all data; return the batches of every rank."""

    def rank(comm: Any) -> list[Batch]:
        with DataPlane.open(config, comm=comm, folder=folder) as plane:
            return list(plane)

    return [rank(Local())] if num_ranks == 1 else run_ranks(num_ranks, rank)


def digests_by_position(by_rank: list[list[Batch]]) -> dict[tuple[int, int], str]:
    digests = {}
    for batch in (batch for batches in by_rank for batch in batches):
        for position, digest in zip(batch.positions.tolist(), batch.digests or [], strict=True):
            assert (batch.step, position) not in digests
            digests[batch.step, position] = digest
    return digests


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@whole_runs(12)
@given(groups=st.integers(1, 4), per_rank=st.integers(1, 40), workers=st.sampled_from([0, 0, 0, 1]))
def test_every_sequence_is_served_once_for_any_number_of_ranks(
    unit: str, groups: int, per_rank: int, workers: int, collection: list[str]
) -> None:
    batch_size = groups * per_rank
    config = config_of(collection, unit, batch_size, f"dataplane.workers={workers if groups == 1 else 0}")
    alone = digests_by_position(serve(config, 1))
    by_rank = serve(config, groups)
    assert digests_by_position(by_rank) == alone

    real = {key: digest for key, digest in alone.items() if digest != PADDING_DIGEST}
    num_steps = max(step for step, _ in alone) + 1
    assert len(alone) == num_steps * batch_size
    # Only the last step has padding, at its end, and less than a whole step of it.
    assert list(real) == sorted(alone)[: len(real)]
    assert len(alone) - len(real) < batch_size
    if unit == "samples":
        assert len(real) == NUM_ROWS
    for batch in (batch for batches in by_rank for batch in batches):
        padding = np.array([digest == PADDING_DIGEST for digest in batch.digests or []])
        assert np.array_equal(batch.is_padding, padding)
        assert ((batch.domain_ids < 0) == padding).all()
        assert not batch.loss_mask[padding].any() and not batch.tokens[padding].any()
        if batch.payloads is not None:
            assert [payload is None for payload in batch.payloads] == padding.tolist()


def test_a_run_with_padding_is_listed_verified_and_resumed(collection: list[str], tmp_path: Path) -> None:
    config = config_of(collection, "samples", 50)
    folder = RunFolder(tmp_path / "run")

    def first(comm: Any) -> Any:
        with DataPlane.open(config, comm=comm, folder=folder) as plane:
            batches = iter(plane)
            for _ in range(9):
                next(batches)
            return plane.state_dict()

    state = run_ranks(2, first)[0]
    with DataPlane.open(config, comm=Local(), folder=folder) as plane:
        plane.load_state_dict(state)
        (last,) = list(plane)
    assert (last.step, int(last.is_padding.sum())) == (9, 20)

    run = ServedRun(folder, config)
    result = verify_run(run)
    assert (result.num_steps, result.num_sequences) == (10, NUM_ROWS)
    records = [record for record, _ in list_sequences(run, SequenceFilter(steps=range(9, 10)))]
    assert [record["position"] for record in records] == list(range(30))
    assert [record["digest"] for record in records] == (last.digests or [])[:30]


def test_without_padding_what_does_not_fill_a_batch_is_not_served(collection: list[str]) -> None:
    config = config_of(collection, "samples", 50, "dataplane.last_batch=drop")
    digests = digests_by_position(serve(config, 1))
    assert len(digests) == 450 and PADDING_DIGEST not in digests.values()


def test_a_leader_passes_padding_on_to_its_peers(collection: list[str]) -> None:
    sizes = ["dataplane.global_batch_size=9", "dataplane.model_parallel_size=2", "mixture.unit=tokens"]
    each = serve(config_of(collection, "tokens", 9, *sizes), 2)
    lead = serve(config_of(collection, "tokens", 9, *sizes, "dataplane.delivery=lead"), 2)
    assert each[0][-1].is_padding.any()
    for one, other in zip([*each[0], *each[1]], [*lead[0], *lead[1]], strict=True):
        assert one.digests == other.digests and np.array_equal(one.is_padding, other.is_padding)
