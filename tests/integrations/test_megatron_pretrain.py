"""`MegatronPretraining` in a loop that calls the functions of Megatron-LM's `training` module in its order.

Megatron-LM itself needs GPUs. Its groups, its `RerunDataIterator` and the way in which it asks for data, saves and
leaves are those of megatron-core and of `megatron/training/training.py`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mixtera_hpc import RunFolder, compose
from mixtera_hpc.cli.main import main
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)

from mixtera_hpc.integrations.megatron import BatchFormat, MegatronData
from mixtera_hpc.integrations.megatron.batch_format import megatron_batch
from mixtera_hpc.integrations.megatron.pretraining import STATE_FILE, MegatronPretraining

pytestmark = pytest.mark.integrations

WORDS = [
    "dataplane.seq_len=16",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=2",
    "query.holdout.fraction=0.2",
    "training.validate_steps=2",
]


CONTINUED = {"iteration": 3, "consumed_train_samples": 24}
"""Arguments of Megatron-LM after it has loaded the checkpoint of three steps with 8 sequences each."""


class Training:
    """The part of `megatron.training.training` that concerns data."""

    __name__ = "megatron.training.training"

    def __init__(self, folder: Path, **args: Any) -> None:
        self.args = SimpleNamespace(
            **{
                "dataloader_type": "external",
                "seq_length": 16,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "rampup_batch_size": None,
                "create_attention_mask_in_dataloader": False,
                "reset_attention_mask": False,
                "reset_position_ids": False,
                "iteration": 0,
                "consumed_train_samples": 0,
                "train_iters": 6,
                "eval_iters": 2,
                "eval_interval": 3,
                "save": str(folder),
                "dataloader_save": str(folder),
                "load": str(folder),
                "save_interval": 1000,
                "exit_interval": None,
                **args,
            }
        )
        self.served: list[tuple[int, list[int], list[list[int]]]] = []
        self.logged: dict[str, list[int]] = {}
        self.saved_at: list[int] = []

    @property
    def num_micro_batches(self) -> int:
        return int(self.args.global_batch_size // self.args.micro_batch_size)

    def get_args(self) -> SimpleNamespace:
        return self.args

    def get_tensorboard_writer(self) -> "Training":
        return self

    def get_wandb_writer(self) -> None:
        return None

    def add_scalar(self, name: str, value: float, iteration: int) -> None:
        self.logged.setdefault(name, []).append(iteration)

    def train_step(self, forward_step: Callable[..., None], data_iterator: RerunDataIterator) -> None:
        data_iterator.advance()
        for _ in range(self.num_micro_batches):
            forward_step(data_iterator)

    def evaluate_and_print_results(self, forward_step: Callable[..., None], data_iterator: RerunDataIterator) -> None:
        for _ in range(self.num_micro_batches * self.args.eval_iters):
            forward_step(data_iterator)

    def save_checkpoint(self, iteration: int, train_data_iterator: RerunDataIterator) -> None:
        path = Path(self.args.dataloader_save) / f"iter_{iteration:07d}" / "mp_rank_00" / STATE_FILE
        path.parent.mkdir(parents=True)
        torch.save({"dataloader_state_dict": train_data_iterator.iterable.save_state()}, path)
        self.saved_at.append(iteration)

    def pretrain(self, provider: Any, forward_step: Callable[..., None]) -> None:
        assert provider.is_distributed
        train, valid, _ = (RerunDataIterator(data) if data else None for data in provider((48, 16, 16)))
        iteration = self.args.iteration
        while iteration < self.args.train_iters:
            self.train_step(forward_step, train)
            iteration += 1
            if self.args.eval_iters and iteration % self.args.eval_interval == 0:
                self.evaluate_and_print_results(forward_step, valid)
            is_due = iteration % self.args.save_interval == 0
            if is_due:
                self.save_checkpoint(iteration, train)
            if self.args.exit_interval and iteration % self.args.exit_interval == 0:
                if not is_due:
                    self.save_checkpoint(iteration, train)
                break


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    initialize_rerun_state_machine()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS])


def loss_of(batch: dict[str, Any]) -> torch.Tensor:
    return 1.0 + (batch["labels"] % 97) / 3.0


def run(training: Training, config: Config, folder: Path, during: Callable[[Any, int], None] | None = None) -> None:
    """Pretrain; `during` is called for every micro-batch with the iterator and the step."""
    with MegatronPretraining(config, RunFolder(folder), training) as pretraining:

        def forward_step(data_iterator: RerunDataIterator) -> None:
            batch = next(data_iterator)
            step = int(batch["step"])
            # Held-out batches have negative steps.
            if step >= 0:
                training.served.append((step, batch["positions"].tolist(), batch["tokens"].tolist()))
                if during is not None:
                    during(data_iterator, step)
            pretraining.record(data_iterator, loss_of(batch))

        training.pretrain(pretraining.datasets_provider, forward_step)


def test_every_step_has_its_micro_batches_and_metrics_go_to_megatrons_log(config: Config, tmp_path: Path) -> None:
    training = Training(tmp_path)
    before = training.train_step
    run(training, config, tmp_path / "run")

    steps = [step for step, _, _ in training.served]
    assert steps == [step for step in range(6) for _ in range(4)]
    assert [positions for _, positions, _ in training.served[:4]] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    prefixes = {name.partition("/")[0] for name in training.logged}
    assert prefixes == {"train_loss", "held_out_loss", "weight"}
    held_out = next(name for name in training.logged if name.startswith("held_out_loss"))
    assert training.logged[held_out] == [3, 6]
    assert training.train_step == before


def test_a_checkpoint_continues_with_the_next_step(config: Config, tmp_path: Path) -> None:
    whole = Training(tmp_path / "whole")
    run(whole, config, tmp_path / "run")

    first = Training(tmp_path / "two", train_iters=4, save_interval=3)
    run(first, config, tmp_path / "run_in_two")
    second = Training(tmp_path / "two", **CONTINUED)
    run(second, config, tmp_path / "run_in_two")
    assert first.served[:12] + second.served == whole.served


EDITS: dict[str, tuple[list[str], dict[str, Any], dict[str, Any], int]] = {
    "length": (["--change-seq-len", "32"], {"seq_len": 32}, {"seq_length": 32}, 8),
    "batch size": (
        ["--change-batch-size", "dataplane.global_batch_size=12"],
        {"global_batch_size": 12},
        {"global_batch_size": 12},
        12,
    ),
    "drop": (["--drop", "source == 'ast'"], {}, {}, 8),
    "skip": (["--skip-steps", "3..4"], {}, {}, 8),
}
"""Words of `resume`, what they change in the configuration and in Megatron's arguments, and the sequences of a step."""


