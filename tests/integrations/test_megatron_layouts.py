"""Model-parallel layouts on 8 gloo ranks: peers get the same sequences, and the statistics are those of one rank."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc import DataPlane, RunFolder, compose
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.trace.rank_filter import is_served_to

pytest.importorskip("megatron.core")

from .megatron_layouts_program import STEPS, completed_of, loss_of, plain

PROGRAM = Path(__file__).with_name("megatron_layouts_program.py")
NUM_RANKS = 8
WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=3",
    "dataplane.audit=true",
    "query.holdout.fraction=0.2",
    "training.validate_steps=2",
]
MESHES = ["-".join(dims) for dims in itertools.permutations(["dp", "pp", "tp"])] + ["cp-dp-tp"]
MEGATRON = ["pp2-tp2", "cp2-tp2", "pp2-cp2"]

pytestmark = [pytest.mark.integrations, pytest.mark.full]


@pytest.fixture(scope="module")
def overrides(collection: list[str]) -> list[str]:
    return [*collection, *WORDS]


@pytest.fixture(scope="module")
def folder(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the one launch that serves all layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS), "--rdzv-backend", "c10d"]
    command = [sys.executable, *launcher, "--rdzv-endpoint", "localhost:0", str(PROGRAM), str(folder), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """Return what every rank got in every layout."""
    everyone: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    assert len(everyone) == NUM_RANKS
    return everyone


@pytest.fixture(scope="module")
def alone(overrides: list[str]) -> dict[str, Any]:
    """Return the same for one rank."""
    served, tokens = [], []
    with DataPlane.open(compose(overrides)) as plane:
        held_out = plane.held_out()
        for batch in held_out.batches():
            held_out.record(batch, loss_of(batch.tokens[:, 1:], batch.positions, batch.step))
        held_out_losses = domain_losses([held_out.reduce(0)], plane.domain_names, "held_out_loss")
        for batch in plane:
            served.append(batch.digests)
            tokens.append(batch.tokens[:, :-1].tolist())
            plane.record(batch, loss_of(batch.tokens[:, 1:], batch.positions, batch.step))
            if batch.step + 1 == STEPS:
                break
        completed = completed_of(plane)
        return {
            "digests": served,
            "tokens": tokens,
            "statistics": plain(completed),
            "train_losses": domain_losses(completed, plane.domain_names, "train_loss"),
            "held_out": held_out_losses,
        }


@pytest.mark.parametrize("layout", MESHES)
def test_statistics_are_those_of_one_rank(layout: str, results: list[Any], alone: dict[str, Any]) -> None:
    for of_rank in results:
        assert of_rank[layout]["statistics"] == alone["statistics"]


@pytest.mark.parametrize("layout", MEGATRON)
def test_megatron_logs_the_losses_of_one_rank(layout: str, results: list[Any], alone: dict[str, Any]) -> None:
    for of_rank in results:
        assert of_rank[layout]["train_losses"] == alone["train_losses"]


@pytest.mark.parametrize("layout", MESHES)
def test_peers_get_the_same_sequences_and_data_parallel_ranks_others(
    layout: str, results: list[Any], alone: dict[str, Any]
) -> None:
    for of_rank in results:
        first = 4 * of_rank[layout]["dp"]
        positions = list(range(first, first + 4))
        expected = [[positions, [digests[k] for k in positions]] for digests in alone["digests"]]
        assert of_rank[layout]["served"] == expected
    assert sorted(of_rank[layout]["dp"] for of_rank in results) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("layout", MEGATRON)
def test_first_stages_of_megatron_get_the_tokens_of_their_data_parallel_rank(
    layout: str, results: list[Any], alone: dict[str, Any]
) -> None:
    drawing = [of_rank[layout] for of_rank in results if of_rank[layout]["served"]]
    assert len(drawing) == (8 if layout == "cp2-tp2" else 4)
    for of_rank in drawing:
        first = 4 * of_rank["dp"]
        positions = [position for _, rows, _ in of_rank["served"] for position in rows]
        assert positions == list(range(first, first + 4)) * STEPS
        for step, rows, tokens in of_rank["served"]:
            for position, row in zip(rows, tokens, strict=True):
                whole = alone["tokens"][step][position]
                # Megatron gives chunks 0 and 3 of 4 to one context-parallel rank, 1 and 2 to the other.
                halves = [whole[:4] + whole[12:], whole[4:12]]
                assert row in (halves if "cp2" in layout else [whole])


@pytest.mark.parametrize("layout", MEGATRON)
def test_every_validation_of_megatron_has_the_losses_of_one_rank(
    layout: str, results: list[Any], alone: dict[str, Any]
) -> None:
    for of_rank in results:
        assert of_rank[layout]["held_out"] == [alone["held_out"]] * 2


@pytest.mark.parametrize("layout", [*MESHES, *MEGATRON])
def test_trace_names_what_each_rank_got(layout: str, folder: Path, results: list[Any]) -> None:
    attempt = History(RunFolder(folder / layout).journal).attempts[0]
    for rank, of_rank in enumerate(results):
        first = 4 * of_rank[layout]["dp"]
        traced = [p for p in range(8) if is_served_to(rank, attempt, {"rank": attempt.rank_of(0, p)})]
        assert traced == list(range(first, first + 4))
