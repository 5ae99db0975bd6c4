"""`mixtera-hpc mixture`: the mixture of a run: what it is, what it was, and another one from a named chunk on."""

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtera_hpc.config.run_folder import RunFolder

__all__ = ["arguments", "run"]

MAX_COLUMNS = 5
"""Weights that are shown side by side."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    parser.add_argument(
        "--set", type=Path, metavar="FILE", help="YAML as below `mixture:`, e.g. kind: static with domains"
    )
    parser.add_argument("--at-chunk", default="next", metavar="N", help="the first chunk it holds for (default: next)")
    parser.add_argument("--json", action="store_true", help="one line per chunk whose weights are new")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder, runs_root
    from mixtera_hpc.errors import ConfigError

    folder = RunFolder.find(args.run_name, args.root or runs_root())
    if args.at_chunk != "next" and not args.at_chunk.isdigit():
        raise ConfigError(f"--at-chunk is {args.at_chunk!r}, expected the number of a chunk, or next.")
    if args.set is None and args.at_chunk != "next":
        raise ConfigError("--at-chunk says when the mixture of --set begins. Give --set FILE as well.")
    if args.set is None:
        return _show(folder, args.json)
    return _set(folder, args.set, None if args.at_chunk == "next" else int(args.at_chunk))


def _set(folder: "RunFolder", file: Path, chunk: int | None) -> int:
    from mixtera_hpc.comm.communicator import Local
    from mixtera_hpc.config.compose import load_config
    from mixtera_hpc.config.yaml_files import read_yaml
    from mixtera_hpc.dataplane.mixing.from_config import make_mixer
    from mixtera_hpc.dataplane.mixing.requests import MixtureRequest, requested_mixture, write_request
    from mixtera_hpc.dataplane.reading.source import open_source
    from mixtera_hpc.dataplane.run_edits import pin_index_generation
    from mixtera_hpc.errors import ConfigError

    if not file.is_file():
        raise ConfigError(f"There is no file {file}. --set takes a YAML file with what stands below `mixture:`.")
    config = pin_index_generation(load_config(folder.config), folder.journal)
    mixture = requested_mixture(config.mixture, read_yaml(file))
    source = open_source(config, Local(), check=False)
    weights = make_mixer(mixture, source.mixture_context, learn=False).weights_of(0)
    _check_planned(folder, chunk)
    write_request(folder.control, MixtureRequest(mixture=mixture, chunk=chunk))
    shares = "" if weights is None else "".join(f"\n  {w:.4f}  {n}" for n, w in zip(source.names, weights, strict=True))
    print(f"asked for, from {'the next chunk' if chunk is None else f'chunk {chunk}'} on:{shares}")
    if not _goes_on(folder):
        print(f"The run is not going on now; it takes this up with: mixtera-hpc resume {folder.name}/{folder.run_id}")
    print(f"See what was decided with: mixtera-hpc mixture {folder.name}/{folder.run_id}")
    return 0


def _goes_on(folder: "RunFolder") -> bool:
    from mixtera_hpc.launch.status import run_statuses

    return run_statuses([folder], datetime.now(UTC))[0].state.active


def _check_planned(folder: "RunFolder", chunk: int | None) -> None:
    """Refuse at once what rank 0 would refuse. An attempt that was killed tells nothing: the next one plans anew from a checkpoint."""
    from mixtera_hpc.dataplane.journal import History
    from mixtera_hpc.errors import ConfigError

    if chunk is None or not folder.journal.is_file():
        return
    attempts = History(folder.journal).attempts
    if not attempts or not attempts[-1].plans or (attempts[-1].next_step is None and not _goes_on(folder)):
        return
    planned = attempts[-1].plans[-1].chunk
    if chunk <= planned:
        raise ConfigError(
            f"Chunk {chunk} is planned already, up to chunk {planned}.\n  Give --at-chunk next, or {planned + 2} or later."
        )


def _show(folder: "RunFolder", as_json: bool) -> int:
    import json

    from mixtera_hpc.dataplane.journal import History
    from mixtera_hpc.dataplane.mixing.requests import read_decisions

    lines = _chunks(History(folder.journal))
    changes = [change.to_dict() for change in read_decisions(folder.decisions)]
    if as_json:
        for line in [*lines, *changes]:
            print(json.dumps(line))
        return 0
    _print_table(lines)
    for change in changes:
        what = f"refused: {change['refused']}" if change["refused"] else f"mixture.kind={change['mixture']['kind']}"
        print(f"asked for from chunk {change['chunk']} on, {what}")
    if (folder.control / "mixture.json").exists():
        print("another mixture is waiting for the run to look at it")
    return 0


def _chunks(history: Any) -> list[dict[str, Any]]:
    """The chunks that count whose weights differ from those of the chunk before."""
    found: list[dict[str, Any]] = []
    for attempt, steps in history.extents():
        for plan in attempt.plans:
            first = max(attempt.stream_version.step_at(plan.first_step), steps.start)
            shares = (plan.weights / plan.weights.sum()).tolist()
            if first < min(attempt.stream_version.step_at(plan.first_step + plan.num_steps), steps.stop) and (
                not found or found[-1]["weights"] != shares
            ):
                line = {"kind": "chunk", "attempt": attempt.number, "chunk": plan.chunk, "step": first}
                found.append({**line, "domains": attempt.identity["domains"], "weights": shares})
    return found


def _print_table(lines: list[dict[str, Any]]) -> None:
    """First and newest weights, with those between as far as they fit."""
    from rich.table import Table

    from mixtera_hpc.cli.console import open_console, pluralize

    if not lines:
        print("nothing has been planned yet")
        return
    shown = lines if len(lines) <= MAX_COLUMNS else [lines[0], *lines[1 - MAX_COLUMNS :]]
    table = Table(title=f"weights changed {pluralize(len(lines) - 1, 'time')}", title_justify="left")
    table.add_column("domain")
    for line in shown:
        table.add_column(f"chunk {line['chunk']}\nstep {line['step']}", justify="right")
    for d, name in enumerate(lines[-1]["domains"]):
        table.add_row(name, *(f"{line['weights'][d]:.4f}" for line in shown))
    open_console().print(table)
