"""Device meshes of 8 gloo ranks, in every order of their dimensions: peers get the same, and losses count once."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc import DataPlane, compose
from mixtera_hpc.cli.main import main

PROGRAM = Path(__file__).with_name("mesh_program.py")
RANKS = [sys.executable, str(PROGRAM.with_name("forked_ranks.py")), "8"]
SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "dataplane.audit=true"]


def load_program() -> Any:
    spec = importlib.util.spec_from_file_location("mesh_program", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = load_program()
LAYOUTS = ["-".join(dims) for dims in program.MODEL_PARALLEL]


@pytest.fixture(scope="module")
def alone(collection: list[str]) -> dict[str, Any]:
    """Return what a job of one rank is given."""
    with DataPlane.open(compose([*collection, *SMALL])) as plane:
        own: dict[str, Any] = json.loads(json.dumps(program.serve(plane, records=True)))
    return own


@pytest.fixture(scope="module")
def out(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what every rank of every layout was given."""
    folder = tmp_path_factory.mktemp("meshes")
    command = [*RANKS, str(PROGRAM), str(folder), *collection, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def ranks_of(out: Path, layout: str) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = json.loads((out / f"{layout}.json").read_text())
    return ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peers_get_the_same_and_data_parallel_ranks_share_the_batch(
    layout: str, out: Path, alone: dict[str, Any]
) -> None:
    for rank in ranks_of(out, layout):
        own = slice(4 * rank["dp"], 4 * rank["dp"] + 4)
        expected = [[positions[own], digests[own]] for positions, digests in alone["served"]]
        assert rank["served"] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_some_ranks_give_the_statistics_of_one_rank_bit_for_bit(
    layout: str, out: Path, alone: dict[str, Any]
) -> None:
    assert len(alone["statistics"]) == program.STEPS
    for rank in ranks_of(out, layout):
        assert rank["statistics"] == alone["statistics"]


@pytest.mark.parametrize("layout", ["pp-dp-tp", "tp-pp-dp"])
@pytest.mark.parametrize("rank", [1, 6])
def test_trace_names_what_a_rank_was_given(
    layout: str, rank: int, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["trace", str(out / layout), "--step", "3", "--rank", str(rank), "--json"])

    printed = capsys.readouterr()
    assert code == 0, printed.err
    traced = sorted(json.loads(line)["position"] for line in printed.out.splitlines())
    positions, _ = ranks_of(out, layout)[rank]["served"][3]
    assert traced == positions
