"""Print what torchtitan's integration refuses, and what its loss computes, as one JSON object: … FOLDER OVERRIDES…"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples/trainers"))

import torch
import torchtitan_on_cpu
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer
from torchtitan.components.loss import IGNORE_INDEX, CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.trainer import Trainer

from mixtera_hpc.errors import MixteraError
from mixtera_hpc.integrations.torchtitan import (
    HeldOutValidator,
    NoTokenizer,
    PerTokenCrossEntropy,
    PlaneDataLoader,
    TitanTrainer,
)
from mixtera_hpc.integrations.torchtitan_data import inputs_and_labels
from mixtera_hpc.integrations.torchtitan_loss import TokenLosses, context_parallel_slices

FOLDER, OVERRIDES = sys.argv[1], sys.argv[2:]
Options = dict[str, Any]
LOSS_WEIGHTS = [
    "mixture.kind=static",
    "mixture.domains=[{key: {source: 'a*'}, weight: 0.5, loss_weight: 0.25}, {key: {source: enum}, weight: 0.5}]",
]


def configuration(kind: Any = TitanTrainer, **changes: Any) -> Any:
    options: Options = {
        "model_spec": torchtitan_on_cpu.tiny_model(),
        "dump_folder": FOLDER,
        "dataloader": PlaneDataLoader.Config(overrides=OVERRIDES),
        "loss": PerTokenCrossEntropy.Config(),
        "tokenizer": NoTokenizer.Config(),
        "optimizer": default_adamw(lr=1e-3),
        "training": TrainingConfig(seq_len=16, local_batch_size=4, global_batch_size=8, steps=1),
    }
    return kind.Config(**{**options, **changes})


def refusal(build: Callable[[], Any]) -> str:
    try:
        build().close()
    except MixteraError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    def training(**sizes: int) -> Options:
        return {"training": TrainingConfig(**{"seq_len": 16, "local_batch_size": 4, "global_batch_size": 8, **sizes})}

    plain = [word for word in OVERRIDES if not word.startswith("mixture.group_by")]
    small = torchtitan_on_cpu.tiny_model()
    small.model.vocab_size = 100
    changes: dict[str, Options] = {
        "nothing": {},
        "global batch": training(global_batch_size=4),
        "no accumulation": training(global_batch_size=-1),
        "local batch": training(local_batch_size=3),
        "sequence length": training(seq_len=32),
        "vocabulary": {"model_spec": small},
        "loss": {"loss": CrossEntropyLoss.Config()},
        "validator": {"validator": Validator.Config()},
        "validation steps": {"validator": HeldOutValidator.Config(steps=3)},
        "nothing held out": {"validator": HeldOutValidator.Config(enable=True)},
        "backend": {"parallelism": ParallelismConfig(spmd_backend="full_dtensor")},
        "load balancer": {
            "parallelism": ParallelismConfig(context_parallel_degree=2, context_parallel_load_balancer="ptrr")
        },
        "dataset": {"dataloader": PlaneDataLoader.Config(overrides=OVERRIDES, dataset="c4")},
        "unit": {"dataloader": PlaneDataLoader.Config(overrides=[*OVERRIDES, "mixture.unit=samples"])},
        "loss weights": {"dataloader": PlaneDataLoader.Config(overrides=[*plain, *LOSS_WEIGHTS])},
    }
    texts = {name: refusal(configuration(**change).build) for name, change in changes.items()}
    return {**texts, "trainer": refusal(configuration(Trainer).build)}


def losses() -> dict[str, float]:
    """Return the difference to torchtitan's loss, and to its gradients."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, requires_grad=True)
    labels = torch.randint(11, (3, 5))
    labels[0, :2] = IGNORE_INDEX
    ours = PerTokenCrossEntropy(PerTokenCrossEntropy.Config())
    values = [loss(logits, labels, torch.tensor(13))[0] for loss in (ours, CrossEntropyLoss(CrossEntropyLoss.Config()))]
    gradients = [torch.autograd.grad(value, logits)[0] for value in values]
    kept = ours.training.micro_batches(1)[0]
    return {
        "loss": float((values[0] - values[1]).detach().abs()),
        "gradient": float((gradients[0] - gradients[1]).abs().max()),
        "kept": float((kept.sum() / 13 - values[0]).detach().abs()),
    }


def micro_batches() -> list[Any]:
    """Return the losses of two micro-batches, each of which a chunked loss has cut into two parts."""
    kept = TokenLosses()
    # The second round replaces the losses of the first one.
    for offset in (10, 0):
        kept.start()
        for first in range(0, 8, 2):
            kept.add(torch.arange(first + offset, first + offset + 2)[None])
    return [losses.tolist() for losses in kept.micro_batches(2)]


def inputs() -> dict[str, Any]:
    batch = {
        "tokens": torch.arange(6)[None],
        "loss_mask": torch.tensor([[True, True, False, True, True]]),
        "document_ids": torch.tensor([[0, 0, 1, 1, 1, 1]], dtype=torch.int32),
    }
    fields, labels = inputs_and_labels(batch)
    return {**{name: value.tolist() for name, value in fields.items()}, "labels": labels.tolist()}


def context_parallel_tokens() -> dict[str, Any]:
    """Return which tokens each of two ranks gets from torch, and which ones it would record."""
    recorded = [context_parallel_slices(rank, 2, 16, is_balanced=True) for rank in range(2)]
    return {
        "torch": _HeadTailLoadBalancer(16, 2, "cpu")._generate_indices().reshape(2, 8).tolist(),
        "recorded": [[token for part in parts for token in range(part.start, part.stop)] for parts in recorded],
    }


torchtitan_on_cpu.join_single_process()
checks = {
    "refusals": refusals(),
    "losses": losses(),
    "micro_batches": micro_batches(),
    "inputs": inputs(),
    "context_parallel": context_parallel_tokens(),
}
print(json.dumps(checks))
