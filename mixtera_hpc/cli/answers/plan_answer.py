"""Print what `mixtera-hpc plan` asks for: a forecast of a mixture, or the sequences of chosen steps."""

import argparse
import sys

import msgspec
import numpy as np

from mixtera_hpc.cli.answers.job_time import JobTime
from mixtera_hpc.cli.answers.packing_text import packing_rows
from mixtera_hpc.cli.console import open_console
from mixtera_hpc.cli.run_or_overrides import find_optional_run
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.job_shape import num_ranks
from mixtera_hpc.config.mixture.domain_tree import domain_fractions
from mixtera_hpc.config.mixture.learning import learning_warnings
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, MixtureConfig
from mixtera_hpc.dataplane.reading.lane_count import lanes_of_batch
from mixtera_hpc.dataplane.reading.residency.decode_cost import cost_with_more_lanes, decode_cost
from mixtera_hpc.dataplane.reading.residency.decode_limit import check_decode_cost
from mixtera_hpc.dataplane.reading.residency.job_shape import JobShape
from mixtera_hpc.dataplane.reading.rows.mapped_rows import MIN_DENSITY
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.run_identity import data_of_run
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.dataplane.validation_plan import MAX_NAMES, domains_without_held_out
from mixtera_hpc.errors import ConfigError, MixtureError, list_names, pluralize
from mixtera_hpc.trace.forecast import MixtureForecast, forecast_mixture, sampled_chunks
from mixtera_hpc.trace.list import planned_sequences

__all__ = ["print_decode_cost", "print_plan"]

MAX_RANKS_PER_LANE = 16
"""Ranks that share a lane before more lanes are proposed: with 64, most of a rank's time goes into windows."""


def _job_time(config: Config, folder: RunFolder | None) -> JobTime | None:
    """Return the given time of a step, or the one that the run has measured; None if there is neither."""
    if config.plan.step_s is not None:
        return JobTime.given(config)
    return JobTime.measured(config, folder) if folder is not None else None


def print_plan(args: argparse.Namespace) -> None:
    """Print the forecast or the sequences."""
    folder = find_optional_run(args)
    if folder is not None:
        config, subset = data_of_run(folder, args.split)
    else:
        config = compose(args.overrides)
        subset = SampleSubset(split=args.split)
    if config.plan.digests and not args.json:
        raise ConfigError("plan.digests=true needs --json: only the list of sequences has digests. Add --json.")

    source = open_source(config, Local(), subset=subset)
    if args.json:
        _print_sequences(source)
    else:
        plan_steps = config.plan.steps
        num_steps = config.training.num_steps if plan_steps is None else plan_steps
        forecast = forecast_mixture(source, num_steps)
        _print_forecast(source, forecast)
        _print_learning(config, subset)
        _print_packing(source)
        print_decode_cost(source, forecast)
        if (job_time := _job_time(config, folder)) is not None:
            open_console().print(job_time.text(forecast.num_steps))


