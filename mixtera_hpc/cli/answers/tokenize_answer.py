"""Run `mixtera-hpc tokenize` on every rank, and print its result on rank 0."""

import argparse
import sys

import msgspec

from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.cli.index_progress import show_progress
from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.token_store.store_job import StorePlan, StoreReport, write_store

__all__ = ["tokenize"]


def tokenize(args: argparse.Namespace) -> int:
    """Write the token store and return the exit code. **Collective.**"""
    comm = open_communicator(creates_group=True)
    reports: list[StoreReport] = []

    def body() -> None:
        config = compose_data(args.overrides)
        if config.data.tokens == "off":
            raise ConfigError(
                "data.tokens is off, so no tokens can be written.\n  Set data.tokens to a folder, or to auto."
            )
        with show_progress(comm) as progress:
            reports.append(write_store(config, comm, _announce, progress))

    failed = run_guarded(comm, body)
    if failed or comm.rank > 0:
        return failed
    (report,) = reports
    print(msgspec.json.encode(report).decode() if args.json else _text(report))
    return 0


def _announce(plan: StorePlan) -> None:
    """Print the size before anything is written."""
    width = int(plan.dtype[-1])
    done = f", {plan.num_units - plan.missing_units} of {plan.num_units} units are there" if plan.missing_units else ""
    sys.stderr.write(
        f"{plan.tokens:,} tokens of {width} bytes: {plan.num_bytes / 1e9:,.3g} GB in {plan.folder}, "
        f"{plan.free_bytes / 1e9:,.3g} GB free{done}\n"
    )
    sys.stderr.flush()


def _text(report: StoreReport) -> str:
    if not report.units_written:
        return f"{report.folder} is complete: {report.tokens:,} tokens."
    return (
        f"Wrote {report.folder}: {report.tokens:,} tokens, {report.num_bytes / 1e9:,.3g} GB, in "
        f"{report.seconds:,.1f} s. Runs over this index use it (data.tokens=auto)."
    )
