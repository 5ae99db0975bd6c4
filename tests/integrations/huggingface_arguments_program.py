"""Train with many arguments of the Hugging Face `Trainer`, and print what becomes of each: trained, or the refusal.

python huggingface_arguments_program.py OUT OVERRIDES…, or under torchrun
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from mixtera_hpc import DataPlane, MixteraError, PlaneDataset, Replicas, compose
from mixtera_hpc.integrations.transformers import PlaneTrainer

OUT, *OVERRIDES = sys.argv[1:]
HELD_OUT = "query.holdout.fraction=0.2"
RAMP = "dataplane.batch_schedule=[{{start: 1, size: {size}}}]"


def model(vocab_size: int, positions: int = 64) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=positions, **sizes))


def train(name: str, overrides: tuple[str, ...] = (), size: int = 4, **settings: Any) -> str:
    """Return the message of a training run with PlaneTrainer, or `trained`."""
    trainer_settings = settings.pop("trainer", {})
    arguments = {
        "output_dir": f"{OUT}/{name}",
        "max_steps": 2,
        "per_device_train_batch_size": size,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    with DataPlane.open(compose([*OVERRIDES, *overrides]), REPLICAS.comm) as plane:
        try:
            args = TrainingArguments(**{**arguments, **settings})
            vocab_size = trainer_settings.pop("vocab_size", plane.vocab_size)
            positions = trainer_settings.pop("positions", 64)
            PlaneTrainer(plane=plane, model=model(vocab_size, positions), args=args, **trainer_settings).train(
                **({"resume_from_checkpoint": True} if name == "resume" else {})
            )
        except MixteraError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def train_plain(name: str, **settings: Any) -> str:
    """Return the message of a plain Trainer with a PlaneDataset."""
    with DataPlane.open(compose(OVERRIDES), REPLICAS.comm) as plane:
        args = TrainingArguments(
            output_dir=f"{OUT}/{name}", max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True, **settings
        )
        try:
            Trainer(model=model(plane.vocab_size), args=args, train_dataset=PlaneDataset(plane, num_steps=2)).train()
        except MixteraError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def train_twice() -> str:
    with DataPlane.open(compose(OVERRIDES), REPLICAS.comm) as plane:
        args = TrainingArguments(
            output_dir=f"{OUT}/twice", max_steps=2, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True
        )
        trainer = PlaneTrainer(plane=plane, model=model(plane.vocab_size), args=args)
        trainer.train()
        try:
            trainer.train()
        except MixteraError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def foreign_checkpoint() -> str:
    folder = Path(OUT) / "resume" / "checkpoint-1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text("{}")
    return train("resume")


class StopAfterTwoSteps(TrainerCallback):
    """Saves and stops, as a job that ends early."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_save = True
            control.should_training_stop = True


def logged(name: str, build: Callable[[int], Any], *, resume: bool = False, **settings: Any) -> list[dict[str, float]]:
    """Return what the trainer logged in a run of four steps, without times."""
    trainer_settings = settings.pop("trainer", {})
    with DataPlane.open(compose([*OVERRIDES, HELD_OUT]), REPLICAS.comm) as plane:
        set_seed(0)
        args = TrainingArguments(
            output_dir=f"{OUT}/{name}",
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = PlaneTrainer(plane=plane, model=build(plane.vocab_size), args=args, **trainer_settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history


def of_steps(history: list[dict[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in history if name in entry]


def gpt2_with_dropout(vocab_size: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=1, n_positions=16))


def mixture_of_experts(vocab_size: int, coefficient: float) -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "router_aux_loss_coef": coefficient}
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocab_size, output_router_logits=True, **sizes, **experts))


def resume_with_dropout() -> str:
    """Compare a run with one that is stopped, evaluated and resumed: the dropout of every step must be the same."""
    whole = of_steps(logged("whole", gpt2_with_dropout), "loss")
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    logged("parts", gpt2_with_dropout, trainer={"callbacks": [StopAfterTwoSteps()]}, **evaluated)
    parts = of_steps(logged("parts", gpt2_with_dropout, resume=True, **evaluated), "loss")
    return "same losses" if whole == parts and len(whole) == 4 else f"{whole} and {parts}"


def auxiliary_loss() -> str:
    """Compare the loss with and without the load-balancing loss, which is about 2 (the experts of a token) here."""
    without, with_it = (
        logged(f"experts{coefficient}", lambda size, c=coefficient: mixture_of_experts(size, c))
        for coefficient in (0.0, 1.0)
    )
    difference = of_steps(with_it, "loss")[0] - of_steps(without, "loss")[0]
    of_domains = [name for name in with_it[1] if name.startswith("train_loss/")]
    same = all(abs(with_it[1][name] - without[1][name]) < 1e-5 for name in of_domains)
    return "added once" if 1.5 < difference < 2.5 and same and of_domains else f"{difference} {same}"


