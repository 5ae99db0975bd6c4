"""Checks that each optimizer step of a Lightning trainer is a step of the data plane."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.dataplane.mixing.loss_weights import describe_loss_weight
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.lightning_batches import LOSS_KEY, HandedOut

__all__ = [
    "check_begin",
    "check_current_batch",
    "check_epoch",
    "check_losses_unneeded",
    "check_no_loss_weights",
    "data_parallel_of",
    "num_micro_batches",
    "restart_step",
]

PROGRESS_COUNTS = ("ready", "started", "processed", "completed")
"""The counts of batches that Lightning keeps, for the epoch and in total."""


def data_parallel_of(trainer: Trainer) -> tuple[int, int] | None:
    """Return data-parallel rank and size if the strategy has model-parallel ranks, else None."""
    layout = trainer.distributed_sampler_kwargs
    if layout is None or layout["num_replicas"] == trainer.world_size:
        return None
    return layout["rank"], layout["num_replicas"]


def num_micro_batches(trainer: Trainer, plane: DataPlane, sizes: Mapping[str, int]) -> int:
    """Return the micro-batches of one batch on this rank.

    Args:
        trainer: the trainer.
        plane: the data plane.
        sizes: sequences of a batch on this rank, by the key that sets them.

    Raises:
        ConfigError: they would not have equal sizes.
    """
    num_micro = int(trainer.accumulate_grad_batches)
    for key, size in sizes.items():
        if size % num_micro:
            raise ConfigError(
                f"{key}={size * plane.num_groups} gives each of {plane.num_groups} data-parallel ranks {size} "
                f"sequences per step, which accumulate_grad_batches={num_micro} does not divide.\n"
                f"  {key} must be micro-batch size × accumulate_grad_batches × data-parallel ranks."
            )
    return num_micro


def check_begin(trainer: Trainer, plane: DataPlane) -> None:
    """Raise ConfigError if the trainer would not begin with the next batch of the run, or would repeat batches."""
    if trainer.overfit_batches:
        raise ConfigError(
            f"Trainer(overfit_batches={trainer.overfit_batches}) repeats batches, but a data plane serves each batch "
            "once.\n  Leave it out. To see few samples many times, select them with query.where."
        )
    is_comparable = trainer.lightning_module.automatic_optimization
    if is_comparable and trainer.global_step != plane.next_step:
        raise ConfigError(
            f"The trainer begins after {trainer.global_step} optimizer steps, but the data plane after "
            f"{plane.next_step}.\n"
            "  To continue a run, pass a checkpoint that was saved with its PlaneDataModule: fit(ckpt_path=…). To "
            "begin a run with trained weights, load only these (load_from_checkpoint), and use a new Trainer."
        )


def restart_step(trainer: Trainer, num_micro: int) -> None:
    """After loading a checkpoint from the middle of a step, let Lightning begin this step again.

    Gradients are not part of a checkpoint, and the data plane serves the whole step again.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    counts = progress.current
    # Lightning counts a batch as completed only after the callbacks that save checkpoints.
    was_saved_by_callback = counts.ready == counts.processed == counts.completed + 1
    num_ended = counts.completed + was_saved_by_callback
    num_extra = num_ended % num_micro
    if num_extra == 0:
        return
    for counts in (progress.current, progress.total):
        for name in PROGRESS_COUNTS:
            setattr(counts, name, getattr(counts, name) - num_extra)
    # Lightning will count the last step once more, for the steps that loggers see.
    loop._batches_that_stepped -= was_saved_by_callback


def check_epoch(trainer: Trainer) -> None:
    """Raise ConfigError if an epoch ends inside of a step: Lightning would then step with a part of the batch."""
    num_batches = trainer.num_training_batches
    if num_batches != float("inf") and num_batches % trainer.accumulate_grad_batches:
        raise ConfigError(
            f"An epoch has {num_batches} batches (limit_train_batches={trainer.limit_train_batches}), which is no "
            f"multiple of accumulate_grad_batches={trainer.accumulate_grad_batches}: the last optimizer step of an "
            "epoch would miss a part of its batch.\n"
            "  Set limit_train_batches to a multiple of accumulate_grad_batches, or leave it out and set max_steps."
        )


def check_current_batch(trainer: Trainer, train: HandedOut | None, batch_idx: int) -> None:
    """Raise ConfigError if a batch is not the one that the trainer must train on, or the optimizer steps too early."""
    if train is None or train.current is None:
        raise ConfigError(
            "A training batch does not come from the data plane.\n"
            "  A subclass of PlaneDataModule may add loaders to its train_dataloader(), but must return that one too."
        )
    if trainer.accumulate_grad_batches != train.num_micro:
        raise ConfigError(
            f"accumulate_grad_batches changed from {train.num_micro} to {trainer.accumulate_grad_batches}, but all "
            "steps of a run have the same number of micro-batches.\n  Remove the GradientAccumulationScheduler."
        )
    is_first_expected = train.num_ended % train.num_micro == batch_idx % train.num_micro
    is_comparable = trainer.lightning_module.automatic_optimization
    if is_comparable and (train.current["step"] != trainer.global_step or not is_first_expected):
        raise ConfigError(
            f"The trainer is at optimizer step {trainer.global_step} and batch {batch_idx}, but this batch belongs to "
            f"step {train.current['step']} of the data plane.\n"
            "  Do not skip batches (on_train_batch_start must not return -1), and do not iterate over the loader "
            "yourself."
        )


def check_losses_unneeded(plane: DataPlane) -> None:
    """Raise ConfigError if the mixture learns from losses; a step had none."""
    if plane.config.mixture.kind == "dynamic":
        raise ConfigError(
            f"The mixture is dynamic, but training_step gave no losses, so the mixture cannot learn.\n"
            f'  Return {{"loss": loss, "{LOSS_KEY}": losses}} with losses of shape (B, T), or call '
            "PlaneDataModule.record() in training_step. Or choose a mixture that does not learn."
        )


def check_no_loss_weights(mixture: MixtureConfig) -> None:
    """Raise ConfigError if a domain has a factor: only `training_step` can multiply the loss with it."""
    if (written := describe_loss_weight(mixture)) is not None:
        raise ConfigError(
            f"{written}, but Lightning does not multiply the loss with it.\n"
            '  In training_step, multiply the losses of each sequence by batch["loss_weights"], return the losses '
            f'without the factor under "{LOSS_KEY}", and set PlaneDataModule(applies_loss_weights=True). Or remove '
            "the factor."
        )
