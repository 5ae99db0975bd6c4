"""The reference trainer: next batch, gradients, one all-reduce, AdamW; and on the way losses to the data plane.

On a GPU nothing in a step waits for the device: losses reach the metrics through the data plane's asynchronous reduction. A
rank's state is a full replica, so a run continues on any number of ranks.
"""

import time
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.run_edits import is_abandoned, pin_index_generation, read_run_edits
from mixtera_hpc.errors import CommError, ConfigError, MixtureError, SavedAndStopped
from mixtera_hpc.track.event_types import AttemptEvent
from mixtera_hpc.track.tracker import MultiTracker, Tracker, open_tracker
from mixtera_hpc.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from mixtera_hpc.training.distributed import GradientBuffer, Replicas
from mixtera_hpc.training.model import GPT, build_model
from mixtera_hpc.training.schedule import learning_rate
from mixtera_hpc.training.step_log import StepLog, StepTiming
from mixtera_hpc.training.validator import Validator

__all__ = ["Observer", "run_training"]


class Observer(Tracker, Protocol):
    """Somebody who wants to know how far this rank is."""

    def step(self, number: int) -> None:
        """`number` steps are done."""
        ...


def run_training(
    config: Config, comm: Communicator, folder: RunFolder, attempt: int, observer: Observer | None = None
) -> None:
    """Train from the newest checkpoint of `folder`, or from the start, to `training.num_steps`. **Collective.**

    Args:
        observer: told of every step on this rank, and on rank 0 of every metric event.

    Raises:
        ConfigError: the configuration cannot train, or does not fit the checkpoint.
        SavedAndStopped: a stop was requested and the state is saved.
    """
    if config.dataplane.tokenizer is None and config.dataplane.vocab_size is None:
        raise ConfigError("dataplane.tokenizer is not set; the trainer predicts tokens. Give a tokenizer.json.")
    if config.mixture.unit != "tokens":
        raise ConfigError(
            f"mixture.unit is {config.mixture.unit}, but the reference trainer predicts tokens. Set mixture.unit=tokens, or give "
            "your own trainer with job.command."
        )
    torch.set_num_threads(config.training.num_threads)
    config = pin_index_generation(config, folder.journal)
    tracker = open_tracker(config, folder, rank=comm.rank, attempt=attempt)
    if observer and comm.rank == 0:
        tracker = MultiTracker([tracker, observer])
    replicas = Replicas(comm, config.training.device)
    with DataPlane.open(config, comm=comm, folder=folder, attempt=attempt, tracker=tracker) as plane:
        trainer = Trainer(
            TrainerContext(config=config, folder=folder, tracker=tracker, observer=observer), replicas, plane
        )
        trainer.restore()
        stopped = trainer.train()
        replicas.close()
    tracker.close()
    if stopped:
        raise SavedAndStopped(stopped)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerContext:
    """What a trainer is told."""

    config: Config
    folder: RunFolder
    tracker: Tracker
    observer: Observer | None


