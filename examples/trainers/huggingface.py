"""Train a small Llama with the Hugging Face `Trainer` on a data plane.

python huggingface.py --overrides experiment=demo --out runs/hf
torchrun --nproc-per-node 2 huggingface.py …, or mpiexec -n 2 python huggingface.py …
"""

from command_line import TrainingRecord, parse_arguments
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments, set_seed

from mixtera_hpc import DataPlane, Replicas, RunFolder, compose
from mixtera_hpc.integrations.transformers import PlaneTrainer


class RecordingTrainer(PlaneTrainer):
    """Records the tokens that the model trains on."""

    record: TrainingRecord
    step: int

    def token_losses(self, model, batch):
        losses, outputs = super().token_losses(model, batch)
        if model.training:
            self.step = batch["step"]
            self.record.add(batch["positions"], batch["tokens"], losses, batch["loss_mask"])
        return losses, outputs


class EndOfStep(TrainerCallback):
    """Writes a line per optimizer step, and saves and leaves where the command line says so."""

    def on_step_end(self, args, state, control, **kwargs):
        trainer.record.end_step(trainer.step)
        control.should_save |= state.global_step == arguments.save_at
        control.should_training_stop |= state.global_step == arguments.stop_after


arguments = parse_arguments()
config = compose(arguments.overrides)
with Replicas() as replicas, DataPlane.open(config, folder=RunFolder(arguments.out)) as plane:
    set_seed(config.dataplane.seed)
    trainer = RecordingTrainer(
        plane=plane,
        model=LlamaForCausalLM(
            LlamaConfig(
                vocab_size=plane.vocab_size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=config.dataplane.seq_len,
            )
        ),
        args=TrainingArguments(
            output_dir=str(arguments.out),
            max_steps=arguments.steps,
            per_device_train_batch_size=plane.local_batch_size // arguments.accumulate,
            gradient_accumulation_steps=arguments.accumulate,
            use_cpu=replicas.device.type == "cpu",
            learning_rate=1e-3,
            logging_steps=1,
            eval_strategy="steps" if config.query.holdout.fraction > 0 else "no",
            eval_steps=4,
            disable_tqdm=True,
        ),
    )
    trainer.record = TrainingRecord(arguments.out, replicas.comm.rank)
    trainer.add_callback(EndOfStep())
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_state()
