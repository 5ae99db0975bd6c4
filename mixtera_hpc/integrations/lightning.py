"""`PlaneDataModule`: a data plane in a `Trainer` of Lightning.

    data = PlaneDataModule(config, folder=RunFolder(path))
    trainer = Trainer(max_steps=10_000, accumulate_grad_batches=4)
    trainer.fit(model, datamodule=data, ckpt_path="last")

`training_step` and `validation_step` return the loss of every predicted token under the key `loss_per_token`. The data
module adds a callback of its own to the trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.plane_state import STATE_KEY
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.lightning_callback import PlaneCallback
from mixtera_hpc.integrations.lightning_checks import check_no_loss_weights, data_parallel_of

__all__ = ["PlaneDataModule"]


class PlaneDataModule(LightningDataModule):
    """The data plane of a run as the data of a `Trainer`.

    Lightning's `setup` opens the data plane when the process group exists. A training batch is a micro-batch, a dict of
    tensors (`as_tensors`): the part of the global batch that this rank gets, cut into `accumulate_grad_batches` parts.
    So each optimizer step of the trainer is a step of the data plane. With `query.holdout.fraction`, validation batches
    are the held-out samples.

    The state of the data plane is part of Lightning's checkpoints. A stop signal or `control/stop` saves
    `last-requested.ckpt` beside the other checkpoints and ends `fit`; `stopped` is then True.
    """

    def __init__(
        self, config: Config, folder: RunFolder | None = None, *, applies_loss_weights: bool = False, **options: Any
    ) -> None:
        """Describe the data; nothing is opened yet.

        Args:
            config: the composed configuration of the run.
            folder: the folder of the run, for the journal and the control files; None: neither.
            applies_loss_weights: whether `training_step` multiplies the losses of each sequence by
                `batch["loss_weights"]`. Lightning does not.
            options: further arguments of `DataPlane.open`. By default the strategy says which ranks get the same
                batches.

        Raises:
            ConfigError: a domain has a `loss_weight`, and `applies_loss_weights` is False.
        """
        super().__init__()
        if not applies_loss_weights:
            check_no_loss_weights(config.mixture)
        self._config = config
        self._folder = folder
        self._options = options
        self._callback: PlaneCallback | None = None
        """Holds the open data plane, or the one that was closed last."""

    @property
    def plane(self) -> DataPlane:
        """The open data plane, from Lightning's `setup` hooks on.

        Raises:
            ConfigError: it is not open.
        """
        return self._opened().plane

    @property
    def stopped(self) -> bool:
        """True if the last `fit` was ended by a request to stop; its state is saved."""
        return self._callback is not None and self._callback.is_stopped

    def record(
        self, loss: Any, *, rows: slice = slice(None), tokens: slice | None = None, num_tokens: Any = None
    ) -> None:
        """Add losses of the batch that `training_step` or `validation_step` works on.

        This is for losses that are not one tensor of shape (B, T); return those under the key `loss_per_token` instead.
        The arguments are those of `DataPlane.record`.
        """
        self._opened().record(loss, rows=rows, tokens=tokens, num_tokens=num_tokens)

    def setup(self, stage: str) -> None:
        """Open the data plane. **Collective.**"""
        if self._callback is not None and not self._callback.is_closed:
            return
        options = {"data_parallel": data_parallel_of(self.trainer), **self._options}
        config = self._config
        if stage != TrainerFn.FITTING and self._folder is not None:
            # A validation is no attempt of the run, which may be in progress. It uses the index as the run does.
            config = pin_to_run(config, self._folder.journal)
            plane = DataPlane.open(config, **options)
        else:
            plane = DataPlane.open(config, folder=self._folder, **options)
        self._callback = PlaneCallback(self.trainer, plane, self._folder)

    def train_dataloader(self) -> Any:
        """Return the micro-batches that were not served. **Collective.**

        Raises:
            ConfigError: the settings of the trainer do not fit the data plane.
        """
        return self._opened().train_loader()

    def val_dataloader(self) -> Any:
        """Return the held-out micro-batches; an empty list if nothing is held out. **Collective.**"""
        return self._opened().held_out_loader() or []

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the data plane after the last optimizer step, for a checkpoint. **Collective.**"""
        # A tensor, because torch loads that also with weights_only=True.
        return {STATE_KEY: torch.from_numpy(self._opened().plane_state()[STATE_KEY])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint. **Collective.**"""
        # `validate` loads checkpoints too. It needs the weights only.
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.plane.load_state_dict(state_dict)

    def on_exception(self, exception: BaseException) -> None:
        """Close the data plane; an exception in one rank ends all ranks."""
        if self._callback is not None:
            self._callback.close(exception)

    def teardown(self, stage: str) -> None:
        """Close the data plane. **Collective.**"""
        if self._callback is not None:
            self._callback.close()

    def _opened(self) -> PlaneCallback:
        if self._callback is None or self._callback.is_closed:
            raise ConfigError(
                "The data plane of a PlaneDataModule is not open: Lightning's setup hook opens it, and teardown closes "
                "it.\n  Pass the data module to the trainer: trainer.fit(model, datamodule=data). Use data.plane in "
                "setup() of the LightningModule or later."
            )
        return self._callback
