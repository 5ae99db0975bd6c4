"""Validation of the reference trainer: the loss of every domain on samples it never trains on."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import NUM_BUFFER_ROWS, DomainStatistics
from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.track.event_types import ValidationEvent
from mixtera_hpc.track.tracker import Tracker
from mixtera_hpc.training.distributed import Replicas
from mixtera_hpc.training.model import GPT

__all__ = ["Validator"]


class Validator:
    """Knows when to validate, and does it; nothing where nothing is held out for it."""

    def __init__(self, config: Config, replicas: Replicas, tracker: Tracker) -> None:
        """Open the samples that are held out. **Collective.**"""
        self._every = config.training.validate_every
        self._rows = config.training.micro_batch_size
        self._device, self._tracker = replicas.device, tracker
        self._data = HeldOutBatches(config, replicas.comm) if self._every else None
        self._last = -1

    def after(self, step: int, model: GPT, at_end: bool = False) -> None:
        """Validate `model`, which has taken `step` steps, if it is time to. **Collective.**"""
        if self._data is None or step == self._last or not (at_end or step % self._every == 0):
            return
        self._last = step
        sums = np.zeros((NUM_BUFFER_ROWS, self._data.num_domains), np.int64)
        model.eval()
        with torch.no_grad():
            for batch in self._data.batches():
                size = self._rows or len(batch.tokens)
                for first in range(0, len(batch.tokens), size):
                    rows = slice(first, first + size)
                    sums += self._data.sums(batch, self._loss(model, batch.tokens[rows]), rows)
        model.train()
        self._tracker.log("validation", _event(self._data.reduced(step, sums)))

    def _loss(self, model: Callable[[Tensor], Tensor], tokens: NDArray[np.int64]) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return model(torch.tensor(tokens).to(self._device))


def _event(found: DomainStatistics) -> ValidationEvent:
    total = int(found.num_tokens.sum())
    pairs = zip(found.loss_sum.tolist(), found.num_tokens.tolist(), strict=True)
    return {
        "step": found.step,
        "loss": float(found.loss_sum.sum()) / total if total else None,
        "domain_loss": [loss / tokens if tokens else None for loss, tokens in pairs],
        "domain_tokens": found.num_tokens.tolist(),
        "num_nonfinite": int(found.num_nonfinite.sum()),
    }
