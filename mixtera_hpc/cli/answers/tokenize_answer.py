"""Run `mixtera-hpc tokenize` on every rank, and print its result on rank 0."""

import argparse

import msgspec

from mixtera_hpc.cli.answers.store_text import announce_store, store_line
from mixtera_hpc.cli.collection import compose_data
from mixtera_hpc.cli.index_progress import show_progress
from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.token_store.store_job import StoreReport, write_store

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
            reports.append(write_store(config, comm, announce_store, progress))

    failed = run_guarded(comm, body)
    if failed or comm.rank > 0:
        return failed
    (report,) = reports
    print(msgspec.json.encode(report).decode() if args.json else store_line(report))
    return 0
