"""The learning rate of every step."""

import math

from mixtera_hpc.config.schema import TrainingConfig

__all__ = ["FINAL_FRACTION", "learning_rate"]

FINAL_FRACTION = 0.1
"""The last step's learning rate as a share of the highest."""


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine down to a tenth at the last of `num_steps`; steps count from 0."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    decay_steps = max(training.num_steps - 1 - training.warmup_steps, 1)
    progress = min((step - training.warmup_steps) / decay_steps, 1.0)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return training.learning_rate * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine)
