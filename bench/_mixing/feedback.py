"""CPU time of the feedback loop of a learned mixture on rank 0, next to a step of the reference trainer.

The loop is everything that a step does because the mixture learns: `record`, the reduction, the update of ADO with its
refits, and its part of the plans. It is the difference between the trainer's thread of two planes that serve the same
batches, one with ADO and recorded losses, one with the natural mixture and none. Both take turns.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.testing.small_collection import make_collection

__all__ = ["FeedbackCost", "measure_feedback"]

ROUNDS = 15
STEPS_PER_ROUND = 20
TRAINER_STEPS = 2
SHAPE = ("dataplane.seq_len=1024", "dataplane.global_batch_size=32", "dataplane.workers=1", "dataplane.comm=local")
"""The sequences of a step; the model is the one of the default configuration."""
LEARNED = ("mixture=ado", "+mixture.algorithm={name: ado, warmup: 40, refit_interval: 40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedbackCost:
    """CPU times per step, in milliseconds."""

    loop_ms: float
    """CPU time of the feedback loop."""
    trainer_ms: float
    """CPU time of a step of the reference trainer, on one thread."""

    @property
    def ratio(self) -> float:
        """Cost of the feedback loop as a fraction of a trainer step."""
        return self.loop_ms / self.trainer_ms


def measure_feedback() -> FeedbackCost:
    """Measure both on a small collection with ten domains, a refit every 40 steps."""
    with TemporaryDirectory() as name:
        words = [*make_collection(Path(name) / "collection"), *SHAPE]
        loop_ms = _loop_ms(words)
        return FeedbackCost(loop_ms=loop_ms, trainer_ms=_trainer_ms(compose(words)))


def _loop_ms(words: list[str]) -> float:
    """Return the median over rounds of the difference per step between a learned and a natural mixture."""
    learned = compose([*words, *LEARNED])
    loss = np.random.Generator(np.random.Philox(0)).uniform(2, 3, (32, 1024)).astype(np.float32)
    differences = []
    with ExitStack() as planes:
        with_losses = planes.enter_context(DataPlane.open(learned))
        without = planes.enter_context(DataPlane.open(compose(words)))
        for _ in range(ROUNDS):
            cost = _thread_s(with_losses, loss) - _thread_s(without, None)
            differences.append(cost / STEPS_PER_ROUND * 1e3)
    return float(np.median(differences))


def _thread_s(plane: DataPlane, loss: np.ndarray | None) -> float:
    """Return the CPU time of the trainer's thread for some steps."""
    batches = iter(plane)
    total = 0.0
    for _ in range(STEPS_PER_ROUND):
        began = time.thread_time()
        batch = next(batches)
        if loss is not None:
            plane.record(batch, loss)
        plane.stop_requested()
        total += time.thread_time() - began
    return total


def _trainer_ms(config: Config) -> float:
    """Return the CPU time of a step of the reference trainer: forward and backward pass, and AdamW."""
    # Heavy, and only this function needs it.
    import torch

    from mixtera_hpc.training.model import build_model

    torch.set_num_threads(1)
    model = build_model(config.training, 512, config.dataplane.seq_len)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 512, (32, config.dataplane.seq_len + 1))
    seconds = []
    for _ in range(TRAINER_STEPS):
        began = time.process_time()
        model(tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    return min(seconds) * 1e3
