"""Validation of the reference trainer: the loss of every domain on samples that are never trained on."""

import torch

from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.integrations.device_staging import DeviceStage
from mixtera_hpc.integrations.process_group import Replicas
from mixtera_hpc.track.event_types import ValidationEvent
from mixtera_hpc.track.tracker import Tracker
from mixtera_hpc.training.batch_loss import batch_loss, stage_batch
from mixtera_hpc.training.model import GPT

__all__ = ["Validator"]


class Validator:
    """The validation of a run, every `training.validate_every` steps; nothing if that is 0."""

    def __init__(self, plane: DataPlane, replicas: Replicas, tracker: Tracker) -> None:
        """Open the held-out samples. **Collective.**"""
        config = plane.config
        self._every_steps = config.training.validate_every
        self._micro_batch_size = config.training.micro_batch_size
        self._attention = config.training.attention
        self._stage = DeviceStage(replicas.device)
        self._tracker = tracker
        self._data = plane.held_out() if self._every_steps else None
        self._last_step = -1
        """Step of the newest validation."""

    def validate_if_due(self, step: int, model: GPT, is_last: bool = False) -> None:
        """Validate and log the result if a validation is due. **Collective.**

        Args:
            step: number of finished steps.
            model: the model after these steps.
            is_last: whether the run ends here; the end is always validated, but no step twice.
        """
        if self._data is None or step == self._last_step:
            return
        if not is_last and step % self._every_steps != 0:
            return
        self._last_step = step
        self._record_losses(self._data, model)
        statistics = self._data.reduce(step)
        self._tracker.log("validation", _validation_event(statistics, self._data.mean_loss(statistics)))

    def _record_losses(self, data: HeldOutBatches, model: GPT) -> None:
        model.eval()
        with torch.no_grad():
            for batch in data.batches():
                staged = stage_batch(self._stage, batch, self._attention)
                micro_batch_size = self._micro_batch_size or len(batch.tokens)
                for start in range(0, len(batch.tokens), micro_batch_size):
                    rows = slice(start, start + micro_batch_size)
                    loss = batch_loss(model, staged, rows)
                    data.record(batch, loss, rows=rows)
        model.train()


def _validation_event(statistics: DomainStatistics, mean_loss: float | None) -> ValidationEvent:
    pairs = zip(statistics.loss_sum.tolist(), statistics.num_tokens.tolist(), strict=True)
    domain_loss = [loss / tokens if tokens else None for loss, tokens in pairs]
    return {
        "step": statistics.step,
        "loss": mean_loss,
        "domain_loss": domain_loss,
        "domain_tokens": statistics.num_tokens.tolist(),
        "num_nonfinite": int(statistics.num_nonfinite.sum()),
    }
