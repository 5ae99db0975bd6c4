"""A mixture request takes effect at a named chunk, is recorded, and is part of the run from then on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, read_decisions, requested_mixture, write_request
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

STATIC = {
    "kind": "static",
    "domains": [{"key": {"source": "ast"}, "weight": 0.75}, {"key": {"source": "enum"}, "weight": 0.25}],
}
LEARNED = {"kind": "dynamic", "group_by": ["source"], "algorithm": {"name": "ado", "warmup": 3, "refit_interval": 3}}
CHUNK = 3


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    small = ["dataplane.seq_len=16", "dataplane.global_batch_size=6", f"dataplane.chunk_steps={CHUNK}"]
    return compose([*collection, *small, "dataplane.audit=true"])


def serve(
    config: Config, folder: Path, attempt: int, until: int, state: dict[str, Any] | None = None, request_at: int = -1
) -> dict[str, Any]:
    """Serve up to step `until`; write the request in `folder/request.json` after step `request_at`."""
    with DataPlane.open(config, Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        for batch in steps(plane, until):
            plane.record(batch, 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None]))
            if batch.step == request_at:
                written = json.loads((folder / "request.json").read_text())
                mixture = requested_mixture(config.mixture, written["mixture"])
                write_request(RunFolder(folder), MixtureRequest(mixture=mixture, chunk=written["chunk"]))
        saved = plane.state_dict()
    assert saved is not None
    return saved


def steps(plane: DataPlane, until: int) -> Iterator[Any]:
    while plane.next_step < until:
        yield next(iter(plane))


def folder_with_request(tmp_path: Path, name: str, mixture: dict[str, Any], chunk: int | None) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"mixture": mixture, "chunk": chunk}))
    return folder


def weights(folder: Path, until: int) -> list[list[int]]:
    history = History(RunFolder(folder).journal)
    return [history.plan_of(step).weights.tolist() for step in range(0, until, CHUNK)]


def test_the_next_unplanned_chunk_is_served_from_the_request_and_the_run_is_proven(
    config: Config, tmp_path: Path
) -> None:
    folder = folder_with_request(tmp_path, "run", STATIC, None)
    serve(config, folder, 1, 24, request_at=4)
    [decision] = read_decisions(RunFolder(folder).decisions)
    served = weights(folder, 24)
    assert decision.chunk in (2, 3)
    assert served[decision.chunk - 1] == served[0] != served[decision.chunk]
    shares = [w / sum(served[decision.chunk]) for w in served[decision.chunk]]
    assert sorted(shares)[-2:] == [0.25, 0.75]
    assert served[-1] == served[decision.chunk]
    assert verify_run(ServedRun(RunFolder(folder), config)).num_steps == 24
    assert '"kind":"mixture"' in (folder / "journal.jsonl").read_text()


@whole_runs(15)
@given(st.integers(4, 8), st.integers(6, 23), st.sampled_from([STATIC, LEARNED]), st.booleans())
def test_a_run_with_a_request_continues_from_any_step(
    config: Config,
    tmp_path_factory: pytest.TempPathFactory,
    chunk: int,
    stop: int,
    mixture: dict[str, Any],
    from_old: bool,
) -> None:
    """Also from a checkpoint older than the decision (`from_old`): then only the folder records the decision."""
    tmp_path = tmp_path_factory.mktemp("runs")
    whole = folder_with_request(tmp_path, "whole", mixture, chunk)
    serve(config, whole, 1, 30, request_at=2)
    parts = folder_with_request(tmp_path, "parts", mixture, chunk)
    old = serve(config, parts, 1, 2)
    state = serve(config, parts, 2, stop, old, request_at=2)
    serve(config, parts, 3, 30, old if from_old else state)
    assert weights(parts, 30) == weights(whole, 30)
    plans = [History(RunFolder(f).journal) for f in (parts, whole)]
    assert [plans[0].plan_of(s).digest for s in range(30)] == [plans[1].plan_of(s).digest for s in range(30)]


@pytest.mark.parametrize("algorithm", [{"name": "odm"}, LEARNED["algorithm"]])
def test_a_second_request_for_the_same_chunk_starts_a_new_mixer(
    config: Config, tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    """A checkpoint between the two requests holds the state of the first mixer, which must not be used."""
    second = STATIC | {"kind": "dynamic", "algorithm": algorithm}
    folders = [folder_with_request(tmp_path, name, LEARNED, 6) for name in ("whole", "parts")]
    states = [serve(config, folder, 1, 6, request_at=1) for folder in folders]
    for folder in folders:
        (folder / "request.json").write_text(json.dumps({"mixture": second, "chunk": 6}))
    serve(config, folders[0], 2, 30, states[0], request_at=7)
    serve(config, folders[1], 2, 9, states[1], request_at=7)
    serve(config, folders[1], 3, 30, states[1])
    assert weights(folders[1], 30) == weights(folders[0], 30)


def test_a_request_for_a_planned_chunk_is_recorded_as_refused_and_changes_nothing(
    config: Config, tmp_path: Path
) -> None:
    folder = folder_with_request(tmp_path, "run", STATIC, 1)
    serve(config, folder, 1, 18, request_at=7)
    [decision] = read_decisions(RunFolder(folder).decisions)
    assert decision.refused is not None and "planned already" in decision.refused
    assert len({tuple(w) for w in weights(folder, 18)}) == 1


def test_a_request_between_attempts_takes_effect_when_the_run_continues(config: Config, tmp_path: Path) -> None:
    folder = folder_with_request(tmp_path, "run", STATIC, None)
    state = serve(config, folder, 1, CHUNK)
    write_request(RunFolder(folder), MixtureRequest(mixture=requested_mixture(config.mixture, STATIC), chunk=None))
    serve(config, folder, 2, 12, state)
    [decision] = read_decisions(RunFolder(folder).decisions)
    assert decision.chunk <= 2
    assert not (folder / "control" / "mixture.json").exists()


def test_a_damaged_request_is_recorded_as_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "mixture.json").write_text('{"chunk": 1, ')
    serve(config, tmp_path, 1, 4)
    [decision] = read_decisions(RunFolder(tmp_path).decisions)
    assert decision.refused is not None


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"kind": "static", "domains": [{"key": {"source": "ast"}, "weight": 0.5}]}, "sum to 0.5"),
        ({"kind": "static", "unit": "samples", "domains": STATIC["domains"]}, "mixture.unit cannot change"),
        ({"kind": "statc"}, "mixture.kind"),
        ({"weights": {}}, "mixture.weights is not a known key"),
        (
            {"mixture": STATIC, "query": {"where": "source == 'ast'"}},
            "Only `mixture` can be changed in an existing run. Remove query",
        ),
        ({"kind": "natural", "group_by": ["package"]}, "mixture.group_by cannot change"),
        (
            {**STATIC, "domains": [{"key": {"source": "ast"}, "weight": 1, "max_epochs": 2}]},
            r"mixture.domains\[0\].max_epochs cannot change",
        ),
    ],
)
def test_an_invalid_mixture_is_refused_before_it_is_requested(
    config: Config, written: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        requested_mixture(config.mixture, written)
