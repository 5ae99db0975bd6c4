"""`MegatronPretraining`: a data plane inside `pretrain()` of Megatron-LM, whose code stays as it is.

What all ranks do together must happen outside of the pipeline schedule. So `train_step`, `save_checkpoint` and
`evaluate_and_print_results` of `megatron.training.training` are wrapped while the context is open. A fork with a loop
of its own calls `MegatronData` in these places instead.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mixtera_hpc.config.packing.check_packing import unused_balance
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, SavedAndStopped
from mixtera_hpc.integrations.megatron.batch_format import BatchFormat
from mixtera_hpc.integrations.megatron.data import MegatronData, TrainIterator, ValidationIterator

__all__ = ["MegatronPretraining"]

WRAPPED = ("train_step", "save_checkpoint", "evaluate_and_print_results")

STATE_FILE = "train_dataloader_dprank000.pt"
"""The file of Megatron-LM's for the state of the first data-parallel rank, in a folder of each checkpoint."""

STATE_NAME = "dataloader_state_dict"

logger = logging.getLogger("mixtera_hpc")


class MegatronPretraining:
    """The data plane of one call of `pretrain()`.

        from megatron.training import pretrain, training

        with MegatronPretraining(config, RunFolder("runs/my_run"), training) as pretraining:
            pretrain(
                pretraining.datasets_provider,
                model_provider,
                ModelType.encoder_or_decoder,
                forward_step,  # its loss function calls pretraining.record(data_iterator, output_tensor)
                args_defaults={"dataloader_type": "external"},
            )

    `control/stop` and the stop signals end the training as `--exit-interval` does, after a checkpoint.
    """

    def __init__(self, config: Config, folder: RunFolder, training: Any) -> None:
        """Prepare; the data plane is opened by `datasets_provider`, when Megatron's groups exist.

        Args:
            training: the module `megatron.training.training`.

        Raises:
            ConfigError: the module lacks a function that must be wrapped.
        """
        self._config = config
        self._folder = folder
        self._training = training
        self._data: MegatronData | None = None
        self._original: dict[str, Callable[..., Any]] = {}
        self._save_interval: int | None = None
        """Megatron's own, while a save that was requested has replaced it."""
        missing = [name for name in WRAPPED if not hasattr(training, name)]
        if missing:
            raise ConfigError(
                f"{training.__name__} has no {' and no '.join(missing)}, so this version of Megatron-LM is not "
                "supported.\n  Use MegatronData in its training loop."
            )

    @property
    def data(self) -> MegatronData:
        """The data; it exists once Megatron has asked for its datasets."""
        if self._data is None:
            raise ConfigError(
                "Megatron has not asked for its datasets yet.\n"
                "  Pass MegatronPretraining.datasets_provider to pretrain(), and do not train before."
            )
        return self._data

    def __enter__(self) -> Self:
        self._original = {name: getattr(self._training, name) for name in WRAPPED}
        for name in WRAPPED:
            setattr(self._training, name, getattr(self, f"_{name}"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, function in self._original.items():
            setattr(self._training, name, function)
        if self._data is not None:
            self._data.__exit__(kind, error, trace)

    def datasets_provider(
        self, train_val_test_num_samples: Any, vp_stage: int | None = None
    ) -> tuple[TrainIterator, ValidationIterator | None, None]:
        """Return the external iterators of one model chunk; the first call opens the data plane. **Collective.**

        Raises:
            ConfigError: Megatron's arguments and the config disagree, or the state of a checkpoint is missing.
        """
        args = self._training.get_args()
        if self._data is None:
            _check_arguments(args, self._config)
            _warn_of_unused_balance(args, self._config)
            self._data = self._open(args)
            self._load(args, self._data)
        return self._data.train_iterator(), self._data.validation_iterator(), None

    # Without this, Megatron asks for datasets on the first tensor-parallel ranks only.
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]

    def record(self, data_iterator: Any, loss: Tensor) -> None:
        """Add losses; call it in the loss function, see `MegatronData.record`."""
        self.data.record(data_iterator, loss)

    def _open(self, args: Any) -> MegatronData:
        """Open the data plane in the format that Megatron's arguments describe. **Collective.**"""
        form = BatchFormat(
            micro_batch_size=args.micro_batch_size,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            reset_attention_mask=args.reset_attention_mask,
            reset_position_ids=args.reset_position_ids,
        )
        log_every = getattr(args, "tensorboard_log_interval", 1)
        return MegatronData.open(self._config, form, self._folder, self._log, log_every=log_every)

    def _load(self, args: Any, data: MegatronData) -> None:
        """Load the state that belongs to the checkpoint that Megatron has loaded. **Collective.**"""
        if args.iteration > 0:
            data.load_state_dict(_saved_state(args))
        # Not its samples: an edit of the run may have changed the batch size.
        if args.iteration != data.plane.next_step:
            raise ConfigError(
                f"Megatron continues after {args.iteration} iterations, but the state of the data belongs after "
                f"{data.plane.next_step} steps.\n  Let --load and --dataloader-save name checkpoints of the same run."
            )

    def _train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the batch of a step, train on it, and pass on requests to stop or to save. **Collective.**"""
        arguments = self._training.get_args()
        if self._save_interval is not None:
            arguments.save_interval, self._save_interval = self._save_interval, None
        has_begun = self.data.begin_step()
        if self.data.plane.is_interrupted:
            raise SavedAndStopped(
                "A stop was requested while no batch came, and Megatron saves only after a step.\n"
                "  Nothing more is saved; the next job continues from the last checkpoint."
            )
        if not has_begun:
            raise ConfigError(
                f"The data ends after {self.data.plane.next_step} steps, before --train-iters={arguments.train_iters}."
                "\n  Lower --train-iters, or set mixture.on_exhausted=repeat."
            )
        result = self._original["train_step"](*args, **kwargs)

        # Megatron looks at these two after every step.
        if self.data.stop_requested():
            arguments.exit_interval = 1
        if self.data.save_requested():
            self._save_interval, arguments.save_interval = arguments.save_interval, 1
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Take the state of the data, which Megatron then asks some ranks for. **Collective.**"""
        if self._data is not None:
            self._data.prepare_save()
        return self._original["save_checkpoint"](*args, **kwargs)

    def _evaluate_and_print_results(self, *args: Any, **kwargs: Any) -> Any:
        """Validate, and log the held-out losses. **Collective.**"""
        result = self._original["evaluate_and_print_results"](*args, **kwargs)
        self.data.end_validation()
        return result

    def _log(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics where Megatron writes its own: on the last rank, under the number of the iteration."""
        # Weights & Biases accepts no iteration before the newest one.
        iteration = self.data.plane.next_step
        writer = self._training.get_tensorboard_writer()
        if writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, iteration)
        wandb = self._training.get_wandb_writer()
        if wandb:
            wandb.log(metrics, iteration)


def _check_arguments(args: Any, config: Config) -> None:
    """Raise ConfigError if Megatron's arguments do not fit the config or the data plane."""
    plane = config.dataplane
    has_held_out = config.query.holdout.fraction > 0
    rules = [
        (args.dataloader_type == "external", "--dataloader-type must be external"),
        (args.seq_length == plane.seq_len, f"--seq-length must be dataplane.seq_len={plane.seq_len}"),
        (
            args.global_batch_size == plane.global_batch_size,
            f"--global-batch-size must be dataplane.global_batch_size={plane.global_batch_size}",
        ),
        (not args.rampup_batch_size, "--rampup-batch-size is not supported"),
        (
            not getattr(args, "iterations_to_skip", None),
            "--iterations-to-skip is not supported: resume with skip-steps",
        ),
        (not getattr(args, "full_validation", False), "--full-validation is not supported"),
        (not getattr(args, "multiple_validation_sets", False), "--multiple-validation-sets is not supported"),
        (not args.eval_iters or has_held_out, "--eval-iters must be 0, or query.holdout.fraction larger"),
        (
            args.eval_iters <= config.training.validate_steps,
            f"--eval-iters must be at most training.validate_steps={config.training.validate_steps}",
        ),
        (
            not args.save or args.dataloader_save,
            "--dataloader-save must be set where --save is, for example equal to it",
        ),
    ]
    broken = [rule for is_kept, rule in rules if not is_kept]
    if broken:
        raise ConfigError("Megatron's arguments do not fit the data plane:\n  " + "\n  ".join(broken) + ".")


def _warn_of_unused_balance(args: Any, config: Config) -> None:
    if getattr(args, "rank", 0) or (args.reset_attention_mask and args.create_attention_mask_in_dataloader):
        return
    cure = "Set --reset-attention-mask, without --no-create-attention-mask-in-dataloader"
    if warning := unused_balance(config.dataplane, "Megatron's attention is not masked between documents", cure):
        logger.warning(warning)


def _saved_state(args: Any) -> dict[str, Any]:
    """Return the state of the data in the checkpoint that Megatron has loaded."""
    folder = Path(args.dataloader_save or args.load) / f"iter_{args.iteration:07d}"
    paths = sorted(folder.glob(f"**/{STATE_FILE}"))
    if not paths:
        raise ConfigError(
            f"Megatron continues at iteration {args.iteration}, but {folder} holds no state of the data plane "
            f"({STATE_FILE}).\n  Set --dataloader-save to the folder that it had when the checkpoint was saved."
        )
    content = torch.load(paths[0], map_location="cpu", weights_only=True)
    state: dict[str, Any] = content[STATE_NAME]
    return state
