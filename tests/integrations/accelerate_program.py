"""Iterate over a `PlaneDataset` through loaders that accelerate has prepared, and print what each rank gets or reads.

python accelerate_program.py OVERRIDES…, or torchrun --nproc-per-node N accelerate_program.py OVERRIDES…
"""

import json
import sys
from collections.abc import Callable

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.integrations.torch import PlaneDataset

STEPS = 6

Answer = list[list[int]] | str
"""The first position and the sum of the tokens of every step, or the message of the refusal."""


def loop(config: Config, prepare: Callable[[DataLoader], DataLoader]) -> Answer:
    """Train on some steps of a loader; every batch is recorded, whatever was fetched ahead."""
    served = []
    with DataPlane.open(config) as plane:
        try:
            for batch in prepare(DataLoader(PlaneDataset(plane, num_steps=STEPS), batch_size=None)):
                plane.record(batch, (batch["tokens"][:, 1:] % 7).float())
                served.append([batch["step"].item(), batch["positions"][0].item(), batch["tokens"].sum().item()])
        except ConfigError as error:
            return str(error)
        plane.state_dict()
        assert [statistics.step for statistics in plane.completed_statistics()] == list(range(STEPS))
    return served


def main() -> None:
    config = compose(sys.argv[1:])
    # The data plane takes the process group that this creates.
    is_main_process = Accelerator(cpu=True).is_main_process
    answers = {"unprepared": loop(config, lambda loader: loader)}
    for setting in ({"dispatch_batches": True}, {"dispatch_batches": False}, {"use_stateful_dataloader": True}):
        options = {"dispatch_batches": False, **setting}
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        name = ",".join(f"{key}={value}" for key, value in setting.items())
        answers[name] = loop(config, accelerator.prepare)

    is_distributed = torch.distributed.is_initialized()
    gathered = [answers] * (torch.distributed.get_world_size() if is_distributed else 1)
    if is_distributed:
        torch.distributed.all_gather_object(gathered, answers)
        torch.distributed.destroy_process_group()
    if is_main_process:
        print(json.dumps(gathered))


if __name__ == "__main__":
    main()