def own_evaluation() -> str:
    """Evaluate on a dataset of the user's beside the training on a data plane."""
    samples = [{"input_ids": torch.arange(16) + i, "labels": torch.arange(16) + i} for i in range(5)]
    history = logged("own", gpt2_with_dropout, trainer={"eval_dataset": samples}, eval_strategy="steps", eval_steps=2)
    has_domains = any("held_out_loss" in name for entry in history for name in entry)
    return "evaluated" if len(of_steps(history, "eval_loss")) == 2 and not has_domains else f"{history}"


class Warnings(logging.Handler):
    """Keeps the warnings of the data plane."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def balance(inputs: Callable[..., Any] | None = None) -> str:
    """Return the warnings of a trainer whose ranks are balanced; `inputs` overrides `model_inputs`."""
    trainer = type("Mine", (PlaneTrainer,), {"model_inputs": inputs} if inputs else {})
    handler = Warnings()
    logging.getLogger("mixtera_hpc").addHandler(handler)
    with DataPlane.open(compose([*OVERRIDES, "dataplane.balance=attention"]), REPLICAS.comm) as plane:
        args = TrainingArguments(output_dir=OUT, max_steps=1, per_device_train_batch_size=4, use_cpu=True)
        trainer(plane=plane, model=model(plane.vocab_size), args=args)
    logging.getLogger("mixtera_hpc").removeHandler(handler)
    return "\n".join(handler.texts)


CASES_OF_ONE_RANK: dict[str, Callable[[], str]] = {
    "accumulation": lambda: train("accumulation", size=2, gradient_accumulation_steps=2),
    "ramp": lambda: train("ramp", (RAMP.format(size=12),), size=2, gradient_accumulation_steps=2),
    "uneven ramp": lambda: train("ramp", (RAMP.format(size=5),), size=2, gradient_accumulation_steps=2),
    "few positions": lambda: train("positions", trainer={"positions": 8}),
    "dispatch_batches=False": lambda: train("dispatch", accelerator_config={"dispatch_batches": False}),
    "batch size": lambda: train("batch", size=2, gradient_accumulation_steps=3),
    "workers": lambda: train("workers", dataloader_num_workers=2),
    "max_steps": lambda: train("endless", max_steps=-1),
    "split_batches": lambda: train("split", accelerator_config={"split_batches": True}),
    "dispatch_batches": lambda: train("dispatch", accelerator_config={"dispatch_batches": True}),
    "group_by_length": lambda: train("length", train_sampling_strategy="group_by_length"),
    "data_seed": lambda: train("seed", data_seed=3),
    "auto_find_batch_size": lambda: train("auto", auto_find_batch_size=True),
    "label_smoothing": lambda: train("smooth", label_smoothing_factor=0.1),
    "average_tokens": lambda: train("average", average_tokens_across_devices=False),
    "train_dataset": lambda: train("dataset", trainer={"train_dataset": [1]}),
    "compute_loss_func": lambda: train("function", trainer={"compute_loss_func": print}),
    "compute_metrics": lambda: train("metrics", (HELD_OUT,), trainer={"compute_metrics": print}),
    "nothing held out": lambda: train("none", eval_strategy="steps", eval_steps=1),
    "resume with dropout": resume_with_dropout,
    "auxiliary loss": auxiliary_loss,
    "own evaluation": own_evaluation,
    "held out": lambda: train("some", (HELD_OUT,), eval_strategy="steps", eval_steps=1),
    "vocabulary": lambda: train("vocabulary", trainer={"vocab_size": 100}),
    "samples": lambda: train("samples", ("mixture.unit=samples",)),
    "twice": train_twice,
    "balance": balance,
    "balance with own inputs": lambda: balance(lambda trainer, batch: {"input_ids": batch["input_ids"]}),
    "foreign checkpoint": foreign_checkpoint,
    "plain": lambda: train_plain("plain"),
    "plain with workers": lambda: train_plain("plain", dataloader_num_workers=1),
}
CASES_OF_SEVERAL_RANKS: dict[str, Callable[[], str]] = {
    "plain": lambda: train_plain("plain"),
    "plain with dispatch_batches=False": lambda: train_plain("plain", accelerator_config={"dispatch_batches": False}),
    "one rank each": lambda: train("cpu", use_cpu=False),
}

if __name__ == "__main__":
    with Replicas() as REPLICAS:
        cases = CASES_OF_ONE_RANK if REPLICAS.comm.size == 1 else CASES_OF_SEVERAL_RANKS
        answers = {name: case() for name, case in cases.items()}
        print("\n" + json.dumps({"rank": REPLICAS.comm.rank, **answers}), flush=True)
