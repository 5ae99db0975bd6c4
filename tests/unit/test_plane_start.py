"""Checks of `DataPlane.open`, and facts that it finds out, before a run starts or continues, for any training loop."""

import json
import logging
import pickle
from pathlib import Path

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, write_request
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.testing.small_collection import make_collection

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2", "dataplane.audit=true"]


def test_a_batch_that_ranks_cannot_share_is_refused_before_the_index_is_opened() -> None:
    config = compose(
        ["data.root=d", "index.path=missing.h5", "mixture.unit=samples", "dataplane.model_parallel_size=2"]
    )
    with pytest.raises(ConfigError, match=r"model_parallel_size is 2, which does not divide the 1 ranks"):
        DataPlane.open(config, comm=Local())


def test_attempts_in_one_folder_are_numbered(collection: list[str], tmp_path: Path) -> None:
    config = compose([*collection, *SMALL])
    run = RunFolder(tmp_path)
    state = None
    for _ in range(3):
        with DataPlane.open(config, comm=Local(), folder=run) as plane:
            if state is not None:
                plane.load_state_dict(state)
            next(iter(plane))
            state = plane.state_dict()
    attempts = History(run.journal).attempts
    assert [(attempt.number, attempt.first_step) for attempt in attempts] == [(1, 0), (2, 1), (3, 2)]
    assert all(run.audit_of_rank(number, 0).is_file() for number in (1, 2, 3))


def test_a_batch_job_gives_the_number_of_the_attempt(
    collection: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    monkeypatch.setenv("MIXTERA_RUN_FOLDER", str(run.path))
    monkeypatch.setenv("MIXTERA_ATTEMPT", "4")
    with DataPlane.open(compose([*collection, *SMALL]), comm=Local(), folder=run) as plane:
        next(iter(plane))
    assert [attempt.number for attempt in History(run.journal).attempts] == [4]


def test_a_run_continues_with_the_index_it_began_with(tmp_path: Path) -> None:
    config = compose([*make_collection(tmp_path), *SMALL])
    run = RunFolder(tmp_path / "run")
    with DataPlane.open(config, comm=Local()) as plane:
        expected = [next(iter(plane)).digests for _ in range(4)]
    with DataPlane.open(config, comm=Local(), folder=run) as plane:
        served = [next(iter(plane)).digests for _ in range(2)]
        state = plane.state_dict()

    rows = [{"text": f"more {i} " * 30, "meta": {"source": "ast", "tags": ["new"], "size": 7}} for i in range(60)]
    (tmp_path / "data" / "0-new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refresh_index(config)
    with DataPlane.open(config, comm=Local(), folder=run) as plane:
        assert plane.config.index.generations
        plane.load_state_dict(state)
        served += [next(iter(plane)).digests for _ in range(2)]
    assert served == expected


def test_a_refused_request_for_another_mixture_is_logged(
    collection: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(tmp_path)
    with DataPlane.open(compose([*collection, *SMALL]), comm=Local(), folder=run) as plane:
        for batch in plane:
            if batch.step == 5:
                write_request(run, MixtureRequest(mixture=MixtureConfig(), chunk=0))
            if batch.step == 6:
                break
    [record] = [record for record in caplog.records if record.name == "mixtera_hpc"]
    assert record.levelno == logging.WARNING
    assert "refused: chunk 0 is planned already" in record.getMessage()


@pytest.mark.parametrize("holdout", ["0", "0.25"])
def test_a_pickled_source_serves_the_same(collection: list[str], holdout: str) -> None:
    source = open_source(compose([*collection, *SMALL, f"query.holdout.fraction={holdout}"]), Local())
    copy = pickle.loads(pickle.dumps(source))
    assert copy.identity() == source.identity()
    assert copy.planner.capacity.tolist() == source.planner.capacity.tolist()
    for domain in range(source.num_domains):
        ours, theirs = (one.streams().documents(domain, 0, 100) for one in (source, copy))
        assert (ours.block.tolist(), ours.row.tolist()) == (theirs.block.tolist(), theirs.row.tolist())


def test_a_process_with_another_tokenizer_is_refused(own_collection: list[str]) -> None:
    """Nodes may have different files at one path, and a file may change before a reading process loads it."""
    source = open_source(compose([*own_collection, *SMALL]), Local())
    pickled = pickle.dumps(source)
    assert pickle.loads(pickled).identity() == source.identity()

    path = Path(str(source.config.dataplane.tokenizer))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="other content in this process than on rank 0"):
        pickle.loads(pickled)
