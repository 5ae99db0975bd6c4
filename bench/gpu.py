"""Training on a GPU with and without the data plane: tokens/s, data wait, launch jitter, ADO's cost and memory.

A step is a forward and backward pass of a GPT, clipping and AdamW. Four kinds of steps take turns in rounds: on one
batch that is already on the device, and on the batches of a data plane whose mixture is fixed, learned by ADO, or
learned and audited. Rates are those of whole rounds between two synchronisations; the seconds in which the host issues
the work of one step are measured without any. One more step of each plane runs while torch raises an error for every
host synchronisation. Without a GPU, a tiny model takes the same way on the CPU, and the table says what was not run.
At most eight minutes on one GPU: rounds are left out on a slow one. Batches that do not fit into its memory are halved.
"""

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bench._corpus import make_rows
from bench._results import write_results
from bench.text import corpus_settings
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.integrations.device_staging import DeviceStage
from mixtera_hpc.training.adamw import AdamW, ParameterGroup
from mixtera_hpc.training.batch_loss import DeviceBatch, batch_loss, stage_batch
from mixtera_hpc.training.distributed import GradientBuffer
from mixtera_hpc.training.model import build_model

LEARNING_RATE = 1e-4
SECONDS_PER_SIZE = 150
"""After this time, no more rounds of a model begin. At least two are measured."""
GPU_ONLY = (
    "tokens/s of models with 125M to 1B parameters",
    "pinned memory and transfers on a stream of their own",
    "the search for host synchronisations",
    "memory of the device",
)
ADO = [
    "mixture.kind=dynamic",
    "mixture.algorithm.name=ado",
    # The laws are fitted once before the measured rounds, and again in them.
    "mixture.algorithm.warmup=4",
    "mixture.algorithm.refit_interval=10",
    "mixture.algorithm.first_fitted_step=1",
]
MIXTURES = {"fixed": [], "ADO": ADO, "ADO, audit": [*ADO, "dataplane.audit=true"]}
"""Name of a plane → its overrides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A model and the batches that it is trained on."""

    name: str
    num_layers: int
    embedding_dim: int
    num_heads: int
    batch_size: int
    seq_len: int
    steps: int
    """Steps of each kind in a round."""
    rounds: int


GPU_SIZES = (
    ModelSize(
        name="125M", num_layers=12, embedding_dim=768, num_heads=12, batch_size=16, seq_len=2048, steps=25, rounds=5
    ),
    ModelSize(
        name="1B", num_layers=24, embedding_dim=1792, num_heads=14, batch_size=8, seq_len=2048, steps=12, rounds=4
    ),
)
CPU_SIZES = (
    ModelSize(name="tiny", num_layers=2, embedding_dim=32, num_heads=2, batch_size=2, seq_len=32, steps=4, rounds=2),
)


@dataclass(slots=True)
class _Measured:
    """The measurements of one kind of steps."""

    rates: list[float] = field(default_factory=list)
    """Tokens per second of every round."""
    issue_s: list[float] = field(default_factory=list)
    """Seconds in which the host issued a step, waits for data excluded."""
    wait_s: list[float] = field(default_factory=list)
    """Seconds that a step waited for its batch."""
    device_bytes: int = 0


