"""The Hugging Face `Trainer` on a data plane: the conformance suite, and what is refused."""

from .conformance import TrainerConformance
from .launching import Example


class TestHuggingFace(TrainerConformance):
    example = Example(script="huggingface.py")