@pytest.mark.parametrize("name", EDITS)
def test_a_run_continues_after_an_edit(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words, changes, args, size = EDITS[name]
    folder = tmp_path / "mine" / "run"
    audited = replace(config, dataplane=replace(config.dataplane, audit=True))
    run(Training(tmp_path, train_iters=3, save_interval=3), audited, folder)
    assert main(["resume", str(folder), *words]) == 0
    if changes:
        with pytest.raises(ConfigError, match=r"Megatron's arguments do not fit|opened with other settings"):
            run(Training(tmp_path, **CONTINUED, **args), audited, folder)

    edited = replace(audited, dataplane=replace(audited.dataplane, **changes))
    second = Training(tmp_path, **CONTINUED, **args)
    run(second, edited, folder)
    assert sorted({step for step, _, _ in second.served}) == [3, 4, 5]
    capsys.readouterr()
    assert main(["trace", str(folder), "--verify", "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["num_steps"], verdict["num_sequences"]) == (6, 3 * 8 + 3 * size)


def test_a_checkpoint_behind_an_edit_is_refused(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "run"
    run(Training(tmp_path, train_iters=3, save_interval=3), config, folder)
    assert main(["resume", str(folder), "--skip-steps", "1..2"]) == 0
    with pytest.raises(ConfigError, match="state is of step 3, but an edit made the run continue from step 1"):
        run(Training(tmp_path, **CONTINUED), config, folder)


def test_a_state_of_another_step_is_refused(config: Config, tmp_path: Path) -> None:
    run(Training(tmp_path, train_iters=3, save_interval=3), config, tmp_path / "run")
    (tmp_path / "iter_0000003").rename(tmp_path / "iter_0000004")
    with pytest.raises(ConfigError, match="continues after 4 iterations, but the state of the data belongs after 3"):
        run(Training(tmp_path, iteration=4, consumed_train_samples=32), config, tmp_path / "run")


def test_a_stop_file_ends_the_training_after_a_checkpoint(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    training = Training(tmp_path, train_iters=100)

    def stop(data_iterator: Any, step: int) -> None:
        if step == 2:
            folder.control.mkdir(exist_ok=True)
            folder.stop_request.touch()

    run(training, config, folder.path, stop)
    assert training.saved_at == [training.served[-1][0] + 1]
    assert 3 <= training.saved_at[0] <= 6


def test_a_save_file_saves_once_and_the_training_continues(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    training = Training(tmp_path, train_iters=8)

    def save(data_iterator: Any, step: int) -> None:
        if step == 2 and not training.saved_at:
            folder.control.mkdir(exist_ok=True)
            folder.save_request.touch()

    run(training, config, folder.path, save)
    assert len(training.saved_at) == 1
    assert training.served[-1][0] == 7
    assert training.args.save_interval == 1000


def test_micro_batches_that_megatron_computes_again_count_once(config: Config, tmp_path: Path) -> None:
    training = Training(tmp_path)
    original = training.train_step

    def train_twice(forward_step: Any, data_iterator: RerunDataIterator) -> None:
        original(forward_step, data_iterator)
        data_iterator.rewind()
        for _ in range(4):
            forward_step(data_iterator)

    training.train_step = train_twice  # type: ignore[method-assign]
    state_machine = get_rerun_state_machine()
    state_machine.set_mode(RerunMode.VALIDATE_RESULTS)
    run(training, config, tmp_path / "run")
    assert training.served[:4] == training.served[4:8]
    assert training.served[-1][0] == 5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dataloader_type": "cyclic"}, "--dataloader-type must be external"),
        ({"seq_length": 32}, "--seq-length must be dataplane.seq_len=16"),
        ({"global_batch_size": 16}, "--global-batch-size must be dataplane.global_batch_size=8"),
        ({"rampup_batch_size": [2, 2, 100]}, "--rampup-batch-size is not supported"),
        ({"iterations_to_skip": [3]}, "--iterations-to-skip is not supported"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets is not supported"),
        ({"eval_iters": 3}, "--eval-iters must be at most training.validate_steps=2"),
        ({"dataloader_save": None}, "--dataloader-save must be set where --save is"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide the 8 sequences"),
        ({"iteration": 3, "consumed_train_samples": 24}, "holds no state of the data plane"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    config: Config, tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(Training(tmp_path, **args), config, tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "is_warned"),
    [
        ({}, True),
        ({"reset_attention_mask": True}, True),
        ({"reset_attention_mask": True, "create_attention_mask_in_dataloader": True}, False),
        ({"rank": 1}, False),
    ],
)
def test_balancing_is_of_use_only_with_masks_between_documents(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, args: dict[str, Any], is_warned: bool
) -> None:
    balanced = replace(config, dataplane=replace(config.dataplane, balance="attention"))
    run(Training(tmp_path, train_iters=1, **args), balanced, tmp_path / "run")
    assert ("dataplane.balance=attention is of no use: Megatron's attention" in caplog.text) == is_warned


def test_a_fork_without_the_functions_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no train_step and no evaluate_and_print_results"):
        MegatronPretraining(config, RunFolder(tmp_path), SimpleNamespace(__name__="fork", save_checkpoint=None))


def test_calls_in_the_wrong_place_are_refused(config: Config) -> None:
    with MegatronData.open(config, BatchFormat(micro_batch_size=4)) as data:
        iterator = data.train_iterator()
        with pytest.raises(ConfigError, match=r"Call MegatronData\.begin_step"):
            next(iterator)
        assert data.begin_step()
        with pytest.raises(ValueError, match="more often than micro-batches were drawn"):
            data.record(iterator, torch.zeros(4, 16))
        batches = [next(iterator), next(iterator)]
        with pytest.raises(ConfigError, match="more than the 2 micro-batches of a step"):
            next(iterator)
        with pytest.raises(ConfigError, match=r"Call MegatronData.prepare_save\(\) on every rank"):
            iterator.save_state()
        with pytest.raises(TypeError, match="is_distributed = True"):
            data.record(None, loss_of(batches[0]))
        for batch in batches:
            data.record(iterator, loss_of(batch))


def test_masks_and_positions_follow_the_documents() -> None:
    form = BatchFormat(
        micro_batch_size=1,
        create_attention_mask_in_dataloader=True,
        reset_attention_mask=True,
        reset_position_ids=True,
    )
    raw = {
        "tokens": torch.arange(10, 17)[None],
        "loss_mask": torch.tensor([[True, True, False, True, True, False]]),
        "document_ids": torch.tensor([[0, 0, 0, 1, 1, 1, 2]], dtype=torch.int32),
        "positions": torch.tensor([5]),
        "step": torch.tensor(7),
    }
    batch = megatron_batch(raw, form)
    assert batch["tokens"].tolist() == [[10, 11, 12, 13, 14, 15]]
    assert batch["labels"].tolist() == [[11, 12, 13, 14, 15, 16]]
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    attended = [row.nonzero()[:, 0].tolist() for row in ~batch["attention_mask"][0, 0]]
    assert attended == [[0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5]]

    plain = megatron_batch(raw, BatchFormat(micro_batch_size=1, create_attention_mask_in_dataloader=True))
    assert plain["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert torch.equal(plain["attention_mask"][0, 0], torch.ones(6, 6, dtype=torch.bool).triu(1))
