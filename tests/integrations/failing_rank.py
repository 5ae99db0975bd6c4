"""Run a script as `python SCRIPT ARGUMENTS…` does, except that the third optimizer step of rank 1 raises.

The time of the exception is written to `FAILED_AT` in the folder that follows `--out`.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

FAILED_AT = "failed_at"


class ThirdStepOfRank1:
    """A hook that runs before every optimizer step."""

    def __init__(self) -> None:
        self._num_steps = 0

    def __call__(self, *arguments: Any) -> None:
        self._num_steps += 1
        # The launcher decides about ranks, and so says which one this is.
        rank = os.environ.get("RANK", os.environ.get("PMI_RANK"))
        if rank == "1" and self._num_steps == 3:
            out = Path(sys.argv[sys.argv.index("--out") + 1])
            (out / FAILED_AT).write_text(repr(time.time()))
            raise ValueError("broken on purpose")


def main() -> None:
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    register_optimizer_step_pre_hook(ThirdStepOfRank1())
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
