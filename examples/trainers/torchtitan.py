"""Train torchtitan's Llama 3 on the batches of a data plane, inside torchtitan's own Trainer.

torchrun --nproc-per-node 2 examples/trainers/torchtitan.py --out runs/titan --overrides experiment=demo
"""

import sys
from argparse import Namespace

from command_line import TrainingRecord, parse_arguments

# This script has the name of the package torchtitan, so its folder must not come first in the search path.
sys.path.append(sys.path.pop(0))

import torchtitan_on_cpu
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.tools.logging import init_logger

from mixtera_hpc import Replicas, compose
from mixtera_hpc.integrations.torchtitan import HeldOutValidator, PlaneDataLoader, TitanTrainer


def configuration(arguments: Namespace, num_ranks: int) -> TitanTrainer.Config:
    data = compose(arguments.overrides)
    size = data.dataplane.global_batch_size
    interval = arguments.save_at or arguments.steps
    return TitanTrainer.Config(
        model_spec=torchtitan_on_cpu.tiny_model(),
        dump_folder=str(arguments.out),
        dataloader=PlaneDataLoader.Config(overrides=arguments.overrides),
        optimizer=default_adamw(lr=1e-3),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=1),
        training=TrainingConfig(
            seq_len=data.dataplane.seq_len,
            local_batch_size=size // num_ranks // arguments.accumulate,
            global_batch_size=size,
            steps=arguments.steps,
            mixed_precision_param="float32",
        ),
        # gloo cannot average the gradients of sharded parameters.
        parallelism=ParallelismConfig(data_parallel_replicate_degree=num_ranks, spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=True, interval=interval, last_save_model_only=False),
        metrics=MetricsProcessor.Config(log_freq=1, enable_tensorboard=True),
        debug=DebugConfig(seed=1),
        validator=HeldOutValidator.Config(enable=data.query.holdout.fraction > 0, freq=5),
    )


class RecordedTrainer(TitanTrainer):
    """Writes down what it trained on, and can leave early. A real job uses `TitanTrainer` as it is."""

    def __init__(self, arguments: Namespace, replicas: Replicas) -> None:
        self.record = TrainingRecord(arguments.out, replicas.comm.rank)
        self.stop_after = arguments.stop_after
        super().__init__(configuration(arguments, replicas.comm.size))

    def record_losses(self, batch, losses):
        super().record_losses(batch, losses)
        self.record.add(batch["positions"], batch["tokens"], losses, batch["loss_mask"])

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        self.record.end_step(self.step - 1)

    def should_continue_training(self) -> bool:
        return super().should_continue_training() and self.step != self.stop_after


if __name__ == "__main__":
    init_logger()
    with Replicas() as replicas:
        torchtitan_on_cpu.join_single_process()
        trainer = RecordedTrainer(parse_arguments(), replicas)
        try:
            trainer.train()
        finally:
            trainer.close()
