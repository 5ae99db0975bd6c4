"""Train a tiny language model with Lightning on a data plane.

torchrun --nproc-per-node 2 examples/trainers/lightning.py --overrides experiment=demo --steps 8 --out /tmp/run
mpiexec -n 2 python examples/trainers/lightning.py --overrides experiment=demo --steps 8 --out /tmp/run
"""

import sys
from pathlib import Path

# This file has the name of the package `lightning`. So Python must look into the folder of this file last.
sys.path.sort(key=lambda folder: Path(folder).resolve() == Path(__file__).resolve().parent)

import lightning.pytorch as pl
import torch
from command_line import TrainingRecord, parse_arguments
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from mixtera_hpc import Replicas, RunFolder, compose
from mixtera_hpc.integrations.lightning import PlaneDataModule


class LanguageModel(pl.LightningModule):
    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def setup(self, stage: str) -> None:
        vocab_size = self.trainer.datamodule.plane.vocab_size
        torch.manual_seed(0)
        self.network = torch.nn.Sequential(torch.nn.Embedding(vocab_size, 32), torch.nn.Linear(32, vocab_size))
        self.record = TrainingRecord(self.out, self.global_rank)

    def losses(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of every predicted token, shape (B, T)."""
        tokens = batch["tokens"]
        return cross_entropy(self.network(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        losses = self.losses(batch)
        self.record.add(batch["positions"], batch["tokens"], losses, batch["loss_mask"])
        # Lightning averages over micro-batches and ranks. Every one of them divides by the same number of tokens.
        return {"loss": (losses * batch["loss_mask"]).mean(), "loss_per_token": losses}

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        return {"loss_per_token": self.losses(batch)}

    def on_train_batch_end(self, outputs: object, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.record.end_step(int(batch["step"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


arguments = parse_arguments()
torch.set_num_threads(1)
checkpoints = ModelCheckpoint(arguments.out / "checkpoints", every_n_train_steps=arguments.save_at or 0, save_last=True)
with Replicas(device="cpu") as replicas:  # Under mpiexec it sets what torchrun would set.
    data = PlaneDataModule(compose(arguments.overrides), folder=RunFolder(arguments.out))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=replicas.comm.local_size,
        num_nodes=replicas.comm.size // replicas.comm.local_size,
        strategy="ddp" if replicas.comm.size > 1 else "auto",
        max_steps=min(arguments.steps, arguments.stop_after or arguments.steps),
        accumulate_grad_batches=arguments.accumulate,
        callbacks=[checkpoints],
        logger=CSVLogger(arguments.out),
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(LanguageModel(arguments.out), datamodule=data, ckpt_path="last" if arguments.resume else None)
