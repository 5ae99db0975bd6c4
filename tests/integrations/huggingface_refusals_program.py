"""Give the Hugging Face `Trainer` arguments that do not fit a data plane, and print what each is answered with.

python huggingface_refusals_program.py OUT OVERRIDES…, or under torchrun
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mixtera_hpc import DataPlane, MixteraError, PlaneDataset, Replicas, compose
from mixtera_hpc.integrations.transformers import PlaneTrainer

OUT, *OVERRIDES = sys.argv[1:]
HELD_OUT = "query.holdout.fraction=0.2"


def model(vocab_size: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes))


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
            PlaneTrainer(plane=plane, model=model(vocab_size), args=args, **trainer_settings).train(
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


CASES_OF_ONE_RANK: dict[str, Callable[[], str]] = {
    "accumulation": lambda: train("accumulation", size=2, gradient_accumulation_steps=2),
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
    "held out": lambda: train("some", (HELD_OUT,), eval_strategy="steps", eval_steps=1),
    "vocabulary": lambda: train("vocabulary", trainer={"vocab_size": 100}),
    "samples": lambda: train("samples", ("mixture.unit=samples",)),
    "twice": train_twice,
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
