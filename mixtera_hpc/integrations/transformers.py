"""`PlaneTrainer`: the Hugging Face `Trainer` on a data plane.

    with Replicas() as replicas, DataPlane.open(config) as plane:
        args = TrainingArguments(max_steps=1000, per_device_train_batch_size=4, use_cpu=replicas.device.type == "cpu")
        trainer = PlaneTrainer(plane=plane, model=model, args=args)
        trainer.train(resume_from_checkpoint=True)

The loader is not given to accelerate, which would share out what the data plane has shared out already. The price of
exact losses is one all-reduce of a number per optimizer step.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from mixtera_hpc.config.run_folder import PLANE_STATE_FILE
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.plane_state import STATE_KEY
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.domain_metrics import domain_losses
from mixtera_hpc.integrations.torch import PlaneDataset, as_tensors, micro_batches
from mixtera_hpc.integrations.transformers_arguments import (
    check_positions,
    check_trainer_arguments,
    check_training_arguments,
    check_vocabulary,
    warn_of_unused_balance,
)

__all__ = ["PlaneTrainer"]

TRAINER_STATE_FILE = "trainer_state.json"
"""The `Trainer` writes this file last, so a checkpoint that has it is complete."""

logger = logging.getLogger("mixtera_hpc")


class PlaneTrainer(Trainer):
    """The Hugging Face `Trainer` on a `DataPlane`.

    Every optimizer step trains on one global batch. Its loss is the mean over the counted tokens of all ranks, however
    many micro-batches there are. A checkpoint of the `Trainer` also holds the state of the data plane.

    To combine it with another subclass of `Trainer`, name this one first: `class Mine(PlaneTrainer, TheirTrainer)`.
    """

    def __init__(
        self, model: Any = None, args: Any = None, *, plane: DataPlane, eval_dataset: Any = None, **kwargs: Any
    ) -> None:
        """Check that the arguments fit the data plane, and build the trainer.

        Args:
            model: predicts the next token: it returns `logits` of shape (B, T, vocabulary).
            args: `TrainingArguments` with `max_steps`.
            plane: an open data plane; the caller opens and closes it.
            eval_dataset: None to evaluate on the samples that `query.holdout` excludes from training.
            kwargs: for the other arguments of the `Trainer`; there is no `train_dataset`.

        Raises:
            ConfigError: an argument does not fit the data plane.
        """
        self.plane = plane
        self.stopped = False
        """True if a signal or `control/stop` ended the training before `max_steps`; the state is saved."""
        self._statistics: list[DomainStatistics] = []
        """The statistics of the steps since the last log."""
        self._held_out = _HeldOutDataset(plane, args.per_device_eval_batch_size) if args is not None else None
        if eval_dataset is None and self._held_out is not None and plane.config.query.holdout.fraction > 0:
            eval_dataset = self._held_out
        check_trainer_arguments(plane, args, {**kwargs, "eval_dataset": eval_dataset}, self._held_out)

        super().__init__(model=model, args=args, eval_dataset=eval_dataset, **kwargs)
        check_training_arguments(self.args, plane)
        check_vocabulary(self.model, plane)
        check_positions(self.model, plane)
        has_own_inputs = type(self).model_inputs is not PlaneTrainer.model_inputs
        if not has_own_inputs and type(self).token_losses is PlaneTrainer.token_losses and self.args.process_index == 0:
            warn_of_unused_balance(plane)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step.
        self.add_callback(_PlaneCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train to `max_steps`, the end of the data or an agreed stop. **Collective.**

        Args:
            resume_from_checkpoint: folder of a checkpoint; True for the newest complete one in `output_dir`.
            args: passed to `Trainer.train`.
            kwargs: passed to `Trainer.train`.

        Raises:
            ConfigError: the checkpoint has no state of the data plane, or that of a run with other settings.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(_newest_checkpoint(Path(self.args.output_dir)))
        if resume_from_checkpoint:
            self.plane.load_state_dict(_read_plane_state(Path(resume_from_checkpoint)))
        # The data plane resumes by itself; the Trainer would skip batches.
        self.args.ignore_data_skip = True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this rank, from the next step of the data plane on."""
        dataset = PlaneDataset(
            self.plane,
            _tensors_for_model,
            num_micro_batches=self.args.gradient_accumulation_steps,
            num_steps=self.args.max_steps,
        )
        return self._loader(dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the held-out batches of this rank, or the loader of the `Trainer` for a dataset of yours."""
        named = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if named is None else named
        if isinstance(dataset, _HeldOutDataset):
            return self._loader(dataset)
        loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        return loader

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Return the sequences of the whole run on this rank, which the `Trainer` prints."""
        number: int = super().num_examples(dataloader)
        is_of_plane = isinstance(dataloader.dataset, PlaneDataset)
        return self.plane.num_local_sequences(self.args.max_steps) if is_of_plane else number

    def model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of the model for a micro-batch; override it to pass position ids, for example.

        Args:
            batch: `input_ids` (B, T), and the fields of `mixtera_hpc.integrations.torch.as_tensors`.
        """
        return {"input_ids": batch["input_ids"]}

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the loss of every predicted token, shape (B, T), in nats, and the outputs of the model.

        Called once for every micro-batch, in training and on held-out data. Override it for another loss.

        Raises:
            ConfigError: the logits do not belong to the tokens of the batch.
        """
        outputs = model(**self.model_inputs(batch))
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        targets = batch["tokens"][:, 1:]
        if logits.shape[:-1] != targets.shape:
            raise ConfigError(
                f"The model returned logits of shape {tuple(logits.shape)}, but the batch has {tuple(targets.shape)} "
                "predicted tokens.\n  Use a causal language model, or override token_losses()."
            )
        losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view_as(targets), outputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the part of a micro-batch in the loss of its step, and record the losses in the data plane.

        Args:
            model: the model, as accelerate has wrapped it.
            inputs: a micro-batch; one of a dataset of yours is left to the `Trainer`.
            return_outputs: also return the outputs of the model.
            num_items_in_batch: counted tokens of the whole step on all ranks; None for the mean over this micro-batch.
        """
        if "loss_mask" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, outputs = self.token_losses(model, inputs)
        self._recorder_of(inputs).record(inputs, losses.detach())

        # A loss outside of the mask may be infinite, so it is not multiplied by 0.
        loss = torch.where(inputs["loss_mask"], losses, 0.0).sum()
        if num_items_in_batch is None:
            loss = loss / inputs["loss_mask"].sum().clamp(min=1)
        else:
            # Gradients are averaged over the ranks.
            loss = loss * self.args.world_size / num_items_in_batch + self._auxiliary_loss(outputs)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next step, and how many tokens of it count on all ranks. **Collective.**"""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counted = torch.stack([batch["loss_mask"].sum() for batch in batches]).sum()
        if device.type == "cuda" and counted.device.type == "cpu":
            # A copy from memory that is not pinned would wait for the step before.
            counted = counted.pin_memory()
        counted = counted.to(device, non_blocking=True)
        if self.args.world_size > 1:
            counted = self.accelerator.reduce(counted, "sum")
        return batches, counted.clamp(min=1)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Return the mean loss of a held-out micro-batch, and record its losses."""
        if "loss_mask" not in inputs:
            step: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return step
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate; on held-out data add the loss of every domain, `held_out_loss/DOMAIN`. **Collective.**"""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if not isinstance(dataloader.dataset, _HeldOutDataset):
            return output
        statistics = dataloader.dataset.data.reduce(self.state.global_step)
        prefix = kwargs.get("metric_key_prefix", "eval")
        # The Trainer's own loss is a mean of means.
        output.metrics[f"{prefix}_loss"] = float(statistics.loss_sum.sum() / max(statistics.num_tokens.sum(), 1))
        output.metrics.update(domain_losses([statistics], self.plane.domain_names, "held_out_loss"))
        return output._replace(num_samples=int(statistics.num_sequences.sum()))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics; those of the training also have `train_loss/DOMAIN` and `weight/DOMAIN`."""
        if "loss" in logs:
            logs.update(self._domain_metrics())
        super().log(logs, *args, **kwargs)

    def log_remaining(self) -> None:
        """Log the loss of every domain in the steps that the last log did not have."""
        metrics = self._domain_metrics() if self._statistics else {}
        if metrics:
            self.log(metrics)

    def collect_statistics(self) -> None:
        """Keep the statistics of the steps that were completed since the last call, for the next log."""
        self._statistics += self.plane.completed_statistics()

    def _domain_metrics(self) -> dict[str, float]:
        """Return the loss of every domain since the last call, and the current weights."""
        names = self.plane.domain_names
        metrics = domain_losses(self._statistics, names, "train_loss")
        self._statistics.clear()
        weights = self.plane.weights.tolist()
        return metrics | {f"weight/{name}": weight for name, weight in zip(names, weights, strict=True)}

    def _loader(self, dataset: IterableDataset[Any]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_unchanged,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            # Otherwise the loader draws a number from the global generator, and a resumed run has another dropout.
            generator=torch.Generator(),
        )

    def _recorder_of(self, inputs: Mapping[str, Any]) -> DataPlane | HeldOutBatches:
        """Return what a micro-batch came from: the steps of held-out batches are negative."""
        if inputs["step"] >= 0 or self._held_out is None:
            return self.plane
        return self._held_out.data

    def _auxiliary_loss(self, outputs: Any) -> Any:
        """Return the part of a micro-batch in the load-balancing loss of a mixture of experts; 0 without one."""
        loss = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            return 0.0
        return self.model.config.router_aux_loss_coef * loss / self.args.gradient_accumulation_steps

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint with the state of the data plane. **Collective.**"""
        state = self.plane.state_dict()
        # First, so that a complete checkpoint has it.
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PLANE_STATE_FILE).write_bytes(state[STATE_KEY].tobytes())
        super()._save_checkpoint(model, trial)
        # Now the reductions of all steps are complete.
        self.collect_statistics()


