"""Add to torch what torchtitan 0.3 needs without a GPU and with torch 2.13. Import it before torchtitan."""

import os
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools import utils

__all__ = ["join_single_process", "tiny_model"]


class _Cpu(ModuleType):
    """`torch.cpu` with the functions for which torchtitan asks the module of its device."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: object = None) -> str:
        return "cpu"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def join_single_process() -> None:
    """Create a process group of one rank, which torchtitan expects, unless a launcher has started this process."""
    if "WORLD_SIZE" not in os.environ:
        os.environ["LOCAL_RANK"] = "0"
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def tiny_model() -> Any:
    """Return the specification of a Llama 3 with two layers."""
    # Below, this module changes what these modules copy.
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    spec = model_registry("debugmodel")
    del spec.model.layers[2:]
    # The attention that torchtitan confines to documents needs a GPU.
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec


# torchtitan's other modules copy these names when they are imported.
if not torch.cuda.is_available():
    utils.device_type = "cpu"
    utils.device_module = _Cpu("cpu")
# torchtitan 0.3 was written for a later torch than 2.13.
if not hasattr(dist, "set_timeout"):
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout
