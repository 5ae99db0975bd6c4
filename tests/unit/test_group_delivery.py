"""Model-parallel peers: what their leader passes on is what each would have read, and differences stop the run."""

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.errors import CommError, ConfigError, DataError
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks
from mixtera_hpc.tokens.tokenizer import load_vocabulary
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=3",
    "dataplane.audit=true",
    "mixture.kind=dynamic",
    "mixture.algorithm={name:ado,warmup:2,refit_interval:1}",
]
STEPS = 11


def config_with(collection: list[str], *words: str) -> Config:
    plain = [word for word in collection if not word.startswith("mixture.group_by")]
    return compose([*plain, "mixture.group_by=[source]", *WORDS, *words])


@pytest.fixture(scope="module")
def lead(collection: list[str]) -> Config:
    return config_with(collection, "dataplane.delivery=lead")


def content(batch: Batch) -> list[Any]:
    fields = (batch.step, batch.chunk, batch.tokens, batch.loss_mask, batch.document_ids, batch.positions)
    return [np.asarray(field).tolist() for field in (*fields, batch.domain_ids)] + [batch.digests, batch.plan_digest]


def train(config: Config, comm: Communicator, stop: int, state: Any = None, look_ahead: int = 0, **options: Any) -> Any:
    """Train up to `stop`; return what was served, the state, and the reading threads that ran for this rank."""
    served = []
    with DataPlane.open(config, comm, **options) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches = iter(plane)
        held = [next(batches) for _ in range(look_ahead)]
        while len(served) < stop:
            held.append(next(batches))
            batch = held.pop(0)
            served.append(content(batch))
            plane.record(batch, 1.0 + batch.tokens[:, 1:] % 97 / (3 + batch.domain_ids[:, None] + batch.step))
        state = plane.state_dict()
        return served, state, [figure.loss_sum.tolist() for figure in plane.completed_statistics()]


def rows(served: list[Any], first: int, count: int) -> list[Any]:
    """Return a slice of what one rank was served alone."""
    own = slice(first, first + count)
    return [[*step[:2], *(field[own] for field in step[2:8]), step[8]] for step in served]


@pytest.mark.slow
@pytest.mark.parametrize("look_ahead", [0, 2])
@pytest.mark.parametrize("are_neighbours", [True, False])
def test_peers_get_from_their_leader_what_they_would_have_read(
    collection: list[str], lead: Config, tmp_path: Path, are_neighbours: bool, look_ahead: int
) -> None:
    whole, _, losses = train(config_with(collection), Local(), STEPS)
    folder = RunFolder(tmp_path / "mine" / "run")

    def serve(comm: ThreadCommunicator, stop: int, state: Any) -> Any:
        group = comm.rank // 2 if are_neighbours else comm.rank % 2
        return train(lead, comm, stop, state, look_ahead, folder=folder, data_parallel=(group, 2))

    first = run_ranks(4, lambda comm: serve(comm, 4, None))
    second = run_ranks(4, lambda comm: serve(comm, STEPS - 4, first[comm.rank][1]))
    for rank in range(4):
        group = rank // 2 if are_neighbours else rank % 2
        assert [*first[rank][0], *second[rank][0]] == rows(whole, 4 * group, 4)
        assert [*first[rank][2], *second[rank][2]] == losses
        assert second[rank][1]["plane"].tobytes() == second[0][1]["plane"].tobytes()
    assert verify_run(ServedRun(folder, lead)).num_steps == STEPS


def test_only_the_leader_runs_a_reading_thread(lead: Config) -> None:
    # The leader of each group of two: ranks 0 and 2.
    def serve(comm: ThreadCommunicator) -> int:
        with DataPlane.open(lead, comm, data_parallel=(comm.rank // 2, 2)) as plane:
            next(iter(plane))
            comm.Barrier()
            count = sum(thread.name == "reader" for thread in threading.enumerate())
            comm.Barrier()
            return count

    assert run_ranks(4, serve) == [2] * 4


def test_the_end_of_the_data_reaches_the_peers(collection: list[str]) -> None:
    config = config_with(collection, "dataplane.delivery=lead", "mixture.on_exhausted=stop", "mixture.max_epochs=1")

    def serve(comm: ThreadCommunicator) -> int:
        with DataPlane.open(config, comm, data_parallel=(0, 1)) as plane:
            return sum(plane.record(batch, np.ones((8, 16))) is None for batch in plane)

    counts = run_ranks(2, serve)
    assert counts[0] == counts[1] > 1


def test_an_error_of_the_leader_reaches_the_peers_at_its_step(own_collection: list[str]) -> None:
    config = config_with(own_collection, "dataplane.delivery=lead", "dataplane.prefetch_batches=1")
    root = Path(next(word.partition("=")[2] for word in own_collection if word.startswith("data.root=")))
    failed: dict[int, tuple[int, str]] = {}

    def serve(comm: ThreadCommunicator) -> None:
        steps = 0
        with DataPlane.open(config, comm, data_parallel=(0, 1)) as plane:
            if comm.rank == 0:
                for path in root.iterdir():
                    path.write_bytes(b"damaged" * (path.stat().st_size // 7 + 1))
            comm.Barrier()
            try:
                for batch in plane:
                    steps += 1
                    plane.record(batch, np.ones((8, 16)))
            except DataError as error:
                failed[comm.rank] = (steps, str(error))
        comm.Barrier()

    run_ranks(2, serve)
    assert failed[0][0] == failed[1][0]
    assert failed[1][1].startswith("The leader of this rank's group could not read a batch")
    assert failed[0][1][:40] in failed[1][1]


def test_samples_are_refused_with_the_cure(collection: list[str]) -> None:
    words = ["mixture.unit=samples", "dataplane.global_batch_size=8", "dataplane.delivery=lead"]
    config = compose([*collection, *words])
    with pytest.raises(ConfigError, match=r"mixture\.unit is samples.\n  Set dataplane\.delivery=each"):
        run_ranks(2, lambda comm: DataPlane.open(config, comm, data_parallel=(0, 1)))


def test_a_peer_that_is_handed_other_tokens_is_named(collection: list[str], tmp_path: Path) -> None:
    path = Path(next(word.partition("=")[2] for word in collection if word.startswith("dataplane.tokenizer=")))
    # Stands for another release of the tokenizer on one node: two tokens have each other's number.
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    swapped = tmp_path / "tokenizer.json"
    swapped.write_text(json.dumps(tokenizer))
    config = config_with(collection)
    other = dataclasses.replace(config.dataplane, tokenizer=str(swapped))

    def serve(comm: ThreadCommunicator) -> None:
        with DataPlane.open(config, comm, data_parallel=(comm.rank // 2, 2)) as plane:
            if comm.rank == 3:
                # Another file would be refused when the data plane is opened.
                source = dataclasses.replace(plane._resources.source, tokenizer=load_vocabulary(other))
                plane._resources = dataclasses.replace(plane._resources, source=source)
            for batch, _ in zip(plane, range(12), strict=False):
                plane.record(batch, np.ones((4, 16)))

    message = r"Ranks \[3\] were handed other data .*: in step \d+, position [4-7] differs between rank 3 and rank 2"
    with pytest.raises(CommError, match=message):
        run_ranks(4, serve)
