"""Train with processes that Lightning starts itself: `python lightning_devices_program.py OUT OVERRIDES…`."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mixtera_hpc import RunFolder, compose
from mixtera_hpc.integrations.lightning import PlaneDataModule


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Embedding(512, 4), torch.nn.Linear(4, 512))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        tokens = batch["tokens"]
        logits = self.network(tokens[:, :-1]).transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
        print(f"rank {self.global_rank} step {int(batch['step'])} positions {batch['positions'].tolist()}", flush=True)
        return {"loss": losses.mean(), "loss_per_token": losses}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    trainer = pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), datamodule=PlaneDataModule(compose(sys.argv[2:]), folder=RunFolder(out)))