def print_decode_cost(source: Source, forecast: MixtureForecast) -> None:
    """Print the number of lanes, and what the job of the configuration decodes.

    Raises:
        ConfigError: it is more than `data.max_amplification`.
    """
    config = source.config
    _print_lanes(source)
    ranks = num_ranks(config)
    items = np.array([domain.served for domain in forecast.domains], np.float64)
    shape = JobShape.of_job(source, ranks, ranks // config.job.nodes)
    per_step = items / max(forecast.num_steps, 1)
    cost = decode_cost(source, per_step, shape)
    if cost is not None:
        # The lower bound assumes that blocks do not stay in memory. A collection that fits into it needs less.
        least = min(cost.lower_bound, cost.amplification)
        open_console().print(
            f"Decoding, on {pluralize(ranks, 'rank')} of {pluralize(config.job.nodes, 'node')}: "
            f"{cost.amplification:.1f} bytes per byte served, at least {least:.1f} with this layout of the "
            f"data; {cost.read_bytes_per_step / 1e6:.3g} MB read from the file system per step; "
            f"{cost.memory_bytes / 1e9:.3g} GB of memory per node"
        )
    if (better := cost_with_more_lanes(source, per_step, shape)) is not None:
        lanes, less = better
        open_console().print(
            f"Nodes that share a lane decode the same files. With dataplane.lanes={lanes}, set before the run begins, "
            f"they decode {less.amplification:.1f} bytes per byte served and take {less.memory_bytes / 1e9:.3g} GB of "
            "memory per node."
        )
    elif (better_lanes := _lanes_for_windows(source, shape)) is not None:
        open_console().print(
            f"{shape.num_groups:,} ranks share {source.lanes.lanes} lanes, so each node builds windows of which it "
            f"serves a small part. With dataplane.lanes={better_lanes}, set before the run begins, it builds only what "
            "it serves."
        )
    check_decode_cost(source, cost)


def _print_lanes(source: Source) -> None:
    """Print the number of lanes and its default."""
    plane = source.config.dataplane
    if plane.shuffle != "window":
        return
    lanes = source.lanes.lanes
    largest = source.planner.batch_schedule.largest
    of_batch = lanes_of_batch(plane)
    default = source.index.default_lanes
    text = f"the default for global batches of {largest:,}"
    if lanes != default:
        text = f"from dataplane.lanes or the start of the run; {text} is {default:,}"
    if default < of_batch:
        text += f", and not {of_batch:,}, because windows of compressed data must fit into the memory of a node"
    open_console().print(f"Lanes: {lanes:,}, {text}")

    num_sequences = source.lanes.epoch_items // source.grid.stride
    num_short = np.count_nonzero(num_sequences < lanes)
    if num_short and lanes > default:
        open_console().print(
            f"An epoch of {num_short:,} of {pluralize(source.num_domains, 'domain')} has fewer sequences than lanes. "
            "These domains are served from a single lane, and mix less. Lower dataplane.lanes."
        )


def _lanes_for_windows(source: Source, shape: JobShape) -> int | None:
    """Return a number of lanes with which nodes share no windows; None if few ranks share them, or without windows."""
    plane = source.config.dataplane
    lanes = min(shape.num_decoders, source.planner.batch_schedule.size_at(0))
    is_shared = plane.shuffle == "window" and shape.num_groups >= MAX_RANKS_PER_LANE * source.lanes.lanes
    return lanes if is_shared and lanes > source.lanes.lanes else None


def _print_packing(source: Source) -> None:
    """Print what packing cuts, and what balancing changes for the ranks of the job."""
    config = source.config
    for label, text in packing_rows(source, num_ranks(config) // config.dataplane.model_parallel_size):
        open_console().print(f"{label}: {text}")


def _print_sequences(source: Source) -> None:
    plan = source.config.plan
    num_steps = source.config.dataplane.chunk_steps if plan.steps is None else plan.steps
    record = None
    for record in planned_sequences(source, plan.first_step, num_steps):
        sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
    if record is None:
        raise MixtureError(
            f"plan.first_step is {plan.first_step}, but the data ends before it.\n"
            "  See the last step with mixtera-hpc plan."
        )


def _print_forecast(source: Source, forecast: MixtureForecast) -> None:
    _print_domains(source, forecast)
    console = open_console()
    step = forecast.step
    console.print(
        f"{forecast.bytes_per_step / 1e6:.3g} MB read per step over all ranks: {step.documents:,.0f} documents "
        f"of about {step.blocks:,.0f} blocks in {step.shards:,.0f} shards"
    )
    console.print(
        f"Read amplification: {step.read_amplification:.1f}× for formats that read whole blocks, without a cache; "
        f"at most {1 / MIN_DENSITY:g}× for formats that read single rows"
    )

    _print_fractions(source)
    if source.index.counting:
        console.print(source.index.counting)
        console.print("For a large index, derive a category from the number once: mixtera-hpc index derive.")
    mixture = source.config.mixture
    if forecast.num_steps < forecast.steps_asked:
        console.print(
            f"The data ends after {forecast.num_steps} of {forecast.steps_asked} steps: raise max_epochs of the "
            f"mixture or of the domains that run out{_other_policy(mixture, len(forecast.domains))}."
        )

    if forecast.left_over:
        console.print(_unserved_text(source, forecast))

    # The weights of these mixtures change during the run.
    if "dynamic" in (mixture.kind, *(stage.kind for stage in mixture.schedule.stages)):
        console.print("The mixture is learned while training; this is what its initial weights would serve.")
    if mixture.kind == "schedule":
        console.print("The mixture follows a schedule; the weights shown are those of step 0.")
        interval = sampled_chunks(source, forecast.steps_asked) * source.planner.chunk_steps
        if interval > source.planner.chunk_steps:
            console.print(f"Its weights are sampled every {interval:,} steps; steps shown may be off by as much.")


def _print_fractions(source: Source) -> None:
    """Print the fraction of its training samples that each domain is limited to."""
    fractions = domain_fractions(source.config.mixture, source.num_domains)
    if fractions is None or source.subset.split != "train":
        return
    if len(set(fractions)) == 1:
        text = f"all domains {fractions[0]:g}"
    else:
        pairs = zip(source.names, fractions, strict=True)
        text = list_names([f"{name} {fraction:g}" for name, fraction in pairs if fraction < 1], MAX_NAMES)
    open_console().print(f"Fraction of the training samples: {text}. Sizes, weights and epochs refer to these samples.")


def _print_learning(config: Config, subset: SampleSubset) -> None:
    """Print what keeps a mixture from learning, and the domains without a held-out loss."""
    for warning in learning_warnings(config):
        open_console().print(warning)
    # Opens the index once more, for the held-out samples.
    if subset.split == "train" and config.query.holdout.fraction > 0:
        without = domains_without_held_out(config, subset)
        if without:
            open_console().print(
                f"No held-out loss of {list_names(without, MAX_NAMES)}: their held-out samples do not fill a sequence. "
                "Raise query.holdout.fraction."
            )


def _other_policy(mixture: MixtureConfig, num_domains: int) -> str:
    """Return the advice to change what happens at the end of a domain; empty if nothing would last longer."""
    # A single domain has no other domains that could get its share.
    if num_domains > 1 and mixture.on_exhausted != "redistribute":
        return ", or set mixture.on_exhausted=redistribute"
    return "" if mixture.on_exhausted == "repeat" else ", or set mixture.on_exhausted=repeat"


def _unserved_text(source: Source, forecast: MixtureForecast) -> str:
    left_over = forecast.left_over
    noun = pluralize(left_over, "sequence" if source.layout.in_tokens else "sample")
    size = source.planner.batch_schedule.size_at(forecast.num_steps)
    if source.planner.last_batch == "pad":
        text = f"The last step has {noun} and {pluralize(size - left_over, 'row')} of padding."
    else:
        text = (
            f"Left over at the end: {noun}, too few for a global batch of {size}, and not served. "
            "dataplane.last_batch=pad serves them."
        )
    if source.layout.in_tokens:
        text += " Of every domain that ends, tokens that do not fill a sequence are not served."
    return text


def _batch_sizes(source: Source, num_steps: int) -> str:
    """Return the sizes of the global batches of a run, and where they change: "64 (128 from step 1,000)"."""
    schedule = source.planner.batch_schedule
    stages = zip(schedule.starts[1:], schedule.sizes[1:], strict=True)
    later = [f"{size} from step {start:,}" for start, size in stages if start < num_steps]
    return f"{schedule.sizes[0]} ({', '.join(later)})" if later else str(schedule.sizes[0])


def _print_domains(source: Source, forecast: MixtureForecast) -> None:
    # rich takes 0.1 s to import, which --json does not need.
    from rich.table import Table

    title = f"{forecast.num_steps} steps of {_batch_sizes(source, forecast.num_steps)} sequences"
    table = Table(title=title, title_justify="left")
    for heading in ("domain", "weight", f"has ({forecast.unit})", "will be served", "epochs", "runs out at step"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for d in forecast.domains:
        runs_out = "—" if d.runs_out_at_step is None else str(d.runs_out_at_step)
        table.add_row(d.name, f"{d.weight:.4f}", f"{d.items:,}", f"{d.served:,}", f"{d.epochs:.2f}", runs_out)
    open_console().print(table)
