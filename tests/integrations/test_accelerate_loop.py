"""A training loop with accelerate on a data plane: the conformance suite."""

from .conformance import TrainerConformance
from .launching import Example


class TestAccelerateLoop(TrainerConformance):
    example = Example(script="accelerate_loop.py")
