"""The learning rate of each optimizer step: linear warm-up, then cosine decay; or a linear decay to 0 at the end."""

import math

from mixtera_hpc.config.schema import TrainingConfig

__all__ = ["FINAL_FRACTION", "learning_rate"]

FINAL_FRACTION = 0.1
"""Learning rate of the last step, as a fraction of `training.learning_rate`."""


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Return the learning rate of `step`, counted from 0.

    The rate rises linearly over `warmup_steps` and falls along a cosine to `FINAL_FRACTION` of its peak at the last of
    `num_steps`. With `anneal_from_step` it falls linearly from `anneal_from_rate` at that step to 0 at `num_steps`.
    """
    if training.anneal_from_step is not None and step >= training.anneal_from_step:
        remaining = (training.num_steps - step) / max(training.num_steps - training.anneal_from_step, 1)
        return training.anneal_from_rate * max(remaining, 0.0)
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps

    decay_steps = max(training.num_steps - 1 - training.warmup_steps, 1)
    progress = min((step - training.warmup_steps) / decay_steps, 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return training.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)
