"""Steps of a trainer that holds several batches: what finishes them, what a state holds, and what is refused."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import CommError, ConfigError
from mixtera_hpc.integrations.torch import PlaneDataset
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

pytestmark = pytest.mark.slow
"""Serves whole runs with several batches in flight."""

CHUNK_STEPS = 3
WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    f"dataplane.chunk_steps={CHUNK_STEPS}",
    "dataplane.feedback_lag=2",
    "dataplane.audit=true",
]
LEARNS = ["mixture.kind=dynamic", "mixture.algorithm={name:ado,warmup:2,refit_interval:1}"]
STEPS = 20

Statistics = dict[int, tuple[list[float], list[int]]]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS])


@pytest.fixture(scope="module")
def learning(collection: list[str]) -> Config:
    words = [word for word in collection if not word.startswith("mixture.group_by")]
    return compose([*words, *WORDS, "mixture.group_by=[source]", *LEARNS])


def loss_of(batch: Batch) -> Any:
    return 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None] + batch.step)


def fetched_ahead(plane: DataPlane, look_ahead: int, steps: int) -> Iterator[Batch]:
    """Yield batches like a loader that has always asked for `look_ahead` more."""
    batches = iter(plane)
    held = [next(batches) for _ in range(look_ahead)]
    for _ in range(steps):
        held.append(next(batches))
        yield held.pop(0)


Train = Callable[[DataPlane, Batch], None]


def train(
    config: Config, comm: Communicator, record: Train, steps: int, look_ahead: int = 0, state: Any = None
) -> tuple[list[Any], Statistics, Any]:
    """Return what was trained on in every step, the statistics, and the state at the end."""
    served = []
    statistics: Statistics = {}
    with DataPlane.open(config, comm) as plane:
        if state is not None:
            plane.load_state_dict(state)
        for batch in fetched_ahead(plane, look_ahead, steps):
            served.append((batch.step, batch.digests))
            record(plane, batch)
        saved = plane.state_dict()
        for step in plane.completed_statistics():
            statistics[step.step] = (step.loss_sum.tolist(), step.num_tokens.tolist())
    return served, statistics, saved


def record_whole(plane: DataPlane, batch: Batch) -> None:
    plane.record(batch, loss_of(batch))


def record_rows(plane: DataPlane, batch: Batch) -> None:
    for start in range(0, len(batch.domain_ids), 2):
        rows = slice(start, start + 2)
        plane.record(batch, loss_of(batch)[rows], rows=rows)


def record_sums(plane: DataPlane, batch: Batch) -> None:
    sums = np.where(batch.loss_mask, loss_of(batch), 0).sum(axis=1)
    plane.record({"step": batch.step}, torch.from_numpy(sums), num_tokens=torch.from_numpy(batch.loss_mask.sum(axis=1)))


@pytest.fixture(scope="module")
def alone(learning: Config) -> tuple[list[Any], Statistics]:
    served, statistics, _ = train(learning, Local(), record_whole, STEPS)
    return served, statistics


@pytest.mark.parametrize("look_ahead", [1, 2, CHUNK_STEPS])
@pytest.mark.parametrize("record", [record_whole, record_rows, record_sums])
def test_batches_and_statistics_do_not_depend_on_the_look_ahead(
    learning: Config, alone: tuple[list[Any], Statistics], look_ahead: int, record: Train
) -> None:
    served, statistics, _ = train(learning, Local(), record, STEPS, look_ahead)
    assert (served, statistics) == alone


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_a_resume_begins_with_the_first_batch_that_was_not_finished(
    learning: Config, alone: tuple[list[Any], Statistics], look_ahead: int, stop: int
) -> None:
    first, before, state = train(learning, Local(), record_whole, stop, look_ahead)
    second, after, _ = train(learning, Local(), record_whole, STEPS - stop, look_ahead, state)
    assert [*first, *second] == alone[0]
    assert {**before, **after} == alone[1]


def test_a_trainer_that_fetches_ahead_without_losses_says_what_it_has_finished(config: Config) -> None:
    expected, _, _ = train(config, Local(), lambda plane, batch: None, 9)
    first, _, state = train(config, Local(), DataPlane.finish, 4, look_ahead=2)
    second, _, _ = train(config, Local(), lambda plane, batch: None, 5, state=state)
    assert [*first, *second] == expected


@pytest.mark.parametrize("recording", [[0], [1], [0, 1]], ids=["first rank", "last rank", "both ranks"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_count_once_whichever_ranks_of_a_group_record(
    collection: list[str], alone: tuple[list[Any], Statistics], ranks: int, recording: list[int]
) -> None:
    words = [word for word in collection if not word.startswith("mixture.group_by")]
    grouped = compose(
        [*words, *WORDS, "mixture.group_by=[source]", *LEARNS, "dataplane.model_parallel_size=2"],
    )

    def serve(comm: ThreadCommunicator) -> Any:
        record = record_whole if comm.rank % 2 in recording else lambda plane, batch: None
        return train(grouped, comm, record, STEPS, look_ahead=1)

    parts = run_ranks(ranks, serve)
    assert all(part[1] == alone[1] for part in parts)
    # Every rank describes the same progress, also those that never record.
    assert len({part[2]["plane"].tobytes() for part in parts}) == 1


def test_a_request_beyond_the_limit_is_refused_with_both_keys(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        batches = iter(plane)
        plane.finish(next(batches))
        for _ in range(CHUNK_STEPS + 1):
            next(batches)
        with pytest.raises(ValueError, match=r"4 batches are not finished.*feedback_lag=2 .*chunk_steps=3 allow 3"):
            next(batches)


def test_a_step_that_nobody_recorded_is_no_observation(config: Config) -> None:
    def record_even(plane: DataPlane, batch: Batch) -> None:
        if batch.step % 2 == 0:
            record_whole(plane, batch)

    _, statistics, _ = train(config, Local(), record_even, 7)
    assert [step for step, (_, tokens) in statistics.items() if sum(tokens)] == [0, 2, 4, 6]
    assert sorted(statistics) == list(range(7))


def test_a_step_recorded_on_some_ranks_only_stops_the_run_with_their_names(config: Config) -> None:
    def serve(comm: ThreadCommunicator) -> None:
        with DataPlane.open(config, comm) as plane:
            for batch in plane:
                if comm.rank != 1 or batch.step != 3:
                    record_whole(plane, batch)
                else:
                    plane.finish(batch)
                if batch.step == 8:
                    break

    with pytest.raises(CommError, match=r"Step 3 was recorded in part: ranks \[1\] did not record"):
        run_ranks(4, serve)


def test_groups_that_recorded_unequal_numbers_of_copies_are_refused(collection: list[str]) -> None:
    grouped = compose([*collection, *WORDS, "dataplane.model_parallel_size=4"])

    def serve(comm: ThreadCommunicator) -> None:
        # One copy in the first group and three in the second are two per group on average.
        train(grouped, comm, record_whole if comm.rank in (0, 4, 5, 6) else lambda plane, batch: None, 6)

    with pytest.raises(CommError, match=r"Step 0 was recorded in part: ranks \[1, 2, 3\] did not record"):
        run_ranks(8, serve)


def test_a_step_that_is_finished_with_missing_rows_is_reported(config: Config) -> None:
    with (
        pytest.raises(CommError, match="Step 0 was finished, but only a part of it was recorded: sequence 4"),
        DataPlane.open(config, Local()) as plane,
    ):
        batch = next(iter(plane))
        plane.record(batch, loss_of(batch)[:4], rows=slice(0, 4))
        plane.finish(batch)
        next(iter(plane))


def test_parts_of_sequences_add_up_to_the_whole(config: Config) -> None:
    def record_halves(plane: DataPlane, batch: Batch) -> None:
        for tokens in (slice(0, 8), slice(8, 16)):
            plane.record(batch, loss_of(batch)[:, tokens], tokens=tokens)

    whole, expected, _ = train(config, Local(), record_whole, 5)
    served, statistics, _ = train(config, Local(), record_halves, 5)
    assert served == whole
    for step, (losses, tokens) in expected.items():
        assert statistics[step][1] == tokens
        np.testing.assert_allclose(statistics[step][0], losses, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": np.full(8, 3)}, r"num_tokens=3 for row 0, but its loss mask counts \d+"),
        ({"num_tokens": np.full(4, 16)}, r"one number per sequence: \(8,\)"),
        ({}, r"losses of shape \(8,\)"),
    ],
)
def test_sums_that_do_not_fit_the_loss_mask_are_refused(
    config: Config, arguments: dict[str, Any], message: str
) -> None:
    with DataPlane.open(config, Local()) as plane, pytest.raises(ValueError, match=message):
        plane.record(next(iter(plane)), np.ones(8), **arguments)


def test_a_finished_step_cannot_be_recorded(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        batches = iter(plane)
        batch = next(batches)
        record_whole(plane, batch)
        next(batches)
        with pytest.raises(ValueError, match=r"record\(\) was given step 0, which is finished .*open steps: \[1\]"):
            record_whole(plane, batch)


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("first", [0, 2, 11])
def test_a_stop_request_reaches_all_ranks_in_the_same_step(
    config: Config, tmp_path: Path, look_ahead: int, first: int
) -> None:
    run = RunFolder(tmp_path)

    def serve(comm: ThreadCommunicator) -> int:
        with DataPlane.open(config, comm, folder=run, attempt=1) as plane:
            for batch in fetched_ahead(plane, look_ahead, STEPS):
                if comm.rank == 0 and batch.step == first:
                    run.control.mkdir(exist_ok=True)
                    (run.control / "stop").touch()
                record_whole(plane, batch)
                if plane.stop_requested():
                    return batch.step
        return -1

    stops = run_ranks(2, serve)
    assert stops[0] == stops[1]
    assert first + 1 <= stops[0] <= first + 1 + 2 * look_ahead


def test_a_run_that_ended_with_unfinished_batches_is_proven(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = None
    for _ in range(3):
        with DataPlane.open(config, Local(), folder=folder) as plane:
            if state is not None:
                plane.load_state_dict(state)
            for batch in fetched_ahead(plane, 2, 4):
                record_whole(plane, batch)
            state = plane.state_dict()
    history = History(folder.journal)
    assert [(attempt.first_step, attempt.next_step) for attempt in history.attempts] == [(0, 4), (4, 8), (8, 12)]
    assert verify_run(ServedRun(folder, config)).num_steps == 12


def test_a_loader_must_say_what_is_finished_before_a_state_is_saved(config: Config) -> None:
    with DataPlane.open(config, Local()) as plane:
        batches = iter(DataLoader(PlaneDataset(plane), batch_size=None))
        next(batches)
        batch = next(batches)
        with pytest.raises(ConfigError, match=r"does not know which batches .*\n.*plane\.finish\(batch\)"):
            plane.state_dict()
        plane.finish(batch)
        assert plane.state_dict()["plane"].size


def test_a_mixture_that_hears_no_losses_is_reported_once(learning: Config, caplog: pytest.LogCaptureFixture) -> None:
    train(learning, Local(), lambda plane, batch: None, 30)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in messages if "no losses were recorded in the last 4 chunks" in text]) == 1
