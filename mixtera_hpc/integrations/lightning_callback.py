"""`PlaneCallback`: an open data plane in the hooks of Lightning's training and validation loop.

All calls that are collective happen in hooks that Lightning calls on all ranks.
"""

import logging
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.control import STOP_SIGNALS
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.integrations.lightning_batches import HandedOut, HeldOutLoader, TrainLoader
from mixtera_hpc.integrations.lightning_checks import (
    check_begin,
    check_current_batch,
    check_epoch,
    check_losses_unneeded,
    num_micro_batches,
    restart_step,
)

__all__ = ["PlaneCallback", "StopSignals"]

REQUESTED_CHECKPOINT = "last-requested.ckpt"
"""File that a stop or save request writes. `ckpt_path="last"` takes the newest file whose name begins with `last`."""

DEFAULT_CHECKPOINT_FOLDER = "checkpoints"
"""Its folder below `default_root_dir`, if no `ModelCheckpoint` has another one."""

logger = logging.getLogger("mixtera_hpc")


class PlaneCallback(Callback):
    """An open data plane, and what happens with it in each hook. It is the first callback of the trainer.

    So a checkpoint that another callback saves after a step holds the state after this step. And an exception is
    reported before another callback saves something, which would wait for ranks that do not save.
    """

    def __init__(self, trainer: Trainer, plane: DataPlane, folder: RunFolder | None) -> None:
        """Join the callbacks of `trainer`, in place of the one for a plane that was closed.

        Args:
            trainer: the trainer; its process group exists.
            plane: the data plane, just opened.
            folder: folder of the run, whose dropped samples are not validated on.
        """
        self.plane = plane
        self.is_closed = False
        self.is_stopped = False
        """True if the training was ended by a request to stop."""
        self._trainer = trainer
        self._folder = folder
        self._signals = StopSignals(trainer)
        self._train: TrainLoader | None = None
        self._held_out: HeldOutLoader | None = None
        self._first_state: Mapping[str, Any] = {}
        """State of the data plane before the first batch of this training."""
        self._unlogged: list[DomainStatistics] = []
        self._limit_val_batches: int | float = trainer.limit_val_batches
        trainer.callbacks[:] = [self, *(other for other in trainer.callbacks if not isinstance(other, PlaneCallback))]

    def train_loader(self) -> TrainLoader:
        """Return the loader of this training. **Collective.**

        Raises:
            ConfigError: the settings of the trainer do not fit the data plane.
        """
        # Lightning asks for loaders as soon as it has installed its handlers.
        self._signals.take()
        if self._train is None:
            num_micro = num_micro_batches(self._trainer, self.plane, self.plane.local_batch_sizes)
            check_begin(self._trainer, self.plane)
            restart_step(self._trainer, num_micro)
            # With manual optimization, max_steps counts the steps of all optimizers.
            is_known = self._trainer.max_steps > 0 and self._trainer.lightning_module.automatic_optimization
            num_steps = self._trainer.max_steps if is_known else None
            self._first_state = self.plane.state_dict()
            self._train = TrainLoader(self.plane, num_micro, num_steps, pin=self._is_on_gpu)
        return self._train

    def held_out_loader(self) -> HeldOutLoader | None:
        """Return the loader of validations, None if nothing is held out. **Collective.**"""
        self._signals.take()
        if self._held_out is None and self.plane.config.query.holdout.fraction > 0:
            # All batches of a validation have this size, also during a batch ramp.
            key = "dataplane.global_batch_size"
            size = self.plane.config.dataplane.global_batch_size // self.plane.num_groups
            num_micro = num_micro_batches(self._trainer, self.plane, {key: size})
            self._held_out = HeldOutLoader(self.plane.held_out(self._folder), num_micro, pin=self._is_on_gpu)
        return self._held_out

    def plane_state(self) -> Mapping[str, Any]:
        """Return the state of the data plane after the last optimizer step. **Collective.**"""
        # Until a step has ended, the data plane cannot know which of its batches the trainer has fetched ahead.
        if self._train is not None and self._train.handed_out.num_ended < self._train.handed_out.num_micro:
            return self._first_state
        return self.plane.state_dict()

    def record(self, loss: Any, **which: Any) -> None:
        """Add losses of the current batch, see `PlaneDataModule.record`."""
        handed_out = self._handed_out
        if handed_out is None or handed_out.current is None:
            raise ConfigError(
                "PlaneDataModule.record() was called for a batch of another loader, or outside of training_step and "
                "validation_step.\n  Call it where a batch of this data module is used."
            )
        handed_out.add(loss, **which)

    def close(self, error: BaseException | None = None) -> None:
        """Close the data plane. **Collective.**

        Args:
            error: why this rank ends; it then ends all ranks, and the call is not collective.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self._signals.close()
        self._trainer.limit_val_batches = self._limit_val_batches
        self.plane.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        # Closing has completed the reductions of the last steps.
        if error is None:
            self._log_steps(is_end=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the stop signals back from Lightning, and check the length of an epoch."""
        self._signals.take()
        check_epoch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a micro-batch."""
        train = self._train.handed_out if self._train is not None else None
        if train is not None:
            train.begin()
        check_current_batch(trainer, train, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a micro-batch, and the step if it was the last one. **Collective.**"""
        if self._train is None or not self._train.handed_out.end(outputs):
            return
        if not self._train.handed_out.record():
            check_losses_unneeded(self.plane)
            self.plane.finish(self._train.handed_out.current or {})
        self._answer_requests(trainer)
        self._log_steps()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the training when the data has ended.

        Raises:
            MixtureError: the data do not suffice for a single step.
        """
        if self._train is None or not self._train.is_at_end or _is_complete(trainer):
            return
        if self.plane.is_interrupted:
            # A stop was requested while no batch came.
            self._answer_requests(trainer)
            return
        mixture = self.plane.config.mixture
        message = (
            f"The data ended after {trainer.global_step} steps, because of mixture.on_exhausted={mixture.on_exhausted} "
            f"and mixture.max_epochs={mixture.max_epochs}.\n"
            "  Run mixtera-hpc plan to see when each domain runs out. To train longer, start a new run with a higher "
            "max_epochs of the mixture or of that domain."
        )
        if trainer.global_step == 0:
            raise MixtureError(message)
        if trainer.is_global_zero:
            logger.warning(message)
        _end_fit(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin a held-out micro-batch."""
        if self._held_out is not None:
            self._held_out.handed_out.begin()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End a held-out micro-batch."""
        held_out = self._held_out.handed_out if self._held_out is not None else None
        if held_out is not None and held_out.current is not None and held_out.end(outputs):
            held_out.record()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the held-out loss of every domain. **Collective.**"""
        if self._held_out is None:
            return
        statistics = self._held_out.held_out.reduce(trainer.global_step)
        if not trainer.sanity_checking:
            metrics = domain_losses([statistics], self.plane.domain_names, "held_out_loss")
            # All ranks have the same values. Without sync_dist, Lightning would warn about every one of them.
            pl_module.log_dict(metrics, batch_size=1, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End all ranks after an exception in this one."""
        # A single rank may still save a checkpoint in another callback.
        if trainer.world_size > 1:
            self.close(exception)

    @property
    def _is_on_gpu(self) -> bool:
        return bool(self._trainer.strategy.root_device.type == "cuda")

    @property
    def _handed_out(self) -> HandedOut | None:
        loader = self._train if self._trainer.training else self._held_out
        return loader.handed_out if loader is not None else None

    def _log_steps(self, is_end: bool = False) -> None:
        """Log training losses and weights per domain every `log_every_n_steps` steps, averaged over these steps."""
        self._unlogged += self.plane.completed_statistics()
        every = self._trainer.log_every_n_steps
        if every < 1 or not self._unlogged or (len(self._unlogged) < every and not is_end):
            return
        names = self.plane.domain_names
        metrics = domain_losses(self._unlogged, names, "train_loss")
        metrics |= {f"weight/{name}": weight for name, weight in zip(names, self.plane.weights.tolist(), strict=True)}
        # Losses are complete some steps late. They are logged for the step that they belong to.
        for destination in self._trainer.loggers:
            destination.log_metrics(metrics, step=self._unlogged[-1].step)
        self._unlogged.clear()

    def _answer_requests(self, trainer: Trainer) -> None:
        """Save, or save and end the training, if all ranks have agreed on a request. **Collective.**"""
        stop = self.plane.stop_requested()
        save = self.plane.save_requested()
        if not stop and not save:
            return
        is_requeued = stop and self._signals.requeue_if_requested()
        if not is_requeued and not trainer.fast_dev_run:
            _save_checkpoint(trainer)
        if stop and not _is_complete(trainer):
            self.is_stopped = True
            # Lightning would validate before it leaves. There may be little time left.
            trainer.limit_val_batches = 0
            _end_fit(trainer)


class StopSignals:
    """The handlers of stop signals: those of the data plane, by which all ranks agree on the step to stop after.

    Lightning's handler of SIGTERM broadcasts inside of the handler, in the middle of a step, and ends without saving.
    Its handler for the automatic requeue of Slurm saves there. Here, requeuing waits for the end of the agreed step.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Take the handler of the data plane, before Lightning installs its own ones."""
        # Only the main thread can have handlers.
        self._is_active = threading.current_thread() is threading.main_thread()
        self._plane_handler: Any = signal.getsignal(signal.SIGTERM)
        self._is_requeue_requested = False
        self._trainer = trainer
        self._requeue_signal: signal.Signals | None = None
        self._previous: Any = None
        environment = trainer._accelerator_connector.cluster_environment
        if self._is_active and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal
            # Lightning installs no handler for a signal that has one.
            self._previous = signal.signal(environment.requeue_signal, self._on_requeue_signal)

    def take(self) -> None:
        """Install the data plane's handler of SIGTERM in place of Lightning's."""
        if self._is_active:
            signal.signal(signal.SIGTERM, self._plane_handler)

    def requeue_if_requested(self) -> bool:
        """Let Lightning save and requeue the job if any rank got the signal for it. **Collective.**"""
        if self._requeue_signal is None:
            return False
        if not self._trainer.strategy.reduce_boolean_decision(self._is_requeue_requested, all=False):
            return False
        self._trainer._signal_connector._slurm_sigusr_handler_fn(self._requeue_signal, None)
        return True

    def close(self) -> None:
        """Restore the handler of the requeue signal. Those of stop signals belong to the data plane."""
        if self._requeue_signal is not None:
            signal.signal(self._requeue_signal, self._previous)
        # After an exception, Lightning has yet to restore the handlers that it found. Those of the data plane are dead.
        for number in (*STOP_SIGNALS, self._requeue_signal):
            self._trainer._signal_connector._original_handlers.pop(number, None)

    def _on_requeue_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_requeue_requested = True
        self._plane_handler(number, frame)


def _is_complete(trainer: Trainer) -> bool:
    return bool(0 < trainer.max_steps <= trainer.global_step)


def _save_checkpoint(trainer: Trainer) -> None:
    """Save `last-requested.ckpt` in the folder of the trainer's checkpoints. **Collective.**"""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    path = Path(folder or Path(trainer.default_root_dir) / DEFAULT_CHECKPOINT_FOLDER) / REQUESTED_CHECKPOINT
    trainer.save_checkpoint(path)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            # It would save the same state again at the end of the epoch.
            callback._last_global_step_saved = trainer.global_step
    if trainer.is_global_zero:
        logger.info("Saved %s after %d steps, as requested.", path, trainer.global_step)


def _end_fit(trainer: Trainer) -> None:
    """Let `fit` return after the current batch."""
    trainer.should_stop = True
    # Lightning would first train for these.
    trainer.fit_loop.min_epochs = 0
    trainer.fit_loop.epoch_loop.min_steps = None
