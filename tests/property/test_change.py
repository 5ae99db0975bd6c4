"""A change of mind takes effect at a named chunk, is written down, and is part of the run from then on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.journal import History
from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, read_decisions, requested_mixture, write_request
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace.list import AttemptSources, verify_run

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
    config: Config, folder: Path, attempt: int, until: int, state: dict[str, Any] | None = None, ask_at: int = -1
) -> dict[str, Any]:
    """Serve up to step `until`; ask for the wish in `folder/wish.json` after step `ask_at`."""
    with DataPlane.open(config, Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        for batch in steps(plane, until):
            plane.record(batch, 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None]))
            if batch.step == ask_at:
                wish = json.loads((folder / "wish.json").read_text())
                write_request(
                    folder / "control",
                    MixtureRequest(mixture=requested_mixture(config.mixture, wish["mixture"]), chunk=wish["chunk"]),
                )
        saved = plane.state_dict()
    assert saved is not None
    return {"json": json.loads(json.dumps(saved["json"])), "arrays": saved["arrays"]}


def steps(plane: DataPlane, until: int) -> Iterator[Any]:
    while plane.next_step < until:
        yield next(iter(plane))


def wishing(tmp_path: Path, name: str, mixture: dict[str, Any], chunk: int | None) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "wish.json").write_text(json.dumps({"mixture": mixture, "chunk": chunk}))
    return folder


def weights(folder: Path, until: int) -> list[list[int]]:
    history = History(RunFolder(folder).journal)
    return [history.plan_of(step).weights.tolist() for step in range(0, until, CHUNK)]


def test_the_next_chunk_not_planned_is_served_from_it_and_the_run_is_proven(config: Config, tmp_path: Path) -> None:
    folder = wishing(tmp_path, "run", STATIC, None)
    serve(config, folder, 1, 24, ask_at=4)
    [change] = read_decisions(RunFolder(folder).decisions)
    served = weights(folder, 24)
    assert change.chunk in (2, 3)
    assert served[change.chunk - 1] == served[0] != served[change.chunk]
    shares = [w / sum(served[change.chunk]) for w in served[change.chunk]]
    assert sorted(shares)[-2:] == [0.25, 0.75]
    assert served[-1] == served[change.chunk]
    assert verify_run(AttemptSources(config), RunFolder(folder), History(RunFolder(folder).journal)).num_steps == 24
    assert '"kind":"mixture"' in (folder / "journal.jsonl").read_text()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 8), st.integers(6, 23), st.sampled_from([STATIC, LEARNED]), st.booleans())
def test_a_run_that_changed_its_mind_goes_on_from_any_step(
    config: Config,
    tmp_path_factory: pytest.TempPathFactory,
    chunk: int,
    stop: int,
    mixture: dict[str, Any],
    forgotten: bool,
) -> None:
    """Also from a checkpoint that is older than the decision (`forgotten`), which only the folder remembers."""
    tmp_path = tmp_path_factory.mktemp("runs")
    whole = wishing(tmp_path, "whole", mixture, chunk)
    serve(config, whole, 1, 30, ask_at=2)
    parts = wishing(tmp_path, "parts", mixture, chunk)
    old = serve(config, parts, 1, 2)
    state = serve(config, parts, 2, stop, old, ask_at=2)
    serve(config, parts, 3, 30, old if forgotten else state)
    assert weights(parts, 30) == weights(whole, 30)
    plans = [History(RunFolder(f).journal) for f in (parts, whole)]
    assert [plans[0].plan_of(s).digest for s in range(30)] == [plans[1].plan_of(s).digest for s in range(30)]


@pytest.mark.parametrize("algorithm", [{"name": "odm"}, LEARNED["algorithm"]])
def test_a_second_wish_for_the_same_chunk_begins_anew(
    config: Config, tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    """A checkpoint between the two knows how far the first had got."""
    second = STATIC | {"kind": "dynamic", "algorithm": algorithm}
    folders = [wishing(tmp_path, name, LEARNED, 6) for name in ("whole", "parts")]
    states = [serve(config, folder, 1, 6, ask_at=1) for folder in folders]
    for folder in folders:
        (folder / "wish.json").write_text(json.dumps({"mixture": second, "chunk": 6}))
    serve(config, folders[0], 2, 30, states[0], ask_at=7)
    serve(config, folders[1], 2, 9, states[1], ask_at=7)
    serve(config, folders[1], 3, 30, states[1])
    assert weights(folders[1], 30) == weights(folders[0], 30)


def test_a_chunk_that_is_planned_is_refused_in_writing_and_nothing_changes(config: Config, tmp_path: Path) -> None:
    folder = wishing(tmp_path, "run", STATIC, 1)
    serve(config, folder, 1, 18, ask_at=7)
    [change] = read_decisions(RunFolder(folder).decisions)
    assert change.refused is not None and "planned already" in change.refused
    assert len({tuple(w) for w in weights(folder, 18)}) == 1


def test_a_request_between_attempts_is_taken_at_the_start(config: Config, tmp_path: Path) -> None:
    folder = wishing(tmp_path, "run", STATIC, None)
    state = serve(config, folder, 1, CHUNK)
    write_request(folder / "control", MixtureRequest(mixture=requested_mixture(config.mixture, STATIC), chunk=None))
    serve(config, folder, 2, 12, state)
    [change] = read_decisions(RunFolder(folder).decisions)
    assert change.chunk <= 2
    assert not (folder / "control" / "mixture.json").exists()


def test_a_damaged_request_is_refused_in_writing(config: Config, tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "mixture.json").write_text('{"chunk": 1, ')
    serve(config, tmp_path, 1, 4)
    [change] = read_decisions(RunFolder(tmp_path).decisions)
    assert change.refused is not None


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"kind": "static", "domains": [{"key": {"source": "ast"}, "weight": 0.5}]}, "sum to 0.5"),
        ({"kind": "static", "unit": "samples", "domains": STATIC["domains"]}, "mixture.unit cannot change"),
        ({"kind": "statc"}, "mixture.kind"),
        ({"weights": {}}, "mixture.weights is not a known key"),
        ({"mixture": STATIC, "query": {"where": "source == 'ast'"}}, "query stands beside mixture"),
        ({"kind": "natural", "group_by": ["package"]}, "mixture.group_by cannot change"),
        (
            {**STATIC, "domains": [{"key": {"source": "ast"}, "weight": 1, "max_epochs": 2}]},
            r"mixture.domains\[0\].max_epochs cannot change",
        ),
    ],
)
def test_what_is_no_mixture_is_refused_before_it_is_asked_for(config: Config, wish: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        requested_mixture(config.mixture, wish)
