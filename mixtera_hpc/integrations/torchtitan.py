"""`TitanTrainer`: torchtitan's `Trainer` on the batches of a data plane, with losses per domain. For torchtitan 0.3.

A function of a config registry returns its configuration, and torchtitan's own entry point runs it:

    def my_run() -> TitanTrainer.Config:
        return TitanTrainer.Config(
            model_spec=model_registry("8B"),
            loss=PerTokenCrossEntropy.Config(),
            dataloader=PlaneDataLoader.Config(overrides=["experiment=demo"]),
        )

    torchrun --nproc-per-node 8 -m torchtitan.train --module my_package.my_module --config my_run

Every layout of ranks works: those with the same index in torchtitan's `batch` mesh get the same sequences.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader, DataloaderExhaustedError
from torchtitan.components.loss import BaseLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.loss_weights import refuse_loss_weights
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.integrations.torchtitan_data import PLANE_BATCH, NoTokenizer, PlaneDataLoader
from mixtera_hpc.integrations.torchtitan_loss import PerTokenCrossEntropy, innermost_loss, record_losses, token_slices
from mixtera_hpc.integrations.torchtitan_validation import HeldOutValidator

__all__ = ["HeldOutValidator", "NoTokenizer", "PerTokenCrossEntropy", "PlaneDataLoader", "TitanTrainer"]

MESH_DIMS = ["pp", "batch", "cp", "tp"]
"""The dimensions of torchtitan's mesh of all ranks; batches differ along `batch`."""


class TitanTrainer(Trainer):
    """torchtitan's `Trainer`, fed by a data plane.

    It opens the data plane in `dump_folder`, records the loss of every token, logs losses and weights of the domains,
    and saves and stops when a signal or a control file asks for it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """The options of torchtitan's `Trainer`; four of them have other defaults."""

        tokenizer: BaseTokenizer.Config = field(default_factory=NoTokenizer.Config)
        dataloader: BaseDataLoader.Config = field(default_factory=PlaneDataLoader.Config)
        loss: BaseLoss.Config = field(default_factory=PerTokenCrossEntropy.Config)
        validator: Validator.Config = field(default_factory=HeldOutValidator.Config)

    plane: DataPlane
    """The open data plane."""

    def __init__(self, config: Config) -> None:
        self._statistics: list[DomainStatistics] = []
        self._is_stopping = False
        try:
            super().__init__(config)
        except BaseException as error:
            if hasattr(self, "plane"):
                self.plane.__exit__(type(error), error, error.__traceback__)
            raise

    def init_distributed(self) -> ParallelDims:
        """Join the process group and open the data plane, before the model is built. **Collective.**"""
        _check_components(self.config)
        if dist.is_initialized():
            # torchtitan does this where it creates the group: its meshes are local to a thread.
            torch.autograd.set_multithreading_enabled(False)
        parallel_dims = super().init_distributed()
        self.plane = _open_plane(self.config, parallel_dims)
        _check_vocabulary(self.plane, self.config.model_spec.model)
        self.config.dataloader._plane = self.plane
        self.config.validator._plane = self.plane
        return parallel_dims

    def forward_backward_step(
        self, *, input_dict: Any, labels: Tensor | list[Tensor], global_valid_tokens: Tensor
    ) -> Tensor:
        """Train on a micro-batch, or with pipeline parallelism on all of a group, and record its losses."""
        has_pipeline = self.parallel_dims.pp_enabled
        batches = [inputs.pop(PLANE_BATCH) for inputs in (input_dict if has_pipeline else [input_dict])]
        losses = innermost_loss(self.loss_fn).training
        losses.start()
        loss: Tensor = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        if not has_pipeline or self.pp_has_last_stage:
            for batch, of_batch in zip(batches, losses.micro_batches(len(batches)), strict=True):
                self.record_losses(batch, of_batch)
        return loss

    def record_losses(self, batch: Mapping[str, Any], losses: Tensor) -> None:
        """Record the losses of a micro-batch.

        Args:
            batch: what `PlaneDataset` yielded.
            losses: nats, of the tokens that this rank trained on; shape (B, T), or with context parallelism a part.
        """
        slices = token_slices(self.config.parallelism, self.parallel_dims, self.config.training.seq_len)
        record_losses(self.plane, batch, losses, slices)

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """Train on one global batch, then save if that was requested. **Collective.**"""
        try:
            super().train_step(data_iterator)
        except DataloaderExhaustedError:
            if self.plane.is_interrupted:
                # A stop was requested while no batch came: this step has not begun.
                self.step -= 1
                self._save_now()
            raise
        self._statistics += self.plane.completed_statistics()
        if self.metrics_processor.should_log(self.step):
            self._log_domains()
        self._is_stopping = self.plane.stop_requested()
        if self._is_stopping or self.plane.save_requested():
            self._save_now()

    def should_continue_training(self) -> bool:
        """Return False after the last step, or when a stop was requested."""
        if self._is_stopping:
            logger.info("Stopped after step %d, as requested.", self.step)
            self.checkpointer.maybe_wait_for_saving()
            return False
        return bool(super().should_continue_training())

    def close(self) -> None:
        """Free everything; called while an exception is handled, name this rank and end all ranks."""
        error = sys.exception()
        try:
            super().close()
        finally:
            self.plane.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def _log_domains(self) -> None:
        names = self.plane.domain_names
        metrics = domain_losses(self._statistics, names, "train_loss")
        metrics |= {f"weight/{names[i]}": float(weight) for i, weight in enumerate(self.plane.weights)}
        self.metrics_processor.logger.log(metrics, self.step)
        self._statistics.clear()

    def _save_now(self) -> None:
        """Save a whole checkpoint of this step, unless torchtitan is about to do so. **Collective.**"""
        checkpointer = self.checkpointer
        if not checkpointer.enable or checkpointer.load_only:
            logger.warning("A save was requested, but checkpoint.enable is False or checkpoint.load_only is True.")
        elif self.step % checkpointer.interval and self.step != self.config.training.steps:
            interval = checkpointer.interval
            # torchtitan saves only multiples of the interval.
            checkpointer.interval = 1
            checkpointer.save(self.step)
            checkpointer.interval = interval