class Trainer:
    """One rank's replica of the model, and the loop that trains it."""

    def __init__(self, setting: TrainerContext, replicas: Replicas, plane: DataPlane) -> None:
        config = setting.config
        self._config, self._training, self._folder = config, config.training, setting.folder
        self._tracker, self._replicas, self._plane = setting.tracker, replicas, plane
        self._observer = setting.observer
        self._model = build_model(config.training, plane.vocab_size, config.dataplane.seq_len).to(replicas.device)
        self._gradients = GradientBuffer(self._model)
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._model, config.training.weight_decay),
            betas=(0.9, 0.95),
            fused=replicas.device.type == "cuda",
        )
        self._log = StepLog(setting.tracker, num_ranks=replicas.comm.size, log_every=config.training.log_every)
        self._validator = Validator(config, replicas, setting.tracker)
        self._step = 0
        self._saved_step: int | None = None

    def restore(self) -> None:
        """Continue from the newest complete checkpoint, if there is one. **Collective.**

        Raises:
            ConfigError: the model or the data is not that of the checkpoint.
        """
        found = self._agreed_checkpoint()
        if found is None:
            return
        self._plane.load_state_dict(found.dataplane)
        facts = self._facts()
        for name, value in found.facts.items():
            if facts.get(name) != value:
                raise ConfigError(
                    f"{name} is {facts.get(name)}, but the checkpoint of step {found.step} was written with {value}.\n"
                    f"  Set {name}={value}, or start a new run."
                )
        self._model.load_state_dict(dict(found.model))
        self._optimizer.load_state_dict(dict(found.optimizer))
        self._step = self._saved_step = found.step

    def train(self) -> str | None:
        """Train until the end, the end of the data or an agreed stop; says why when it was a stop. **Collective.**"""
        self._tracker.log("attempts", self._attempt_event())
        batches = iter(self._plane)
        while self._step < self._training.num_steps:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                self._data_ended()
                break
            self._take_step(batch)
            if self._observer:
                self._observer.step(self._step)
            stop, save = self._plane.stop_requested(), self._plane.save_requested()
            self._note(batch.step, time.perf_counter() - began)
            self._validator.after(self._step, self._model)
            if self._step == self._training.num_steps:
                break
            stop = stop or self._step == self._training.stop_after
            if stop or save or (self._training.checkpoint_every and self._step % self._training.checkpoint_every == 0):
                self._save()
            if stop:
                return self._stop_message()
        self._validator.after(self._step, self._model, at_end=True)
        self._save()
        return None

    def _data_ended(self) -> None:
        """Say that the run is shorter than it was asked to be.

        Raises:
            MixtureError: there is not a single step in the data.
        """
        mixture = self._config.mixture
        told = (
            f"The data ended after {self._step} of training.num_steps={self._training.num_steps} steps: "
            f"mixture.on_exhausted is {mixture.on_exhausted}, mixture.max_epochs {mixture.max_epochs}.\n"
            "  See which domain runs out when with mixtera-hpc plan; a new run can have a higher max_epochs, of the mixture or of that domain."
        )
        if self._step == 0:
            raise MixtureError(told)
        if self._replicas.comm.rank == 0:
            warnings.warn(told, stacklevel=2)

    def _take_step(self, batch: Batch) -> None:
        if batch.step != self._step:
            raise CommError(f"The data plane served step {batch.step}, the trainer expected step {self._step}.")
        self._gradients.zero()
        size = self._training.micro_batch_size or self._plane.local_batch_size
        for first in range(0, self._plane.local_batch_size, size):
            self._backward(batch, slice(first, first + size))
        self._gradients.average(self._replicas)
        self._gradients.clip(self._training.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, self._training)
        self._optimizer.step()
        self._step += 1

    def _backward(self, batch: Batch, rows: slice) -> None:
        """Add the gradients of some sequences' summed losses, over the tokens that count, and record these losses."""
        tokens, counted = self._to_device(batch.tokens[rows]), self._to_device(batch.loss_mask[rows])
        device = self._replicas.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = self._model(tokens)
        self._gradients.add(loss, counted)
        self._plane.record(batch, loss.detach(), rows)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.tensor(array)
        if self._replicas.device.type == "cuda":
            return tensor.pin_memory().to(self._replicas.device, non_blocking=True)
        return tensor

    def _note(self, step: int, step_s: float) -> None:
        rate = learning_rate(step, self._training)
        waited = self._plane.data_wait_s
        self._log.timed(StepTiming(step=step, step_s=step_s, data_wait_s=waited, learning_rate=rate))
        self._log.completed(self._plane.completed_statistics())

    def _save(self) -> None:
        """Write a checkpoint; every rank goes on only once it is on disk. **Collective.**"""
        if self._saved_step == self._step:
            return
        self._replicas.check_identical(self._model)
        state = self._plane.state_dict()
        self._log.completed(self._plane.completed_statistics())
        self._log.flush()
        if state is not None and self._replicas.comm.rank == 0:
            checkpoint = Checkpoint(
                step=self._step,
                facts=self._facts(),
                model=self._model.state_dict(),
                optimizer=self._optimizer.state_dict(),
                dataplane=state,
            )
            write_checkpoint(self._folder.checkpoints, checkpoint, self._training.keep_checkpoints)
        self._replicas.comm.Barrier()
        self._saved_step = self._step

    def _agreed_checkpoint(self) -> Checkpoint | None:
        """The newest complete checkpoint as rank 0 sees it; every rank reads the same one. **Collective.**"""
        comm, folder = self._replicas.comm, self._folder.checkpoints
        found = None
        if comm.rank == 0:
            operated = read_run_edits(self._folder.decisions)
            found = load_newest_checkpoint(folder, lambda state: not is_abandoned(state, operated))
        step = np.array([found.step if found else -1], np.int64)
        comm.Bcast(step)
        if step[0] < 0 or found:
            return found
        return read_checkpoint(checkpoint_path(folder, int(step[0])))

    def _facts(self) -> dict[str, Any]:
        """Settings that a checkpoint cannot be loaded without."""
        names = ("num_layers", "num_heads", "embedding_dim")
        return {f"training.{name}": getattr(self._training, name) for name in names}

    def _attempt_event(self) -> AttemptEvent:
        comm, device = self._replicas.comm, self._replicas.device
        on_gpu = device.type == "cuda"
        return {
            "step": self._step,
            "num_steps": self._training.num_steps,
            "num_ranks": comm.size,
            "num_nodes": int(comm.Allreduce(np.array([comm.local_rank == 0], np.int64))[0]),
            "hostname": comm.hostname,
            "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu × {self._training.num_threads}",
            "num_parameters": self._model.num_parameters,
            "vocab_size": self._plane.vocab_size,
            "seq_len": self._config.dataplane.seq_len,
            "global_batch_size": self._config.dataplane.global_batch_size,
            "domains": self._plane.domain_names,
        }

    def _stop_message(self) -> str:
        name = f"{self._folder.name}/{self._folder.run_id}"
        return (
            f"Stopped after {self._step} of {self._training.num_steps} steps; the state is saved in {self._folder.checkpoints}.\n"
            f"  Go on with: mixtera-hpc resume {name}"
        )


def _parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, the gains of norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
