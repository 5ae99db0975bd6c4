"""`HeldOutValidator`: torchtitan's validation on held-out samples, for `integrations.torchtitan`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn
from torchtitan.components.loss import BaseLoss
from torchtitan.components.validate import Validator
from tyro.conf import Suppress

from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.integrations.torch import as_tensors
from mixtera_hpc.integrations.torchtitan_data import inputs_and_labels
from mixtera_hpc.integrations.torchtitan_loss import innermost_loss, record_losses, token_slices

__all__ = ["HeldOutValidator"]


class HeldOutValidator(Validator):
    """torchtitan's validation on the samples that `query.holdout` excludes from training, with a loss per domain.

    `training.validate_steps` of the data plane says how many global batches it takes. Set `validator.enable=True` and
    `validator.freq`; `validator.steps` and `validator.dataloader` keep their defaults.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """The options of torchtitan's `Validator`."""

        _plane: Annotated[DataPlane | None, Suppress] = None
        """The open data plane; `TitanTrainer` sets it."""

    def __init__(self, config: Config, *, loss_fn: BaseLoss, **kwargs: Any) -> None:
        """Open the held-out samples; torchtitan calls this. **Collective.**

        Raises:
            MixtureError: less than one global batch is held out.
        """
        if config._plane is None:
            raise ConfigError("HeldOutValidator needs a TitanTrainer.\n  Use TitanTrainer.Config.")
        super().__init__(config, loss_fn=loss_fn, **kwargs)
        self._names = config._plane.domain_names
        self._held_out = config._plane.held_out()
        self._losses = innermost_loss(loss_fn).validation
        self._token_slices = token_slices(self.parallelism, self.parallel_dims, self.seq_len)
        self._pending: list[dict[str, Any]] = []
        """The micro-batches whose losses torchtitan computes next."""
        # torchtitan expects the configuration of a data loader here, and only calls its build().
        self.dl_config = self

    def build(self, *, local_batch_size: int, **kwargs: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the micro-batches of one validation; torchtitan calls this.

        With pipeline parallelism, torchtitan takes several of them before it computes their losses.
        """
        for whole in self._held_out.batches():
            batch = as_tensors(whole)
            for first in range(0, len(whole.positions), local_batch_size):
                if len(self._pending) * local_batch_size == self.local_batch_size:
                    self._record_pending()
                if not self._pending:
                    self._losses.start()
                rows = slice(first, first + local_batch_size)
                self._pending.append({key: value if key == "step" else value[rows] for key, value in batch.items()})
                yield inputs_and_labels(self._pending[-1])

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the held-out loss, in total and per domain. **Collective.**"""
        super().validate(model_parts, step)
        self._record_pending()
        statistics = self._held_out.reduce(step)
        self.metrics_processor.logger.log(domain_losses([statistics], self._names, "held_out_loss"), step)

    def _record_pending(self) -> None:
        # Only the last stage of a pipeline has losses.
        if self._pending and self.pp_has_last_stage is not False:
            losses = self._losses.micro_batches(len(self._pending))
            for batch, of_batch in zip(self._pending, losses, strict=True):
                record_losses(self._held_out, batch, of_batch, self._token_slices)
        self._pending.clear()
