"""Checks that the arguments of the Hugging Face `Trainer` fit a data plane; others are refused with the cure."""

import logging
from collections.abc import Mapping
from typing import Any

from mixtera_hpc.config.packing.check_packing import unused_balance
from mixtera_hpc.dataplane.mixing.loss_weights import refuse_loss_weights
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError, pluralize

__all__ = [
    "check_positions",
    "check_trainer_arguments",
    "check_training_arguments",
    "check_vocabulary",
    "warn_of_unused_balance",
]

logger = logging.getLogger("mixtera_hpc")

_REQUIRED_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (
        False,
        "A retry would need batches that were served already. To save memory, lower per_device_train_batch_size and "
        "raise gradient_accumulation_steps.",
    ),
    "average_tokens_across_devices": (
        True,
        "The loss of a step is the mean over the counted tokens of the global batch, for any number of ranks.",
    ),
    "data_seed": (None, "The order of the data is that of dataplane.seed."),
    "dataloader_num_workers": (
        0,
        "Each worker process would open its own data plane. To read in several processes, set dataplane.workers.",
    ),
    "enable_jit_checkpoint": (
        False,
        "The data plane saves and stops on a signal by itself, on all ranks after the same step.",
    ),
    "group_by_length": (False, "The data plane decides the order, and all sequences have the same length."),
    "label_smoothing_factor": (
        0.0,
        "The data plane needs the cross-entropy of every token. For another loss, override token_losses().",
    ),
    "train_sampling_strategy": ("random", "The data plane decides the order; see dataplane.shuffle."),
}
"""Argument → the only value that works, and why or what else to set. Some versions lack some of them."""

_REQUIRED_LOADER_SETTINGS: dict[str, bool] = {"split_batches": True, "dispatch_batches": True}
"""Setting of `accelerator_config` → the value that is refused."""


def check_trainer_arguments(plane: DataPlane, args: Any, arguments: Mapping[str, Any], held_out: Any) -> None:
    """Raise ConfigError if arguments of the constructor of a `Trainer` do not fit the data plane.

    Args:
        plane: the data plane to train on.
        args: `TrainingArguments`, or None.
        arguments: the other arguments, by name.
        held_out: the dataset of the held-out samples.
    """
    if plane.config.mixture.unit != "tokens":
        raise ConfigError(
            f"mixture.unit is {plane.config.mixture.unit}, but PlaneTrainer predicts tokens.\n"
            "  Set mixture.unit=tokens, or write the training loop yourself."
        )
    refuse_loss_weights(plane.config.mixture, "PlaneTrainer")
    if arguments.get("train_dataset") is not None:
        raise ConfigError("PlaneTrainer got a train_dataset, but it trains on the data plane.\n  Leave it out.")
    if arguments.get("compute_loss_func") is not None:
        raise ConfigError(
            "PlaneTrainer got a compute_loss_func, but the data plane needs the loss of every token.\n"
            "  Override PlaneTrainer.token_losses() instead."
        )
    eval_dataset = arguments["eval_dataset"]
    if arguments.get("compute_metrics") is not None and eval_dataset is held_out:
        raise ConfigError(
            "PlaneTrainer got compute_metrics, but the evaluation on held-out data has only losses.\n"
            "  Leave it out, or pass an eval_dataset."
        )
    if eval_dataset is None and args is not None and str(getattr(args.eval_strategy, "value", "no")) != "no":
        raise ConfigError(
            f"TrainingArguments.eval_strategy is {args.eval_strategy.value}, but query.holdout.fraction is 0.\n"
            "  Set query.holdout.fraction, or pass an eval_dataset."
        )


