"""Fork a run onto several mixtures, and train the new runs: `mixtera-hpc fork`."""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.cli.run_arguments import find_run
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import TrainingConfig
from mixtera_hpc.config.yaml_files import read_yaml
from mixtera_hpc.dataplane.resume.fork_run import Fork, ForkPoint, fork_runs, open_fork_point
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.training.schedule import learning_rate

__all__ = ["fork_and_train"]


def fork_and_train(args: argparse.Namespace) -> int:
    """Make the new runs, print how to go on, and train them with --run; return the first exit code that is not 0."""
    point = open_fork_point(find_run(args), args.step)
    training = _training(args, point)
    labels = [_label(path) for path in args.mixtures]
    if len(set(labels)) < len(labels):
        raise ConfigError("Two files of --set have the same name, which would name two runs. Rename one of them.")
    forks = [
        Fork(label=label, file=path, content=read_yaml(path), training=training)
        for label, path in zip(labels, args.mixtures, strict=True)
    ]
    children = fork_runs(point, forks, datetime.now(UTC))
    for child in children:
        print(f"{child.path}: from step {point.step} of {point.parent.run_id} on, to step {training.num_steps}")
    print(f"The new mixtures serve from step {point.first_step} on; the checkpoint holds the plan of the steps before.")
    if not args.train:
        for child in children:
            print(f"  mixtera-hpc resume {child.path}")
        return 0
    codes = [_train(child) for child in children]
    return next((code for code in codes if code), 0)


def _training(args: argparse.Namespace, point: ForkPoint) -> TrainingConfig:
    """Return the trainer's settings of the new runs."""
    training = point.config.training
    num_steps = training.num_steps if args.steps is None else args.step + args.steps
    if num_steps <= args.step:
        raise ConfigError(
            f"The new runs would end at step {num_steps}, and begin at step {args.step}. Give --steps, at least 1."
        )
    forked = replace(training, num_steps=num_steps, stop_after=None)
    if args.keep_rate:
        return forked
    return replace(forked, anneal_from_step=args.step, anneal_from_rate=learning_rate(args.step, training))


def _label(path: Path) -> str:
    """Return the name of a file as a part of a run id."""
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. Give a YAML file with the keys below `mixture:`.")
    return re.sub(r"[^\w.-]", "_", path.stem)


def _train(child: RunFolder) -> int:
    words = [sys.executable, "-u", "-m", "mixtera_hpc", "resume", str(child.path), "--here"]
    return subprocess.run(words, check=False).returncode