class _PlaneCallback(TrainerCallback):
    """Follows the steps of a trainer: requests to save and stop, statistics, the end of the data."""

    def __init__(self, trainer: PlaneTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plane = self._trainer.plane
        if plane.next_step != state.global_step:
            raise ConfigError(
                f"The Trainer begins at step {state.global_step}, but the data plane at step {plane.next_step}.\n"
                "  Call train() once for an open data plane. To continue, open it again and pass "
                "resume_from_checkpoint=True."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        trainer.collect_statistics()
        # The Trainer counts from 0 after a resume.
        state.epoch = state.global_step / state.max_steps
        # All ranks get the same answers.
        stop = trainer.plane.stop_requested()
        save = trainer.plane.save_requested()
        if state.global_step >= state.max_steps:
            return
        if stop:
            trainer.stopped = True
            control.should_training_stop = True
            # A stop may have to be quick, and an evaluation could decide not to save.
            control.should_evaluate = False
        control.should_save = control.should_save or stop or save

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.log_remaining()
        if self._trainer.plane.is_interrupted:
            # A stop was requested while no batch came.
            self._trainer.stopped = True
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        if state.global_step < state.max_steps and not control.should_training_stop:
            logger.warning(
                "The data ended after %d of max_steps=%d steps.\n  Run mixtera-hpc plan to see when each domain runs "
                "out.",
                state.global_step,
                state.max_steps,
            )
            control.should_save = True


class _HeldOutDataset(IterableDataset[Any]):
    """The held-out samples of a data plane, which are opened when they are first used."""

    def __init__(self, plane: DataPlane, micro_batch_size: int) -> None:
        self._plane = plane
        self._micro_batch_size = micro_batch_size
        self._data: HeldOutBatches | None = None

    @property
    def data(self) -> HeldOutBatches:
        """The held-out batches. **Collective** on first use."""
        if self._data is None:
            self._data = self._plane.held_out()
        return self._data

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data.batches():
            for micro_batch in micro_batches(batch, self._micro_batch_size):
                yield _tensors_for_model(micro_batch)


def _tensors_for_model(batch: Batch) -> dict[str, Any]:
    """Return `input_ids` and the fields of a micro-batch; the numbers that `record` needs stay on the host."""
    fields = as_tensors(batch)
    host: dict[str, Any] = {"step": batch.step, "positions": batch.positions, "domain_ids": batch.domain_ids}
    return {"input_ids": fields["tokens"][:, :-1], **fields, **host}


def _unchanged(batch: Any) -> Any:
    return batch


def _newest_checkpoint(folder: Path) -> Path:
    """Return the newest complete checkpoint; one that was interrupted while it was written is passed over."""
    steps = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_FILE}")]
    if not steps:
        raise ConfigError(
            f"No complete checkpoint in {folder}.\n  To begin a run, call train() without resume_from_checkpoint."
        )
    return max(steps, key=lambda path: int(path.name.rpartition("-")[2]))


def _read_plane_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / PLANE_STATE_FILE
    if not path.exists():
        raise ConfigError(
            f"The checkpoint {checkpoint} has no {PLANE_STATE_FILE}, so the data cannot continue where they were.\n"
            "  Resume from a checkpoint that a PlaneTrainer has written."
        )
    return {STATE_KEY: np.frombuffer(path.read_bytes(), np.uint8)}