def main() -> None:
    """Measure, print and write all figures."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    sizes = GPU_SIZES if has_gpu else CPU_SIZES
    settings = corpus_settings(make_rows(300_000 if has_gpu else 20_000))
    lines: list[dict[str, Any]] = []
    print(
        f"{'model':6} {'batches of':16} {'tokens/s':>11} {'ratio':>6} {'wait p99':>9} {'issue p50':>10} {'p99/p50':>8}"
    )
    not_run = [] if has_gpu else [f"{text}: torch sees no GPU here" for text in GPU_ONLY]
    for size in sizes:
        of_size = _lines_that_fit(settings, size, device)
        for line in of_size:
            rates = f"{line['tokens_per_s']:11,.0f} {line['ratio']:6.3f} {line['wait_p99_share']:8.2%}"
            print(f"{size.name:6} {line['batches']:16} {rates} {line['issue_p50_ms']:7.2f} ms {line['jitter']:8.2f}")
        if not of_size:
            not_run.append(f"the model with {size.name} parameters: the device has too little memory")
        lines += of_size
        # Write after each model, so that its results remain if the next one is stopped.
        write_results("gpu", {"device": _device_name(device), "lines": lines, "not_run": not_run})
    for text in not_run:
        print(f"Not run: {text}.")


def _lines_that_fit(settings: list[str], size: ModelSize, device: torch.device) -> list[dict[str, Any]]:
    """Return the figures of one model, with the largest half of its batch that fits; nothing if none does."""
    batch_size = size.batch_size
    while batch_size:
        try:
            return list(_lines(settings, replace(size, batch_size=batch_size), device))
        except torch.OutOfMemoryError:
            print(f"A batch of {batch_size} does not fit into the memory of the device.")
        # After the handler, because the error refers to the frames that hold the model.
        torch.cuda.empty_cache()
        batch_size //= 2
    return []


def _lines(settings: list[str], size: ModelSize, device: torch.device) -> Iterator[dict[str, Any]]:
    """Return the figures of every kind of steps of one model."""
    trainer = _ModelTrainer(settings, size, device)
    with ExitStack() as stack:
        planes = {
            name: stack.enter_context(DataPlane.open(compose([*trainer.settings, *words]), Local()))
            for name, words in MIXTURES.items()
        }
        batches = {name: iter(plane) for name, plane in planes.items()}
        staged = trainer.stage(next(batches["fixed"]))
        measured: dict[str, _Measured] = {name: _Measured() for name in ("none", *MIXTURES)}
        began_s = time.perf_counter()
        for round_number in range(size.rounds + 1):
            if round_number > 2 and time.perf_counter() - began_s > SECONDS_PER_SIZE:
                break
            for name, own in measured.items():
                result = _Measured() if round_number == 0 else own  # The first round warms up.
                if name == "none":
                    trainer.run_without_plane(staged, result)
                else:
                    trainer.run(planes[name], batches[name], result)
        synchronises = {name: trainer.synchronisation(plane, batches[name]) for name, plane in planes.items()}
    for name, own in measured.items():
        yield _line(size, name, own, measured["none"]) | {"host_synchronisation": synchronises.get(name)}


def _line(size: ModelSize, name: str, own: _Measured, without: _Measured) -> dict[str, Any]:
    issue_p50, issue_p99 = np.quantile(own.issue_s, (0.5, 0.99))
    step_s = size.batch_size * size.seq_len / statistics.median(own.rates)
    return {
        "model": size.name,
        "batch_size": size.batch_size,
        "rounds": len(own.rates),
        "batches": "one on the device" if name == "none" else name,
        "tokens_per_s": statistics.median(own.rates),
        "ratio": statistics.median(a / b for a, b in zip(own.rates, without.rates, strict=True)),
        "wait_p99_share": float(np.quantile(own.wait_s, 0.99)) / step_s if own.wait_s else 0.0,
        "issue_p50_ms": float(issue_p50) * 1e3,
        "jitter": float(issue_p99 / issue_p50),
        "device_bytes": own.device_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


class _ModelTrainer:
    """A model on one device, and steps of it."""

    def __init__(self, settings: list[str], size: ModelSize, device: torch.device) -> None:
        self._device = device
        self._size = size
        words = [f"dataplane.seq_len={size.seq_len}", f"dataplane.global_batch_size={size.batch_size}"]
        self.settings = [*settings, *words]
        training = TrainingConfig(
            num_layers=size.num_layers, embedding_dim=size.embedding_dim, num_heads=size.num_heads
        )
        with DataPlane.open(compose(self.settings), Local()) as plane:
            vocab_size = plane.vocab_size
        self._model = build_model(training, vocab_size, size.seq_len).to(device)
        self._gradients = GradientBuffer(self._model)
        groups = [ParameterGroup(parameters=list(self._model.parameters()), weight_decay=0.1)]
        self._optimizer = AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
        self._stage = DeviceStage(device)

    def stage(self, batch: Batch) -> DeviceBatch:
        """Return a batch on the device."""
        return stage_batch(self._stage, batch, "sequence")

    def run_without_plane(self, staged: DeviceBatch, result: _Measured) -> None:
        """Train a round on one batch that is on the device."""
        with self._round(result):
            for _ in range(self._size.steps):
                began_s = time.perf_counter()
                self._train(staged)
                result.issue_s.append(time.perf_counter() - began_s)

    def run(self, plane: DataPlane, batches: Iterator[Batch], result: _Measured) -> None:
        """Train a round on the next batches of a plane."""
        with self._round(result):
            for _ in range(self._size.steps):
                began_s = time.perf_counter()
                batch = next(batches)
                plane.record(batch, self._train(self.stage(batch)))
                result.issue_s.append(time.perf_counter() - began_s - plane.data_wait_s)
                result.wait_s.append(plane.data_wait_s)

    def synchronisation(self, plane: DataPlane, batches: Iterator[Batch]) -> str | None:
        """Return where a step waits for the device; None if it does not, or if there is no GPU."""
        batch = next(batches)
        if self._device.type != "cuda":
            plane.record(batch, self._train(self.stage(batch)))
            return None
        torch.cuda.set_sync_debug_mode("error")
        try:
            plane.record(batch, self._train(self.stage(batch)))
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def _train(self, staged: DeviceBatch) -> torch.Tensor:
        """Update the weights with one batch; return the losses of its tokens."""
        self._gradients.zero()
        loss = batch_loss(self._model, staged, slice(None))
        self._gradients.backward(loss, staged.loss_mask)
        self._gradients.clip(1.0)
        self._optimizer.step(LEARNING_RATE)
        return loss.detach()

    def _round(self, result: _Measured) -> "_Round":
        tokens = self._size.steps * self._size.batch_size * self._size.seq_len
        return _Round(self._device, tokens, result)


class _Round:
    """The time of a round between two synchronisations, and the memory of the device in it."""

    def __init__(self, device: torch.device, num_tokens: int, result: _Measured) -> None:
        self._device = device
        self._num_tokens = num_tokens
        self._result = result
        self._began_s = 0.0

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            torch.cuda.synchronize(self._device)
        self._began_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._result.device_bytes = torch.cuda.max_memory_allocated(self._device)
        self._result.rates.append(self._num_tokens / (time.perf_counter() - self._began_s))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
