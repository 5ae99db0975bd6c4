"""`mixtera-hpc plan`: what a mixture will serve, before anything is submitted."""

import argparse
import sys
from typing import Any

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="Hydra overrides; plan.first_step and plan.steps choose the steps")
    parser.add_argument("--json", action="store_true", help="one line per sequence instead of the forecast")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.comm.communicator import Local
    from mixtera_hpc.config.compose import compose
    from mixtera_hpc.dataplane.reading.source import open_source
    from mixtera_hpc.errors import ConfigError

    config = compose(args.overrides)
    if config.plan.digests and not args.json:
        raise ConfigError("plan.digests=true is of sequences, which only plan --json lists. Add --json.")
    source = open_source(config, Local())
    if args.json:
        _print_sequences(source)
    else:
        _print_forecast(source)
    return 0


def _print_sequences(source: Any) -> None:
    import msgspec

    from mixtera_hpc.errors import MixtureError
    from mixtera_hpc.trace.list import planned_sequences

    plan = source.config.plan
    steps, record = source.config.dataplane.chunk_steps if plan.steps is None else plan.steps, None
    for record in planned_sequences(source, plan.first_step, steps):
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    if record is None:
        raise MixtureError(
            f"plan.first_step is {plan.first_step}, but the data has ended by then.\n  See when it does with mixtera-hpc plan."
        )


def _print_forecast(source: Any) -> None:
    from rich.table import Table

    from mixtera_hpc.cli.console import open_console
    from mixtera_hpc.trace.forecast import forecast_mixture

    plan = source.config.plan
    expected = forecast_mixture(source, plan.steps if plan.steps is not None else source.config.training.num_steps)
    table = Table(
        title=f"{expected.num_steps} steps of {source.planner.global_batch_size} sequences", title_justify="left"
    )
    for heading in ("domain", "weight", f"has ({expected.unit})", "will be served", "epochs", "runs out at step"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for d in expected.domains:
        runs_out = "—" if d.runs_out_at_step is None else str(d.runs_out_at_step)
        table.add_row(d.name, f"{d.weight:.4f}", f"{d.items:,}", f"{d.served:,}", f"{d.epochs:.2f}", runs_out)
    console = open_console()
    console.print(table)
    step = expected.step
    console.print(
        f"{expected.bytes_per_step / 1e6:.3g} MB read per step over all ranks: {step.documents:,.0f} documents of about "
        f"{step.blocks:,.0f} blocks in {step.shards:,.0f} shards"
    )
    console.print(
        f"read amplification where blocks are read whole and none is kept: {step.read_amplification:.1f}; "
        "where rows are read by themselves: 1.0"
    )
    mixture = source.config.mixture
    if expected.num_steps < expected.steps_asked:
        share = "" if mixture.on_exhausted == "redistribute" else ", or set mixture.on_exhausted=redistribute"
        console.print(
            f"The data ends after {expected.num_steps} steps, {expected.steps_asked} were asked for: raise "
            f"max_epochs of the mixture or of the domains that run out{share}."
        )
    if "dynamic" in (mixture.kind, *(stage.kind for stage in mixture.schedule.stages)):
        console.print("The mixture is learned while training: this is what its start weights would serve.")
    if mixture.kind == "schedule":
        console.print("The mixture follows a schedule: weights are those of step 0.")
