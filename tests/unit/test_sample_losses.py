"""Losses with `mixture.unit=samples`, and of a last batch with padding: statistics, feedback, validation, proof."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import CommError
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

SMALL = ["mixture.unit=samples", "dataplane.global_batch_size=12", "dataplane.chunk_steps=2", "dataplane.audit=true"]
ONE_EPOCH = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1", "dataplane.last_batch=pad"]


def losses_of(batch: Batch) -> np.ndarray:
    """Return a loss per sample that depends on the sample only; NaN for padding, as a model may give."""
    return np.array([np.nan if p is None else 1 + len(p["text"]) / 64 for p in batch.payloads or []])


def train(
    config: Config,
    num_ranks: int,
    record: Callable[[DataPlane, Batch], None],
    num_steps: int | None = None,
    folder: RunFolder | None = None,
) -> list[DomainStatistics]:
    """Record every batch, and return the statistics of all steps."""

    def rank(comm: Any) -> list[DomainStatistics]:
        statistics = []
        with DataPlane.open(config, comm=comm, folder=folder) as plane:
            for batch in plane:
                record(plane, batch)
                if batch.step + 1 == num_steps:
                    break
            plane.state_dict()  # Waits for all reductions.
            statistics += plane.completed_statistics()
        return statistics

    return rank(Local()) if num_ranks == 1 else run_ranks(num_ranks, rank)[0]


def assert_equal(one: Sequence[DomainStatistics], other: Sequence[DomainStatistics]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in ("loss_sum", "num_tokens", "num_sequences", "num_nonfinite"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), (a.step, name)


def record_whole(plane: DataPlane, batch: Batch) -> None:
    plane.record(batch, losses_of(batch))


def record_in_micro_batches(plane: DataPlane, batch: Batch) -> None:
    """Record real samples only, two at a time, as float32 tensors."""
    num_real = int((~batch.is_padding).sum())
    for start in range(0, num_real, 2):
        rows = slice(start, min(start + 2, num_real))
        plane.record(batch, torch.tensor(losses_of(batch)[rows], dtype=torch.float32), rows=rows)
    if not num_real:
        plane.record(batch, torch.zeros(len(batch.positions)))


@pytest.fixture
def config(collection: list[str]) -> Config:
    return compose([*collection, *SMALL, *ONE_EPOCH])


def test_every_sample_counts_once_and_padding_never(config: Config) -> None:
    config = replace(config, dataplane=replace(config.dataplane, global_batch_size=50))
    statistics = train(config, 1, record_whole)
    assert len(statistics) == 10
    assert sum(int(of_step.num_sequences.sum()) for of_step in statistics) == 480
    assert sum(int(of_step.num_tokens.sum()) for of_step in statistics) == 480
    assert not any(of_step.num_nonfinite.any() for of_step in statistics)


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
@pytest.mark.parametrize("record", [record_whole, record_in_micro_batches])
def test_statistics_do_not_depend_on_ranks_and_micro_batches(num_ranks: int, record: Any, config: Config) -> None:
    # 480 rows: the last of 27 steps has 12 samples, so that some ranks have nothing but padding.
    config = replace(config, dataplane=replace(config.dataplane, global_batch_size=18))
    assert_equal(train(config, num_ranks, record), train(config, 1, record_whole))


def test_a_padded_step_that_one_rank_does_not_record_stops_the_run(config: Config) -> None:
    config = replace(config, dataplane=replace(config.dataplane, global_batch_size=18))

    def record(plane: DataPlane, batch: Batch) -> None:
        if not batch.is_padding.all():
            plane.record(batch, losses_of(batch))
        else:
            plane.finish(batch)

    with pytest.raises(CommError, match=r"Step 26 was recorded in part: ranks \[4, 5\] did not record"):
        train(config, 6, record)


def test_losses_summed_over_tokens_are_weighted_by_them(config: Config) -> None:
    def record(plane: DataPlane, batch: Batch) -> None:
        num_tokens = np.array([len(payload["text"]) % 5 for payload in batch.payloads or []])
        plane.record(batch, 2.5 * num_tokens, num_tokens=torch.tensor(num_tokens))

    for of_step in train(config, 2, record, num_steps=4):
        observed = of_step.num_tokens > 0
        assert of_step.loss_mean[observed].tolist() == [2.5] * int(observed.sum())
        assert of_step.num_sequences.sum() == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": np.ones((12, 3))}, r"losses of shape \(12, 3\)"),
        ({"loss": np.ones(11)}, r"losses of shape \(11,\) .* for 12 samples"),
        ({"loss": np.ones(12), "num_tokens": np.ones(11)}, r"num_tokens of shape \(11,\)"),
        ({"loss": np.ones(12), "num_tokens": -np.ones(12)}, r"at least 0"),
        ({"loss": np.ones(12), "tokens": slice(0, 1)}, r"got tokens=, but with mixture\.unit=samples"),
    ],
)
def test_losses_of_another_shape_are_refused(arguments: Any, message: str, config: Config) -> None:
    with DataPlane.open(config, comm=Local()) as plane:
        batch = next(iter(plane))
        with pytest.raises(ValueError, match=message):
            plane.record(batch, **arguments)
        plane.record(batch, np.ones(12))


def test_a_dynamic_mixture_of_samples_learns_and_is_proven(collection: list[str], tmp_path: Path) -> None:
    ado = ["mixture=ado", "mixture.algorithm.warmup=2", "mixture.algorithm.refit_interval=1", "dataplane.chunk_steps=1"]
    config = compose([*collection, *SMALL, *ado])
    folder = RunFolder(tmp_path / "run")

    def record(plane: DataPlane, batch: Batch) -> None:
        # One domain gets better, the others do not.
        is_first = batch.domain_ids == batch.domain_ids.min()
        plane.record(batch, np.where(is_first, 8 / (batch.step + 1), 4.0))

    train(config, 2, record, num_steps=16, folder=folder)
    history = History(folder.journal)
    weights = np.array([plan.weights / plan.weights.sum() for plan in history.attempts[0].plans])
    assert np.abs(weights[-1] - weights[0]).max() > 0.02
    assert verify_run(ServedRun(folder, config)).num_sequences == 16 * 12


def test_held_out_losses_of_samples(collection: list[str]) -> None:
    config = compose([*collection, *SMALL, "query.holdout.fraction=0.3", "training.validate_steps=3"])

    def rank(comm: Any) -> DomainStatistics:
        with DataPlane.open(config, comm=comm) as plane:
            held_out = plane.held_out()
            for batch in held_out.batches():
                held_out.record(batch, losses_of(batch))
            return held_out.reduce(0)

    alone = rank(Local())
    assert alone.num_sequences.sum() == 36
    assert_equal([run_ranks(2, rank)[0]], [alone])
