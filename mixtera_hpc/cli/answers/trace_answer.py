"""Print what `mixtera-hpc trace` asks for: the samples of a step, the steps of a sample, or the proof of a run."""

import argparse
import contextlib
import itertools
import json
import logging
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.cli.run_arguments import find_run, find_run_named
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import ConfigError, DataError, pluralize
from mixtera_hpc.trace.contents import StepContents, document_texts, export_batches, readable_sample, write_images
from mixtera_hpc.trace.diff import RunDifference, first_difference
from mixtera_hpc.trace.list import SequenceFilter, list_sequences
from mixtera_hpc.trace.locate import locate_row
from mixtera_hpc.trace.served_run import Record, ServedRun
from mixtera_hpc.trace.verify import VerifyResult, verify_run
from mixtera_hpc.trace.worst import worst_sequences, write_documents

__all__ = ["print_trace"]

logger = logging.getLogger("mixtera_hpc")


def print_trace(args: argparse.Namespace) -> None:
    """Print what the arguments ask for."""
    _check_arguments(args)
    run = ServedRun(find_run(args))
    if args.verify:
        _print_verified(verify_run(run), run.folder, args.json)
    elif args.diff is not None:
        other = ServedRun(find_run_named(args.diff, args))
        difference = first_difference(run, other)
        _print_difference(difference, (run.history.end, other.history.end), args.json)
    elif args.row is not None:
        _print_located(run, args)
    else:
        _print_sequences(run, args)


def _check_arguments(args: argparse.Namespace) -> None:
    if args.row is not None and args.shard is None:
        raise ConfigError("--row needs --shard, the path of the row's file below the data root.")
    if args.export is not None and args.step is None and args.steps is None:
        raise ConfigError("--export needs --step S or --steps A..B: a run has too many steps for one file.")
    if args.export is not None and args.show:
        raise ConfigError("--export and --show are both set. Run trace once with each.")
    if (args.show or args.export is not None) and (args.verify or args.diff is not None or args.row is not None):
        raise ConfigError("--show and --export list steps; remove --verify, --diff and --row.")
    _check_worst(args)
    given = (args.worst, args.step, args.steps, args.rank, args.domain, args.shard, args.row, args.diff)
    if not args.verify and all(value is None for value in given):
        raise ConfigError(
            "trace needs --step S or --steps A..B to list steps, --rank, --domain or --shard to list one of these, "
            "--worst N for the sequences with the highest losses, "
            "--shard FILE --row N to find a sample, --verify to prove the whole run, or --diff RUN_B to compare."
        )


def _check_worst(args: argparse.Namespace) -> None:
    if args.worst is None:
        if args.write is not None:
            raise ConfigError(
                "--write needs --worst N: it writes the documents of the sequences with the highest losses."
            )
        return
    if args.worst < 1:
        raise ConfigError(f"--worst is {args.worst}, but must be at least 1: the number of sequences to list.")
    if args.verify or any(value is not None for value in (args.diff, args.row, args.export)):
        raise ConfigError(
            "--worst lists the sequences with the highest losses; remove --verify, --diff, --row and --export.\n"
            "  Restrict it with --step, --steps, --rank, --domain or --shard."
        )


def _steps(args: argparse.Namespace) -> range | None:
    """Return the steps of --step or --steps; None without either."""
    if args.step is not None:
        return range(args.step, args.step + 1)
    if args.steps is None:
        return None
    match = re.fullmatch(r"(\d+)\.\.(\d+)", args.steps)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(f"--steps is {args.steps!r}, expected the first and the last step, e.g. --steps 10..19.")
    return range(int(match[1]), int(match[2]) + 1)


def _print_verified(result: VerifyResult, folder: RunFolder, as_json: bool) -> None:
    if as_json:
        _print_json(result)
    else:
        _print_proof(result)
    if result.unproven_steps:
        gaps = ", ".join(f"{first} to {last}" for first, last in result.unproven_steps)
        raise DataError(
            f"Steps {gaps} cannot be proven: lines of {folder.journal.name} or of an audit log in {folder.path} are "
            "damaged. All other steps are proven.\n  Restore the files and verify again."
        )


def _print_proof(result: VerifyResult) -> None:
    print(
        f"verified: {result.num_sequences:,} sequences of {result.num_steps} steps, each consumed exactly once as "
        f"planned, over {pluralize(result.num_attempts, 'attempt')}"
    )
    if result.unfinished_step is not None:
        print(f"The last attempt was killed in step {result.unfinished_step}, which is not part of the proof.")


def _print_difference(difference: RunDifference, ends: tuple[int, int], as_json: bool) -> None:
    if as_json:
        _print_json(difference)
        return
    if difference.step is None:
        rest = "" if ends[0] == ends[1] else f"; they have {ends[0]} and {ends[1]}"
        print(f"the same data in all {difference.num_same_steps} steps that both have{rest}")
        return
    print(f"the same data up to step {difference.step} position {difference.position}, where they were served:")
    for record in (difference.first, difference.second):
        print(_readable_segments(record) if record else "    nothing: the global batch is smaller")
    print("\n".join(f"differs: {cause}" for cause in difference.causes) or "settings and weights are the same")