def _open_plane(config: TitanTrainer.Config, parallel_dims: ParallelDims) -> DataPlane:
    """Open the data plane for torchtitan's layout of ranks. **Collective.**

    Raises:
        ConfigError: the configurations of torchtitan and of the data plane contradict each other.
    """
    data = compose(config.dataloader.overrides)
    mesh = parallel_dims.get_optional_mesh(MESH_DIMS, include_singleton_axes=True)
    refuse_loss_weights(data.mixture, "TitanTrainer")
    _check_sizes(data, config.training, mesh["batch"].size())
    folder = RunFolder(Path(config.dump_folder))
    return DataPlane.open(data, folder=folder, mesh=mesh, data_dims=("batch",), loss_parts=("cp",))


def _check_components(config: TitanTrainer.Config) -> None:
    needed = {
        "dataloader": (config.dataloader, PlaneDataLoader.Config),
        "loss": (innermost_loss(config.loss), PerTokenCrossEntropy.Config),
        "validator": (config.validator, HeldOutValidator.Config),
    }
    for name, (component, expected) in needed.items():
        if not isinstance(component, expected):
            raise ConfigError(
                f"{name} is a {type(component).__qualname__}, but TitanTrainer needs a {expected.__qualname__}.\n"
                f"  Set {name}={expected.__qualname__}(...)."
            )
    if config.parallelism.spmd_backend == "full_dtensor":
        raise ConfigError(
            "parallelism.spmd_backend=full_dtensor hides the losses of tokens.\n"
            "  Set it to spmd_types or partial_dtensor."
        )
    parallelism = config.parallelism
    if parallelism.context_parallel_degree > 1 and parallelism.context_parallel_load_balancer == "ptrr":
        raise ConfigError(
            "parallelism.context_parallel_load_balancer=ptrr gives each rank other tokens in every step.\n"
            "  Set it to headtail, or to None."
        )
    if config.validator.steps != -1:
        raise ConfigError(
            f"validator.steps={config.validator.steps}, but the data plane knows how much is held out.\n"
            f"  Remove it, and add training.validate_steps={config.validator.steps} to dataloader.overrides."
        )


def _check_sizes(data: Config, training: TrainingConfig, num_groups: int) -> None:
    """Raise ConfigError if torchtitan expects other batches than the data plane serves."""
    plane = data.dataplane
    if data.mixture.unit != "tokens":
        raise ConfigError(
            f"mixture.unit={data.mixture.unit}, but torchtitan trains on tokens.\n  Set mixture.unit=tokens."
        )
    if training.seq_len != plane.seq_len:
        raise ConfigError(
            f"training.seq_len={training.seq_len}, but dataplane.seq_len={plane.seq_len}.\n"
            "  Set both to the same number of tokens."
        )
    if plane.batch_schedule:
        raise ConfigError(
            "dataplane.batch_schedule is set, but all steps of a torchtitan run accumulate the same number of "
            "micro-batches.\n  Remove it. To enlarge the batch, resume with --change-batch-size and another "
            "training.global_batch_size."
        )
    micro_batches = training.local_batch_size * num_groups
    expected = training.global_batch_size if training.global_batch_size > 0 else micro_batches
    if expected != plane.global_batch_size or expected % micro_batches:
        raise ConfigError(
            f"torchtitan trains on {expected} sequences per step (training.local_batch_size="
            f"{training.local_batch_size}, {num_groups} data-parallel ranks, training.global_batch_size="
            f"{training.global_batch_size}), but dataplane.global_batch_size={plane.global_batch_size}.\n"
            f"  Set training.global_batch_size and dataplane.global_batch_size to one multiple of {micro_batches}; "
            "a larger one accumulates gradients."
        )


def _check_vocabulary(plane: DataPlane, model: Any) -> None:
    """Raise ConfigError if the data has tokens that the model does not know."""
    size = getattr(model, "vocab_size", None)
    if size is not None and size < plane.vocab_size:
        raise ConfigError(
            f"The tokenizer has {plane.vocab_size} tokens, but the model knows {size}.\n"
            "  Set dataplane.tokenizer to that of the model, or enlarge the model's vocab_size."
        )
