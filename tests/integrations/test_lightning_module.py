"""`PlaneDataModule` in one process: what users set up in other ways than the example, and what they get wrong."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtera_hpc import ConfigError, DataPlane, MixtureError, PlaneDataset, RunFolder, compose

pl = pytest.importorskip("lightning.pytorch", reason="install mixtera-hpc[integrations]")
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from mixtera_hpc.integrations.lightning import PlaneDataModule  # noqa: E402

pytestmark = pytest.mark.integrations

Served = list[tuple[int, list[int]]]
"""Step and positions of every micro-batch."""

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2"]
HELD_OUT = ["query.holdout.fraction=0.2", "training.validate_steps=2"]
ADO = ["mixture=ado", "mixture.group_by=[source]", "dataplane.chunk_steps=1"]


class Model(pl.LightningModule):
    """A bigram model that remembers what it was trained on."""

    def __init__(self, at_step: dict[int, Callable[[Any], Any]] | None = None) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Embedding(512, 4), torch.nn.Linear(4, 512))
        self.served: Served = []
        self.validated: list[int] = []
        self.at_step = at_step or {}
        self.gives_losses = True

    def losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        tokens = batch["tokens"]
        logits = self.network(tokens[:, :-1]).transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        step = int(batch["step"])
        self.served.append((step, batch["positions"].tolist()))
        losses = self.losses(batch)
        if step in self.at_step:
            self.at_step[step](self)
        return {"loss": losses.mean(), **({"loss_per_token": losses} if self.gives_losses else {})}

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        self.validated.append(len(batch["positions"]))
        return {"loss_per_token": self.losses(batch)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Bench:
    """Trains in one folder."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self.overrides = [*overrides, *SMALL]
        self.folder = folder

    def data(self, *overrides: str, with_folder: bool = True) -> PlaneDataModule:
        folder = RunFolder(self.folder / "run") if with_folder else None
        return PlaneDataModule(compose([*self.overrides, *overrides]), folder=folder)

    def trainer(self, **settings: Any) -> Any:
        defaults = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        quiet = {"default_root_dir": self.folder, "accelerator": "cpu", "num_sanity_val_steps": 0}
        # Lightning would initialise MPI, to find out whether it was started by mpiexec.
        settings.setdefault("plugins", [LightningEnvironment()])
        settings.setdefault("callbacks", [ModelCheckpoint(self.folder / "checkpoints", save_last=True)])
        return pl.Trainer(**defaults | quiet | settings)

    def fit(self, model: Any = None, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
        """Train; return the model."""
        model = model or Model()
        self.trainer(**settings).fit(model, datamodule=data or self.data(), ckpt_path=ckpt_path)
        return model


@pytest.fixture
def bench(collection: list[str], tmp_path: Path) -> Bench:
    return Bench(collection, tmp_path)


@pytest.fixture(autouse=True)
def _restored_handlers() -> Iterator[None]:
    """Check that the handlers of stop signals are those from before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == before


def micro_batches(first: int, end: int, accumulate: int = 1) -> Served:
    size = 8 // accumulate
    return [(step, list(range(k, k + size))) for step in range(first, end) for k in range(0, 8, size)]


# Lightning's own way with loaders


def test_a_loader_without_the_data_module_works_although_lightning_fetches_ahead(bench: Bench) -> None:
    class OwnModel(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = self.losses(batch)
            self.served.append((int(batch["step"]), batch["positions"].tolist()))
            plane.record(batch, losses)
            return losses.mean()

    model = OwnModel()
    with DataPlane.open(compose([*bench.overrides, *ADO])) as plane:
        bench.trainer(max_steps=6, callbacks=[]).fit(model, DataLoader(PlaneDataset(plane), batch_size=None))
        assert [statistics.step for statistics in plane.completed_statistics()] == list(range(5))
    assert model.served == micro_batches(0, 6)


@pytest.mark.parametrize("limits", [{"max_steps": 6}, {"max_epochs": 1, "limit_train_batches": 6}])
def test_batches_need_not_be_fetched_ahead(bench: Bench, limits: dict[str, int]) -> None:
    data = bench.data()
    next_steps: list[int] = []
    model = bench.fit(Model({k: lambda _: next_steps.append(data.plane.next_step) for k in range(6)}), data, **limits)
    assert model.served == micro_batches(0, 6)
    assert next_steps == list(range(1, 7))


def test_micro_batches_grow_with_a_ramp(bench: Bench) -> None:
    data = bench.data("dataplane.batch_schedule=[{start: 3, size: 12}]")
    model = bench.fit(data=data, max_steps=6, accumulate_grad_batches=2)
    grown = [(step, list(range(k, k + 6))) for step in range(3, 6) for k in (0, 6)]
    assert model.served == micro_batches(0, 3, 2) + grown
    with pytest.raises(
        ConfigError, match=r"(?s)accumulate_grad_batches=2 does not divide.*batch_schedule\[0\]\.size must"
    ):
        bench.fit(data=bench.data("dataplane.batch_schedule=[{start: 3, size: 9}]"), accumulate_grad_batches=2)


def test_epochs_continue_the_stream_and_resume_inside_of_one(bench: Bench) -> None:
    settings = {"accumulate_grad_batches": 2, "limit_train_batches": 6, "max_steps": 8}
    saving = ModelCheckpoint(bench.folder / "checkpoints", every_n_train_steps=4, save_top_k=-1)
    whole = bench.fit(callbacks=[saving], **settings)
    assert whole.served == micro_batches(0, 8, 2)

    path = next((bench.folder / "checkpoints").glob("*step=4.ckpt"))
    resumed = bench.fit(ckpt_path=path, **settings)
    assert resumed.served == micro_batches(4, 8, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_run_continues_with_more_steps(bench: Bench) -> None:
    bench.fit(max_steps=3)
    assert bench.fit(max_steps=5, ckpt_path="last").served == micro_batches(3, 5)
    assert bench.fit(max_epochs=3, limit_train_batches=2, ckpt_path="last").served == micro_batches(5, 6)


@pytest.mark.parametrize("limits", [{"max_steps": 10_000}, {"max_epochs": 3, "min_epochs": 2}])
def test_the_training_ends_with_the_data(
    bench: Bench, limits: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    few = ["mixture.max_epochs=1", "dataplane.seq_len=128", "mixture.group_by=[]"]
    with caplog.at_level(logging.WARNING, "mixtera_hpc"):
        model = bench.fit(data=bench.data(*few, "mixture.on_exhausted=stop"), **limits)
    steps = [step for step, _ in model.served]
    assert steps == list(range(len(steps)))
    assert len(steps) > 3
    assert f"The data ended after {len(steps)} steps" in caplog.text


def test_data_that_do_not_suffice_for_a_step_are_refused(bench: Bench) -> None:
    few = ["mixture.max_epochs=1", "dataplane.seq_len=128", "mixture.group_by=[source]", "mixture.on_exhausted=stop"]
    with pytest.raises(MixtureError, match="The data ended after 0 steps"):
        bench.fit(data=bench.data(*few), max_steps=4)


def test_manual_optimization_with_losses_by_rows(bench: Bench) -> None:
    class ManualModel(Model):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.served.append((int(batch["step"]), batch["positions"].tolist()))
            losses = self.losses(batch)
            for rows in (slice(0, 2), slice(2, 8)):
                self.trainer.datamodule.record(losses[rows], rows=rows)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(losses.mean())
            optimizer.step()

    model = bench.fit(ManualModel(), bench.data(*ADO), max_steps=6)
    assert model.served == micro_batches(0, 6)
    assert bench.fit(ManualModel(), bench.data(*ADO), "last", max_steps=8).served == micro_batches(6, 8)


# Checkpoints


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_checkpoint_from_the_middle_of_a_step_begins_this_step_again(bench: Bench, accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 4}
    every_batch = ModelCheckpoint(bench.folder, train_time_interval=timedelta(0), save_top_k=-1, filename="b{step}")

    class SavesEveryBatch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.save_checkpoint(bench.folder / f"{batch_idx}.ckpt")

    whole = bench.fit(callbacks=[SavesEveryBatch(), every_batch], **settings)
    for batch_idx in range(4 * accumulate - 1):
        resumed = bench.fit(ckpt_path=bench.folder / f"{batch_idx}.ckpt", callbacks=[], **settings)
        assert resumed.served == micro_batches((batch_idx + 1) // accumulate, 4, accumulate)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_after_an_exception_repeats_the_step_that_failed(bench: Bench, accumulate: int) -> None:
    def fail(model: Any) -> None:
        if len(model.served) % accumulate == 0:
            raise ValueError("broken on purpose")

    settings = {"accumulate_grad_batches": accumulate, "max_steps": 4}
    saving = ModelCheckpoint(bench.folder, filename="failed", save_on_exception=True)
    with pytest.raises(ValueError, match="on purpose"):
        bench.fit(Model({2: fail}), callbacks=[saving], **settings)
    resumed = bench.fit(ckpt_path=next(bench.folder.glob("*.ckpt")), **settings)
    assert resumed.served == micro_batches(2, 4, accumulate)


def test_a_checkpoint_loads_with_weights_only(bench: Bench) -> None:
    bench.fit(max_steps=3)
    state = torch.load(bench.folder / "checkpoints/last.ckpt", weights_only=True)
    assert state["PlaneDataModule"]["plane"].dtype == torch.uint8


def test_a_checkpoint_without_the_data_is_refused(bench: Bench) -> None:
    bench.fit(max_steps=3)
    path = bench.folder / "checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    del state["PlaneDataModule"]
    torch.save(state, path)
    with pytest.raises(ConfigError, match="begins after 3 optimizer steps, but the data plane after 0"):
        bench.fit(max_steps=5, ckpt_path=path)


def test_a_second_fit_without_the_checkpoint_is_refused(bench: Bench) -> None:
    model, data, trainer = Model(), bench.data(), bench.trainer(max_steps=3)
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 5
    with pytest.raises(ConfigError, match=r"pass a checkpoint .* fit\(ckpt_path"):
        trainer.fit(model, datamodule=data)
    trainer.fit(model, datamodule=data, ckpt_path="last")
    assert model.served == micro_batches(0, 5)


# Validation and the log


def logged(folder: Path, prefix: str) -> set[str]:
    header = next(folder.rglob("metrics.csv")).read_text().splitlines()[0]
    return {name for name in header.split(",") if name.startswith(prefix + "/")}


def test_held_out_losses_and_weights_are_logged_by_domain(bench: Bench) -> None:
    data = bench.data(*HELD_OUT)
    settings = {"max_steps": 8, "accumulate_grad_batches": 2, "val_check_interval": 4, "num_sanity_val_steps": 1}
    model = bench.fit(data=data, logger=CSVLogger(bench.folder), log_every_n_steps=3, **settings)
    assert model.validated == [4] + [4, 4, 4, 4] * 4
    assert model.served == micro_batches(0, 8, 2)
    assert "held_out_loss/source=ast" in logged(bench.folder, "held_out_loss")
    assert {"train_loss/source=ast", "train_loss/source=argparse"} <= logged(bench.folder, "train_loss")
    assert len(logged(bench.folder, "weight")) == 10


def test_a_limited_validation_counts_whole_batches(bench: Bench) -> None:
    data = bench.data(*HELD_OUT)
    model = bench.fit(data=data, max_steps=2, accumulate_grad_batches=2, limit_val_batches=3)
    assert model.validated == [4, 4, 4]


def test_the_held_out_loss_can_be_monitored_and_computed_without_training(bench: Bench) -> None:
    best = ModelCheckpoint(bench.folder / "best", monitor="held_out_loss/source=ast")
    data = bench.data(*HELD_OUT)
    model, trainer = Model(), bench.trainer(max_steps=4, val_check_interval=2, callbacks=[best])
    trainer.fit(model, datamodule=data)
    value = trainer.callback_metrics["held_out_loss/source=ast"]
    assert best.best_model_score == value

    results = bench.trainer().validate(model, datamodule=data, ckpt_path=best.best_model_path)
    assert results[0]["held_out_loss/source=ast"] == pytest.approx(float(value))


def test_validating_is_no_attempt_of_the_run(bench: Bench) -> None:
    data, model = bench.data(*HELD_OUT), Model()
    bench.fit(model, data, max_steps=2)
    run = RunFolder(bench.folder / "run")
    lines = run.journal.read_text()
    bench.trainer().validate(model, datamodule=data, ckpt_path=bench.folder / "checkpoints/last.ckpt")
    assert run.journal.read_text() == lines
    assert len(run.attempts()) == 1


def test_a_model_without_validation_step_and_a_run_without_held_out_samples_work(bench: Bench) -> None:
    class TrainOnly(Model):
        validation_step = pl.LightningModule.validation_step

    assert bench.fit(TrainOnly(), bench.data(*HELD_OUT), max_steps=2).served == micro_batches(0, 2)
    model = bench.fit(max_steps=2)
    assert model.validated == []


# Stop and save


def test_a_save_request_writes_a_checkpoint_and_continues(bench: Bench) -> None:
    def request(model: Any) -> None:
        RunFolder(bench.folder / "run").control.mkdir(parents=True, exist_ok=True)
        RunFolder(bench.folder / "run").save_request.touch()

    model = bench.fit(Model({2: request}), max_steps=8)
    assert model.served == micro_batches(0, 8)
    state = torch.load(bench.folder / "checkpoints/last-requested.ckpt", weights_only=True)
    assert 3 <= state["global_step"] < 8


def test_a_signal_ends_the_training_after_the_agreed_step(bench: Bench) -> None:
    data = bench.data(*HELD_OUT)
    model = Model({3: lambda _: signal.raise_signal(signal.SIGTERM)})
    trainer = bench.trainer(max_steps=50, min_epochs=2)
    trainer.fit(model, datamodule=data)
    end = len(model.served)
    assert 4 <= end < 8
    assert data.stopped
    assert model.validated == [], "there may be little time left"
    assert trainer.limit_val_batches == 1.0

    resumed = bench.data(*HELD_OUT)
    assert bench.fit(data=resumed, max_steps=end + 2, ckpt_path="last").served == micro_batches(end, end + 2)
    assert not resumed.stopped


def test_slurm_requeues_the_job_between_two_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = bench.folder / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {bench.folder}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "17", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NTASKS": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "train")

    data = bench.data()
    model = Model({3: lambda _: signal.raise_signal(signal.SIGUSR1)})
    bench.fit(model, data, max_steps=50, plugins=[SLURMEnvironment()])
    end = len(model.served)
    assert data.stopped
    assert (bench.folder / "requeued").read_text() == "requeue 17\n"
    assert bench.fit(max_steps=end + 2, plugins=[SLURMEnvironment()]).served == micro_batches(end, end + 2)


# Mistakes


class SkipsBatches(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 3}, r"global_batch_size=8 gives each of 1 .* 8 seq.*accumulate_grad_batches=3"),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 5}, "An epoch has 5 batches .*multiple.*=2"),
        ({"overfit_batches": 2}, r"overfit_batches=2\) repeats batches"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})], "limit_train_batches": 2}, "changed from 1 to 2"),
    ],
)
def test_a_setting_of_the_trainer_that_changes_the_batches_is_refused(
    bench: Bench, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.fit(max_steps=8, **settings)


def test_skipped_batches_are_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="optimizer step 1 and batch 0, but this batch belongs to step 2"):
        bench.fit(SkipsBatches(), max_steps=8)


def test_a_mixture_that_learns_without_losses_is_refused(bench: Bench) -> None:
    model = Model()
    model.gives_losses = False
    with pytest.raises(ConfigError, match=r"training_step gave no losses.*\n.*loss_per_token"):
        bench.fit(model, bench.data(*ADO), max_steps=8)
    # Without losses, the other mixtures work, and resume exactly.
    model.served.clear()
    bench.fit(model, max_steps=4)
    bench.fit(model, max_steps=6, ckpt_path="last")
    assert model.served == micro_batches(0, 6)


def test_loss_weights_that_training_step_does_not_apply_are_refused(bench: Bench) -> None:
    bench.overrides = [word for word in bench.overrides if not word.startswith("mixture.")]
    domains = "[{key: {source: 'a*'}, weight: 0.5, loss_weight: 0.25}, {key: {source: ['d*', enum]}, weight: 0.5}]"
    words = ("mixture.kind=static", f"mixture.domains={domains}")
    problem = r"domains\[0\]\.loss_weight is 0\.25, but Lightning does not multiply the loss with it"
    with pytest.raises(ConfigError, match=problem + r".*\n.*applies_loss_weights=True"):
        bench.data(*words)
    config = compose([*bench.overrides, *words])
    bench.fit(data=PlaneDataModule(config, applies_loss_weights=True), max_steps=1)


def test_a_data_module_that_no_trainer_has_set_up_is_refused(bench: Bench) -> None:
    data = bench.data()
    for use in (lambda: data.plane, data.train_dataloader, lambda: data.record(1.0)):
        with pytest.raises(ConfigError, match=r"trainer\.fit\(model, datamodule=data\)"):
            use()


def test_a_loader_of_another_kind_is_refused(bench: Bench) -> None:
    class OwnLoader(PlaneDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(PlaneDataset(self.plane), batch_size=None)

    class Stacks(PlaneDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(PlaneDataset(self.plane), batch_size=8)

    config = compose(bench.overrides)
    with pytest.raises(ConfigError, match=r"does not come from the data plane"):
        bench.fit(data=OwnLoader(config), max_steps=4)
    with pytest.raises(ConfigError, match=r"would stack whole batches"):
        bench.fit(data=Stacks(config), max_steps=4)


def test_loaders_beside_that_of_the_data_plane_work(bench: Bench) -> None:
    class WithOther(PlaneDataModule):
        def train_dataloader(self) -> Any:
            return {"plane": super().train_dataloader(), "other": DataLoader(range(100))}

    class TwoInputs(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["plane"], batch_idx)

    assert bench.fit(TwoInputs(), WithOther(compose(bench.overrides)), max_steps=4).served == micro_batches(0, 4)
