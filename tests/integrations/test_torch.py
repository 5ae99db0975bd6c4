"""The example of a loop of one's own with DistributedDataParallel."""

from .conformance import TrainerConformance
from .launching import Example


class TestTorch(TrainerConformance):
    example = Example(script="torchrun_ddp.py")
