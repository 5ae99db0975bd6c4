"""The Hugging Face `Trainer` on a data plane: the conformance suite, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conformance import EVERY_LAUNCH, NUM_STEPS, Runs, TrainerConformance, full_unless
from .launching import Example

ARGUMENTS = Path(__file__).with_name("huggingface_arguments_program.py")
PLANE_TRAINER = "With the Hugging Face Trainer, use mixtera_hpc.integrations.transformers.PlaneTrainer"


class TestHuggingFace(TrainerConformance):
    example = Example(script="huggingface.py")

    @pytest.mark.parametrize(("launcher", "accumulate"), full_unless(("torchrun", 1), EVERY_LAUNCH))
    def test_gradients_depend_neither_on_the_ranks_nor_on_micro_batches(
        self, launcher: str, accumulate: int, runs: Runs
    ) -> None:
        """Adam hides a wrong scale of the loss, so the norms are compared, and the losses that the Trainer logs."""
        expected = logged_values(runs.whole("python", 1))
        trained = logged_values(runs.split(launcher, accumulate))

        assert len(expected["grad_norm"]) == NUM_STEPS
        for name, values in expected.items():
            np.testing.assert_allclose(trained[name], values, rtol=1e-4, err_msg=name)


def logged_values(out: Path) -> dict[str, list[float]]:
    """Return the loss and the norm of the gradients of every step, and the losses on held-out data."""
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "grad_norm", "eval_loss")
    return {name: [entry[name] for entry in history if name in entry] for name in names}


def answers(collection: list[str], out: Path, ranks: int) -> list[dict[str, Any]]:
    """Return what every rank was answered with in each case."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    words = ["dataplane.seq_len=16", f"dataplane.global_batch_size={4 * ranks}", "dataplane.chunk_steps=2"]
    command = [sys.executable, *launcher, str(ARGUMENTS), str(out), *collection, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]


@pytest.fixture(scope="module")
def alone(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    (answer,) = answers(collection, tmp_path_factory.mktemp("alone"), 1)
    return answer


@pytest.mark.integrations
@pytest.mark.parametrize("name", ["accumulation", "ramp", "dispatch_batches=False", "held out"])
def test_settings_that_fit_are_trained_with(name: str, alone: dict[str, str]) -> None:
    assert alone[name] == "trained"


@pytest.mark.integrations
@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("resume with dropout", "same losses"),
        ("auxiliary loss", "added once"),
        ("own evaluation", "evaluated"),
    ],
)
def test_training_is_as_with_a_dataset_of_hugging_face(name: str, answer: str, alone: dict[str, str]) -> None:
    assert alone[name] == answer


@pytest.mark.integrations
@pytest.mark.parametrize(
    ("name", "problem", "cure"),
    [
        (
            "batch size",
            "per_device_train_batch_size=2 × gradient_accumulation_steps=3 × 1 data-parallel rank = 6 sequences",
            "Make both numbers equal",
        ),
        (
            "uneven ramp",
            "num_micro_batches=2 does not divide the 5 sequences",
            "dataplane.batch_schedule[0].size must be micro-batch size",
        ),
        ("few positions", "max_position_embeddings is 8", "Raise max_position_embeddings"),
        ("workers", "dataloader_num_workers is 2", "dataplane.workers"),
        ("max_steps", "max_steps is -1", "Set max_steps"),
        ("split_batches", "split_batches is True", "Leave split_batches out"),
        ("dispatch_batches", "dispatch_batches is True", "Leave dispatch_batches out"),
        ("group_by_length", "train_sampling_strategy is 'group_by_length'", "Leave it at 'random'"),
        ("data_seed", "data_seed is 3", "dataplane.seed"),
        ("auto_find_batch_size", "auto_find_batch_size is True", "raise gradient_accumulation_steps"),
        ("label_smoothing", "label_smoothing_factor is 0.1", "override token_losses()"),
        ("average_tokens", "average_tokens_across_devices is False", "Leave it at True"),
        ("train_dataset", "got a train_dataset", "Leave it out"),
        ("compute_loss_func", "got a compute_loss_func", "Override PlaneTrainer.token_losses()"),
        ("compute_metrics", "got compute_metrics", "pass an eval_dataset"),
        ("nothing held out", "query.holdout.fraction is 0", "Set query.holdout.fraction"),
        ("vocabulary", "vocab_size is 100, but the tokenizer of the data has 512", "dataplane.tokenizer"),
        ("samples", "mixture.unit is samples", "Set mixture.unit=tokens"),
        ("twice", "begins at step 0, but the data plane at step 2", "resume_from_checkpoint=True"),
        ("foreign checkpoint", "has no dataplane.npz", "that a PlaneTrainer has written"),
        ("plain", "wrapped the loader of a PlaneDataset", PLANE_TRAINER),
        ("plain with workers", "PlaneDataset", PLANE_TRAINER),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, problem: str, cure: str, alone: dict[str, str]) -> None:
    assert alone[name].startswith("ConfigError: ")
    assert problem in alone[name]
    assert cure in alone[name]


@pytest.mark.integrations
def test_balancing_is_of_use_only_if_the_model_knows_the_documents(alone: dict[str, str]) -> None:
    assert "dataplane.balance=attention is of no use: PlaneTrainer.model_inputs() gives" in alone["balance"]
    assert alone["balance with own inputs"] == ""


@pytest.mark.integrations
def test_two_ranks_that_do_not_share_a_batch_are_refused(collection: list[str], tmp_path: Path) -> None:
    both = answers(collection, tmp_path, 2)

    assert sorted(answer["rank"] for answer in both) == [0, 1]
    for answer in both:
        assert PLANE_TRAINER in answer["plain"]
        assert PLANE_TRAINER in answer["plain with dispatch_batches=False"]
        assert "Accelerate sees 1 rank, but the data plane has 2 data-parallel ranks" in answer["one rank each"]
        assert "set use_cpu=True" in answer["one rank each"]