def _print_located(run: ServedRun, args: argparse.Namespace) -> None:
    is_empty = True
    for record in locate_row(run, args.shard, args.row, args.rank):
        is_empty = False
        if args.json:
            _print_json(record)
            continue
        start, end = record["items"]
        print(
            f"step {record['step']} position {record['position']} rank {record['rank']} (attempt {record['attempt']}): "
            f"epoch {record['epoch']}, items {start} to {end}"
        )
    if is_empty and not args.json:
        print(f"{args.shard} row {args.row} has not been served up to step {run.history.end}")


def _print_sequences(run: ServedRun, args: argparse.Namespace) -> None:
    wanted = SequenceFilter(steps=_steps(args), rank=args.rank, domain=args.domain, shard=args.shard)
    if args.worst is not None:
        records = iter(_worst(run, wanted, args))
    else:
        records = list_sequences(run, wanted)
    if not args.show and args.export is None:
        for record, names in records:
            _print_json(record) if args.json else print(_readable(record, names))
        return
    with contextlib.closing(StepContents(run)) as contents:
        if args.export is not None:
            _export(contents, records, args.export)
            return
        for record, names in records:
            contents.check_unchanged(record)
            shown = _shown(contents, record, run.folder)
            if args.json:
                _print_json(record | shown)
            else:
                print(_readable_content(record, names, shown))


def _worst(run: ServedRun, wanted: SequenceFilter, args: argparse.Namespace) -> list[tuple[Record, list[str]]]:
    """Return the sequences with the highest losses; write their documents to the file of --write."""
    worst = worst_sequences(run, wanted, args.worst)
    if not args.json:
        print(
            f"{len(worst.sequences)} of {pluralize(worst.num_recorded, 'sequence')} with a recorded loss, in "
            f"{pluralize(worst.num_steps, 'step')}"
        )
    if worst.incomplete_steps:
        logger.warning(
            "Not all losses were recorded in %d of these steps, the first of which is step %d.",
            len(worst.incomplete_steps),
            worst.incomplete_steps[0],
        )
    if args.write is not None:
        num_documents = write_documents(args.write, worst.sequences)
        logger.info("%s: %s", args.write, pluralize(num_documents, "document"))
    return worst.sequences


def _export(contents: StepContents, records: Iterator[tuple[Record, list[str]]], path: Path) -> None:
    batches: list[tuple[Batch, NDArray[np.int64]]] = []
    for step, of_step in itertools.groupby(records, key=lambda entry: entry[0]["step"]):
        positions = []
        for record, _ in of_step:
            contents.check_unchanged(record)
            positions.append(record["position"])
        batches.append((contents.batch(step), np.array(positions)))
    names = contents.source(batches[0][0].step).names if batches else []
    num_rows = export_batches(path, batches, names)
    print(f"{path}: {pluralize(num_rows, 'sequence')} of {pluralize(len(batches), 'step')}")


def _shown(contents: StepContents, record: Record, folder: RunFolder) -> dict[str, Any]:
    """Return the content of a sequence or sample, fit for JSON; images are written to the report folder."""
    step = record["step"]
    position = record["position"]
    batch = contents.batch(step)
    if batch.payloads is None:
        return {"texts": document_texts(contents.source(step), batch, position)}
    payload = batch.payloads[position]
    images = write_images(payload, folder.report / f"step_{step}", f"position_{position}")
    return {"sample": readable_sample(payload), "images": [str(path) for path in images]}


def _readable_content(record: Record, names: list[str], shown: dict[str, Any]) -> str:
    """Return the lines of a record, each document followed by its text."""
    if "texts" in shown:
        parts = shown["texts"]
    else:
        parts = ["\n".join([json.dumps(shown["sample"], ensure_ascii=False, indent=2, default=str), *shown["images"]])]
    lines = _readable(record, names).split("\n")
    contents = [textwrap.indent(part, "    | ", lambda line: True) for part in parts]
    return "\n".join([lines[0], *itertools.chain(*zip(lines[1:], contents, strict=True))])


def _print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _readable(record: Record, names: list[str]) -> str:
    head = f"step {record['step']} position {record['position']} rank {record['rank']}"
    facts = f"{names[record['domain_id']]}, epoch {record['epoch']}"
    if "loss" in record:
        facts += f", loss {record['loss']:.4f}" if math.isfinite(record["loss"]) else ", loss not finite"
    return f"{head}: {facts}\n{_readable_segments(record)}"


def _readable_segments(record: Any) -> str:
    lines = [f"    {shard} row {row}, items {start} to {end}" for shard, row, start, end in record["segments"]]
    return "\n".join(lines)