def check_vocabulary(model: Any, plane: DataPlane) -> None:
    """Raise ConfigError if the tokens do not fit the model: on a GPU that ends in an error without a message."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and size < plane.vocab_size:
        raise ConfigError(
            f"The model's vocab_size is {size}, but the tokenizer of the data has {plane.vocab_size} tokens.\n"
            "  Build the model with that vocabulary, or set dataplane.tokenizer to the model's tokenizer."
        )


def check_training_arguments(args: Any, plane: DataPlane) -> None:
    """Raise ConfigError if a `Trainer` with these `TrainingArguments` would not train on the batches of `plane`."""
    _check_ranks(args, plane)
    if args.max_steps <= 0:
        raise ConfigError(
            f"TrainingArguments.max_steps is {args.max_steps}, but the data have no end: their epochs are those of "
            "the domains.\n  Set max_steps to the number of optimizer steps of the whole run."
        )
    for name, (value, explanation) in _REQUIRED_ARGUMENTS.items():
        got = getattr(args, name, value)
        if got != value:
            raise ConfigError(
                f"TrainingArguments.{name} is {got!r}, which a data plane cannot follow.\n"
                f"  Leave it at {value!r}. {explanation}"
            )
    for name, refused in _REQUIRED_LOADER_SETTINGS.items():
        if getattr(args.accelerator_config, name, None) is refused:
            raise ConfigError(
                f"accelerator_config.{name} is {refused}, but the data plane gives every rank its own part of the "
                f"global batch.\n  Leave {name} out."
            )
    _check_batch_size(args, plane)


def _check_ranks(args: Any, plane: DataPlane) -> None:
    """Check that accelerate and the data plane see the same ranks, one per GPU."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"This process would train on {args.n_gpu} GPUs with DataParallel, but a data plane serves one rank per "
            f"GPU.\n  Start {args.n_gpu} processes: torchrun --nproc-per-node {args.n_gpu} …"
        )
    parallelism = getattr(args, "parallelism_config", None)
    sharded = {name: getattr(parallelism, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    if any(size > 1 for size in sharded.values()):
        raise ConfigError(
            f"parallelism_config has {', '.join(f'{name}={size}' for name, size in sharded.items())}, but the data "
            "plane supports only data-parallel ranks under the Hugging Face Trainer.\n"
            "  Set all three to 1 (FSDP works). For other layouts write the loop yourself, with "
            "DataPlane.open(mesh=)."
        )
    num_groups = plane.num_groups
    if args.world_size != num_groups:
        raise ConfigError(
            f"Accelerate sees {pluralize(args.world_size, 'rank')}, but the data plane has "
            f"{pluralize(num_groups, 'data-parallel rank')}.\n"
            "  Open Replicas() before TrainingArguments are created. On CPUs, set use_cpu=True as well. Leave "
            "dataplane.model_parallel_size at 1."
        )


def _check_batch_size(args: Any, plane: DataPlane) -> None:
    """Check that the sequences of one optimizer step are those of one global batch."""
    micro_batch_size = args.per_device_train_batch_size
    accumulation = args.gradient_accumulation_steps
    num_groups = plane.num_groups
    global_batch_size = plane.config.dataplane.global_batch_size
    num_sequences = micro_batch_size * accumulation * num_groups
    if num_sequences != global_batch_size:
        raise ConfigError(
            f"dataplane.global_batch_size is {global_batch_size}, but an optimizer step takes "
            f"per_device_train_batch_size={micro_batch_size} × gradient_accumulation_steps={accumulation} × "
            f"{pluralize(num_groups, 'data-parallel rank')} = {num_sequences} sequences.\n"
            "  Make both numbers equal."
        )


def warn_of_unused_balance(plane: DataPlane) -> None:
    """Log that `dataplane.balance` is of no use to a model that gets nothing but `input_ids`."""
    attention = "PlaneTrainer.model_inputs() gives the model only input_ids, so tokens attend to other documents"
    cure = "Override model_inputs() to pass position_ids, for an attention that stays inside documents"
    if warning := unused_balance(plane.config.dataplane, attention, cure):
        logger.warning(warning)


def check_positions(model: Any, plane: DataPlane) -> None:
    """Raise ConfigError if a sequence has more tokens than the model has positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    seq_len = plane.config.dataplane.seq_len
    if isinstance(positions, int) and positions < seq_len:
        raise ConfigError(
            f"dataplane.seq_len is {seq_len}, but the model's max_position_embeddings is {positions}.\n"
            "  Raise max_position_embeddings (with the model's RoPE scaling, to extend the context), or lower "
            "dataplane.seq_len."
        )
