"""A data plane in Megatron-LM, and in loops on megatron-core."""

from mixtera_hpc.integrations.megatron.batch_format import BatchFormat
from mixtera_hpc.integrations.megatron.data import MegatronData
from mixtera_hpc.integrations.megatron.pretraining import MegatronPretraining

__all__ = ["BatchFormat", "MegatronData", "MegatronPretraining"]
