"""Run torchtitan's example on two ranks that work on the same sequences; `TITAN_LAYOUT` says how."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples/trainers"
LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"tensor_parallel_degree": 2},
    "pipeline": {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2},
}


def main() -> None:
    layout = LAYOUTS[os.environ["TITAN_LAYOUT"]]
    sys.path.append(str(EXAMPLES))
    # It lets torchtitan run on the CPU, and so comes before everything that imports torchtitan.
    import torchtitan_on_cpu  # noqa: F401
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.config import ParallelismConfig

    from mixtera_hpc.integrations.torchtitan import TitanTrainer

    start = TitanTrainer.__init__

    def start_in_layout(trainer: TitanTrainer, config: Any) -> None:
        config.parallelism = ParallelismConfig(**layout, spmd_backend="partial_dtensor")
        # The example shares the global batch among data-parallel ranks; here there is only one.
        config.training.local_batch_size *= 2
        config.training.disable_cuda_graphs = True
        config.loss = ChunkedLossWrapper.Config(num_chunks=2, loss_fn=config.loss)
        start(trainer, config)

    TitanTrainer.__init__ = start_in_layout
    sys.path.insert(0, str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / "torchtitan.py"), run_name="__main__")


main()
