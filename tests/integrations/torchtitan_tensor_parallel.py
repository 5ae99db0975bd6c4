"""Run torchtitan's example on two ranks of one tensor-parallel group."""

import runpy
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples/trainers"


def main() -> None:
    sys.path.append(str(EXAMPLES))
    # It lets torchtitan run on the CPU, and so comes before everything that imports torchtitan.
    import torchtitan_on_cpu  # noqa: F401
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.config import ParallelismConfig

    from mixtera_hpc.integrations.torchtitan import TitanTrainer

    start = TitanTrainer.__init__

    def start_tensor_parallel(trainer: TitanTrainer, config: Any) -> None:
        config.parallelism = ParallelismConfig(tensor_parallel_degree=2, spmd_backend="partial_dtensor")
        # The example shares the global batch among data-parallel ranks; here there is only one.
        config.training.local_batch_size *= 2
        config.loss = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config.loss)
        start(trainer, config)

    TitanTrainer.__init__ = start_tensor_parallel
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "torchtitan.py"), run_name="__main__")


main()
