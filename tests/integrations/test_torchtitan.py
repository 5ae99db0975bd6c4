"""torchtitan's Trainer on a data plane: the conformance suite, tensor parallelism, and what is refused."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc import RunFolder
from mixtera_hpc.cli.main import main
from mixtera_hpc.dataplane.recording.journal import read_lines

from .conformance import LEARNING_STEPS, Runs, TrainerConformance, assert_verified, what_the_trainer_logged
from .launching import REPOSITORY, Example
from .served_stream import read_records, trained_digests

PYTHON = REPOSITORY / ".venv-torchtitan/bin/python"
"""torchtitan needs older versions of datasets and fsspec than Lightning does, so it has an environment of its own."""

EXAMPLE = REPOSITORY / "examples/trainers/torchtitan.py"
TENSOR_PARALLEL = Path(__file__).with_name("torchtitan_tensor_parallel.py")
REFUSALS = Path(__file__).with_name("torchtitan_checks.py")

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-torchtitan: run make integrations"),
]


class TestTorchtitan(TrainerConformance):
    example = Example(script="torchtitan.py", python=str(PYTHON))


@pytest.mark.full
def test_ranks_of_a_tensor_parallel_group_serve_the_bare_stream(collection: list[str], tmp_path: Path) -> None:
    runs = Runs(Example(script=str(TENSOR_PARALLEL), python=str(PYTHON)), collection, tmp_path)
    out = runs.split("torchrun", 1)

    assert trained_digests(read_records(out)) == runs.stream.digests
    assert_verified(out)


@pytest.mark.full
def test_losses_of_a_tensor_parallel_group_reach_the_mixing_algorithm(collection: list[str], tmp_path: Path) -> None:
    runs = Runs(Example(script=str(TENSOR_PARALLEL), python=str(PYTHON)), collection, tmp_path)
    out = runs.new_folder("learning")
    runs.launch("torchrun", out, "--steps", LEARNING_STEPS, learning=True)

    weights = [line["weights"] for line in read_lines(RunFolder(out).journal) if line["kind"] == "chunk"]
    assert weights[0] != weights[-1]
    assert b"held_out_loss/" in what_the_trainer_logged(out)


def test_a_run_continues_after_edits_of_all_kinds(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine" / "run"
    before = [*collection, "dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.audit=true"]
    train(out, 4, before)
    edits = ["--change-seq-len", "32", "--change-batch-size", "dataplane.global_batch_size=12"]
    assert main(["resume", str(out), *edits, "--drop", "source == 'ast'", "--skip-steps", "4..5"]) == 0
    refused = train(out, 8, before, code=1)
    assert "seq_len was changed to 32, is 16" in refused
    train(out, 8, [*before, "dataplane.seq_len=32", "dataplane.global_batch_size=12"])

    capsys.readouterr()
    assert main(["trace", str(out), "--verify", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["num_steps"], verdict["num_sequences"]) == (8, 4 * 8 + 4 * 12)


def train(out: Path, steps: int, overrides: list[str], code: int = 0) -> str:
    """Run the example in one process; return what it printed."""
    command = [str(PYTHON), str(EXAMPLE), "--out", str(out), "--steps", str(steps), "--overrides", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checked(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("refusals")
    sizes = ["dataplane.seq_len=16", "dataplane.global_batch_size=8"]
    command = [str(PYTHON), str(REFUSALS), str(folder / "run"), *collection, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


EXPECTED = {
    "nothing": "",
    "global batch": "one multiple of 4",
    "no accumulation": "one multiple of 4",
    "local batch": "one multiple of 3",
    "sequence length": "Set both to the same number of tokens",
    "vocabulary": "Set dataplane.tokenizer to that of the model",
    "loss": "Set loss=PerTokenCrossEntropy.Config(...)",
    "validator": "Set validator=HeldOutValidator.Config(...)",
    "validation steps": "add training.validate_steps=3 to dataloader.overrides",
    "nothing held out": "Set query.holdout.fraction",
    "backend": "Set it to spmd_types or partial_dtensor",
    "load balancer": "Set it to headtail, or to None",
    "dataset": "select the data with dataloader.overrides",
    "unit": "Set mixture.unit=tokens",
    "loss weights": "loss_weight is 0.25, but TitanTrainer does not multiply the loss with it",
    "trainer": "Use TitanTrainer.Config instead of Trainer.Config",
}


@pytest.mark.parametrize("situation", EXPECTED)
def test_a_wrong_configuration_is_refused_with_the_cure(situation: str, checked: dict[str, Any]) -> None:
    message = checked["refusals"][situation]
    assert EXPECTED[situation] in message
    assert bool(message) == bool(EXPECTED[situation])


def test_the_loss_and_its_gradient_are_those_of_torchtitan(checked: dict[str, Any]) -> None:
    assert max(checked["losses"].values()) < 1e-6


def test_losses_of_chunks_become_those_of_micro_batches(checked: dict[str, Any]) -> None:
    assert checked["micro_batches"] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_inputs_begin_a_document_at_position_0_and_ignore_masked_labels(checked: dict[str, Any]) -> None:
    assert checked["inputs"] == {
        "input": [[0, 1, 2, 3, 4]],
        "positions": [[0, 1, 0, 1, 2]],
        "labels": [[1, 2, -100, 4, 5]],
    }


def test_context_parallel_ranks_record_the_tokens_that_torch_gives_them(checked: dict[str, Any]) -> None:
    tokens = checked["context_parallel"]
    assert tokens["recorded"] == tokens["torch"]
