"""The reference trainer: data-parallel training of a small GPT on a data plane.

A step takes the next batch, computes gradients, sums them over all ranks with one all-reduce, and updates the weights
with AdamW. The loss of every token goes to the data plane, which reduces it per domain in the background. On a GPU, no
part of a step waits for the device.

Every rank holds a full replica of the model, so a checkpoint can be resumed with any number of ranks.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.packing.check_packing import unused_balance_of_reference_trainer
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.plane_state import STATE_KEY
from mixtera_hpc.dataplane.reading.lane_count import lanes_in_use
from mixtera_hpc.dataplane.resume.run_edits import is_abandoned, read_run_edits
from mixtera_hpc.dataplane.steps.step_log import StepLog, StepTiming
from mixtera_hpc.errors import CommError, ConfigError, MixtureError, SavedAndStopped
from mixtera_hpc.integrations.device_staging import DeviceStage
from mixtera_hpc.integrations.process_group import Replicas
from mixtera_hpc.track.event_types import AttemptEvent
from mixtera_hpc.track.tracker import MultiTracker, Tracker, open_tracker
from mixtera_hpc.training.adamw import AdamW, ParameterGroup
from mixtera_hpc.training.batch_loss import DeviceBatch, batch_loss, stage_batch
from mixtera_hpc.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from mixtera_hpc.training.distributed import GradientBuffer
from mixtera_hpc.training.model import GPT, build_model
from mixtera_hpc.training.schedule import learning_rate
from mixtera_hpc.training.validator import Validator

logger = logging.getLogger("mixtera_hpc")

__all__ = ["StepObserver", "Trainer", "TrainerContext", "run_training"]

ADAM_BETAS = (0.9, 0.95)

MODEL_SETTINGS = ("num_layers", "num_heads", "embedding_dim")
"""Keys of `training` that define the shapes of the weights. A resumed run must not change them."""


class StepObserver(Tracker, Protocol):
    """Receives the progress of a run: every finished step on each rank, and all metric events on rank 0."""

    def step(self, number: int) -> None:
        """Note that `number` steps are finished on this rank."""
        ...


def run_training(
    config: Config, comm: Communicator, folder: RunFolder, attempt: int, observer: StepObserver | None = None
) -> None:
    """Train from the newest checkpoint of `folder`, or from the start, to `training.num_steps`. **Collective.**

    Args:
        config: the composed configuration of the run.
        comm: the communicator of all ranks of the job.
        folder: the run folder, which receives metrics, journal and checkpoints.
        attempt: number of this attempt of the run, from 1.
        observer: receives the progress, for example to display it.

    Raises:
        ConfigError: the configuration cannot be trained with, or does not match the checkpoint.
        MixtureError: the data do not suffice for a single step.
        SavedAndStopped: a stop was requested and the state is saved.
    """
    _check_trainable(config)
    if comm.rank == 0 and (warning := unused_balance_of_reference_trainer(config.dataplane, config.training)):
        logger.warning(warning)
    torch.set_num_threads(config.training.num_threads)

    tracker = open_tracker(config, folder, rank=comm.rank, attempt=attempt)
    if observer and comm.rank == 0:
        tracker = MultiTracker([tracker, observer])

    replicas = Replicas(comm, config.training.device)
    with DataPlane.open(config, comm=comm, folder=folder, attempt=attempt, tracker=tracker) as plane:
        context = TrainerContext(
            config=plane.config, folder=folder, tracker=tracker, observer=observer, replicas=replicas, plane=plane
        )
        trainer = Trainer(context)
        trainer.restore()
        stop_message = trainer.train()
        replicas.close()
    tracker.close()

    if stop_message:
        raise SavedAndStopped(stop_message)


def _check_trainable(config: Config) -> None:
    """Raise ConfigError if the reference trainer cannot train with `config`."""
    if config.dataplane.tokenizer is None and config.dataplane.vocab_size is None:
        raise ConfigError(
            "dataplane.tokenizer is not set, but the reference trainer predicts tokens.\n"
            "  Set dataplane.tokenizer to the path of a tokenizer.json."
        )
    if config.mixture.unit != "tokens":
        raise ConfigError(
            f"mixture.unit is {config.mixture.unit}, but the reference trainer predicts tokens.\n"
            "  Set mixture.unit=tokens, or run your own trainer with job.command."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerContext:
    """The parts of a run that a `Trainer` works with."""

    config: Config
    folder: RunFolder
    tracker: Tracker
    observer: StepObserver | None
    replicas: Replicas
    plane: DataPlane


class Trainer:
    """The model replica of one rank and the loop that trains it. Every rank makes the same calls."""

    def __init__(self, context: TrainerContext) -> None:
        """Build the model, the optimizer and the validator. **Collective.**"""
        config = context.config
        self._config = config
        self._training = config.training
        self._folder = context.folder
        self._tracker = context.tracker
        self._observer = context.observer
        self._replicas = context.replicas
        self._plane = context.plane

        model = build_model(config.training, self._plane.vocab_size, config.dataplane.seq_len)
        self._model = model.to(self._replicas.device)
        self._stage = DeviceStage(self._replicas.device)
        self._gradients = GradientBuffer(self._model)
        groups = _parameter_groups(self._model, config.training.weight_decay)
        self._optimizer = AdamW(groups, betas=ADAM_BETAS, fused=self._on_gpu)

        self._log = StepLog(self._tracker, num_ranks=self._comm.size, log_every=config.training.log_every)
        self._validator = Validator(self._plane, self._replicas, self._tracker)
        self._step = 0
        """Number of finished steps."""
        self._saved_step: int | None = None
        """Value of `_step` in the newest checkpoint that this attempt wrote or loaded."""

    @property
    def _comm(self) -> Communicator:
        return self._replicas.comm

    @property
    def _on_gpu(self) -> bool:
        return self._replicas.device.type == "cuda"

    def restore(self) -> None:
        """Continue from the newest complete checkpoint, if there is one. **Collective.**

        Raises:
            ConfigError: the model or the data of the run differ from those of the checkpoint.
            DataError: all checkpoints are damaged.
        """
        checkpoint = self._load_checkpoint()
        if checkpoint is None:
            return
        self._plane.load_state_dict({STATE_KEY: checkpoint.dataplane})
        _check_same_model(checkpoint, self._model_settings())
        self._model.load_state_dict(dict(checkpoint.model))
        self._optimizer.load_state_dict(dict(checkpoint.optimizer))
        self._step = checkpoint.step
        self._saved_step = checkpoint.step

    def train(self) -> str | None:
        """Train to the last step, the end of the data or an agreed stop; save a checkpoint at the end. **Collective.**

        Returns:
            The message for the user after an agreed stop, else None.
        """
        self._tracker.log("attempts", self._attempt_event())
        batches = self._plane.batches(pause_to_save=True)
        while self._step < self._training.num_steps:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None and self._plane.is_interrupted:
                if (stop_message := self._answer_interruption()) is not None:
                    return stop_message
                batches = self._plane.batches(pause_to_save=True)
                continue
            if batch is None:
                self._report_end_of_data()
                break

            self._train_step(batch)
            if self._observer:
                self._observer.step(self._step)
            # All ranks get the same answers: the data plane agrees on requests with the reduction of a step.
            stop = self._plane.stop_requested()
            save = self._plane.save_requested()
            self._log_step(batch.step, time.perf_counter() - started)
            self._validator.validate_if_due(self._step, self._model)

            if self._step == self._training.num_steps:
                break
            stop = stop or self._step == self._training.stop_after
            if stop or save or self._checkpoint_is_due():
                self._save_checkpoint()
            if stop:
                return self._stop_message()

        self._validator.validate_if_due(self._step, self._model, is_last=True)
        self._save_checkpoint()
        return None

    def _answer_interruption(self) -> str | None:
        """Save while a batch does not come; return the message for the user after a stop. **Collective.**"""
        stop = self._plane.stop_requested()
        if self._plane.save_requested() or stop:
            self._save_checkpoint()
        return self._stop_message() if stop else None

    def _train_step(self, batch: Batch) -> None:
        """Update the weights with one global batch; `batch` is this rank's part of it. **Collective.**"""
        if batch.step != self._step:
            raise CommError(f"The data plane served step {batch.step}, but the trainer expected step {self._step}.")

        self._gradients.zero()
        staged = stage_batch(self._stage, batch, self._training.attention)
        # A batch ramp changes the sequences of a step, and so the number of micro-batches.
        num_sequences = len(batch.positions)
        micro_batch_size = self._training.micro_batch_size or num_sequences
        for start in range(0, num_sequences, micro_batch_size):
            self._backward(batch, staged, slice(start, start + micro_batch_size))
        self._gradients.average(self._replicas)
        self._gradients.clip(self._training.grad_clip)

        self._optimizer.step(learning_rate(self._step, self._training))
        self._step += 1

    def _backward(self, batch: Batch, staged: DeviceBatch, rows: slice) -> None:
        """Add the gradients of some sequences of a batch, and record their losses in the data plane."""
        loss = batch_loss(self._model, staged, rows)
        weighted = loss
        if staged.loss_weights is not None:
            weighted = loss * staged.loss_weights[rows, None]
        self._gradients.backward(weighted, staged.loss_mask[rows])
        self._plane.record(batch, loss.detach(), rows=rows)

    def _log_step(self, step: int, step_s: float) -> None:
        """Log the timing of `step`, and the losses of all steps whose reduction has completed."""
        timing = StepTiming(
            step=step,
            step_s=step_s,
            data_wait_s=self._plane.data_wait_s,
            learning_rate=learning_rate(step, self._training),
        )
        self._log.add_timing(timing)
        self._log.add_statistics(self._plane.completed_statistics())

    def _report_end_of_data(self) -> None:
        """Warn that the run is shorter than configured.

        Raises:
            MixtureError: the data do not suffice for a single step.
        """
        mixture = self._config.mixture
        max_epochs = "null" if mixture.max_epochs is None else mixture.max_epochs
        message = (
            f"The data ended after {self._step} of training.num_steps={self._training.num_steps} steps, because of "
            f"mixture.on_exhausted={mixture.on_exhausted} and mixture.max_epochs={max_epochs}.\n"
            "  Run mixtera-hpc plan to see when each domain runs out. To train longer, start a new run with a higher "
            "max_epochs of the mixture or of that domain."
        )
        if self._step == 0:
            raise MixtureError(message)
        if self._comm.rank == 0:
            logger.warning(message)

    def _checkpoint_is_due(self) -> bool:
        every_steps = self._config.checkpoint.every_steps
        return every_steps > 0 and self._step % every_steps == 0

    def _save_checkpoint(self) -> None:
        """Write a checkpoint on rank 0; all ranks continue when it is on disk. **Collective.**"""
        if self._saved_step == self._step:
            return
        self._replicas.check_identical(self._model)
        state = self._plane.state_dict()

        # state_dict() waited for the reduction of all finished steps, so their metrics are complete: a resumed attempt
        # logs no step twice.
        self._log.add_statistics(self._plane.completed_statistics())
        self._log.flush()

        if self._comm.rank == 0:
            checkpoint = Checkpoint(
                step=self._step,
                model_settings=self._model_settings(),
                model=self._model.state_dict(),
                optimizer=self._optimizer.state_dict(),
                dataplane=state[STATE_KEY],
            )
            write_checkpoint(self._folder, checkpoint, self._config.checkpoint.keep)
        self._comm.Barrier()
        self._saved_step = self._step

    def _load_checkpoint(self) -> Checkpoint | None:
        """Load the newest usable checkpoint: rank 0 selects it, every rank reads it. **Collective.**"""
        checkpoint = self._select_checkpoint() if self._comm.rank == 0 else None

        # -1 tells the other ranks that there is no checkpoint.
        step = np.array([checkpoint.step if checkpoint else -1], np.int64)
        self._comm.Bcast(step)
        if step[0] < 0 or checkpoint:
            return checkpoint
        return read_checkpoint(self._folder.checkpoint(int(step[0])))

    def _select_checkpoint(self) -> Checkpoint | None:
        """Load the newest complete checkpoint that no later edit of the run has abandoned."""
        run_edits = read_run_edits(self._folder.decisions)
        return load_newest_checkpoint(self._folder, lambda state: not is_abandoned(state, run_edits))

    def _model_settings(self) -> dict[str, Any]:
        return {f"training.{name}": getattr(self._training, name) for name in MODEL_SETTINGS}

    def _attempt_event(self) -> AttemptEvent:
        """Describe this attempt for `attempts.jsonl`. **Collective.**"""
        device = self._replicas.device
        is_first_of_node = np.array([self._comm.local_rank == 0], np.int64)
        cpu_name = f"cpu × {self._training.num_threads}"
        return {
            "step": self._step,
            "num_steps": self._training.num_steps,
            "num_ranks": self._comm.size,
            "num_nodes": int(self._comm.Allreduce(is_first_of_node)[0]),
            "hostname": self._comm.hostname,
            "device": torch.cuda.get_device_name(device) if self._on_gpu else cpu_name,
            "num_parameters": self._model.num_parameters,
            "vocab_size": self._plane.vocab_size,
            "seq_len": self._config.dataplane.seq_len,
            "global_batch_size": self._config.dataplane.global_batch_size,
            "lanes": lanes_in_use(self._plane.config.dataplane),
            "domains": self._plane.domain_names,
        }

    def _stop_message(self) -> str:
        return (
            f"Stopped after {self._step} of {self._training.num_steps} steps. The state is saved in "
            f"{self._folder.checkpoints}.\n"
            f"  Continue with: mixtera-hpc resume {self._folder.name}/{self._folder.run_id}"
        )


def _check_same_model(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the checkpoint was written with other sizes of the model."""
    for name, saved in checkpoint.model_settings.items():
        if settings.get(name) != saved:
            raise ConfigError(
                f"{name} is {settings.get(name)}, but the checkpoint of step {checkpoint.step} was written with "
                f"{saved}.\n  Set {name}={saved}, or start a new run."
            )


def _parameter_groups(model: GPT, weight_decay: float) -> list[ParameterGroup]:
    """Split the parameters for AdamW: matrices have weight decay, the gains of layer norms do not."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    gains = [parameter for parameter in parameters if parameter.ndim < 2]
    return [
        ParameterGroup(parameters=matrices, weight_decay=weight_decay),
        ParameterGroup(parameters=gains, weight_decay=0.0),
    ]
