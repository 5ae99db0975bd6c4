"""`mixtera-hpc trace`: which samples a step of a run was made of, and the proof that they were consumed."""

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    parser.add_argument("--step", type=int, help="the step to list")
    parser.add_argument("--rank", type=int, help="only what this rank was given")
    parser.add_argument(
        "--verify", action="store_true", help="prove that every planned sequence was consumed exactly once"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.config.compose import load_config
    from mixtera_hpc.config.runfolder import RunFolder, runs_root
    from mixtera_hpc.dataplane.journal import History
    from mixtera_hpc.dataplane.trace import Sources
    from mixtera_hpc.errors import ConfigError

    if args.step is None and not args.verify:
        raise ConfigError("trace needs --step S, to list a step, or --verify, to prove the whole run.")
    folder = RunFolder.find(args.run_name, args.root or runs_root())
    history = History(folder.journal)
    sources = Sources(load_config(folder.config))
    if args.verify:
        return _verify(sources, folder, history, args.json)
    _list(sources, folder, history, args)
    return 0


def _verify(sources: Any, folder: Any, history: Any, as_json: bool) -> int:
    import msgspec

    from mixtera_hpc.dataplane.trace import verify

    verdict = verify(sources, folder, history)
    if as_json:
        print(msgspec.json.encode(verdict).decode())
        return 0
    print(
        f"verified: {verdict.num_sequences:,} sequences of {verdict.num_steps} steps, each consumed exactly once as planned, "
        f"over {verdict.num_attempts} attempt{'s' if verdict.num_attempts != 1 else ''}"
    )
    if verdict.unfinished_step is not None:
        print(
            f"step {verdict.unfinished_step} was under way when the last attempt was killed; it is not part of the proof"
        )
    return 0


def _list(sources: Any, folder: Any, history: Any, args: argparse.Namespace) -> None:
    import msgspec

    from mixtera_hpc.dataplane.trace import audited, traced

    attempt = history.attempt_of(args.step)
    digests = audited(folder, attempt.number, args.step)
    source = sources.of(attempt)
    for record in traced(source, attempt, range(args.step, args.step + 1)):
        record["rank"] = attempt.rank_of(record["position"])
        if record["position"] in digests:
            record["digest"] = digests[record["position"]]
        if args.rank is not None and record["rank"] != args.rank:
            continue
        line = msgspec.json.encode(record).decode() if args.json else _readable(record, source.names)
        sys.stdout.write(line + "\n")


def _readable(record: dict[str, Any], names: list[str]) -> str:
    pieces = "\n".join(f"    {shard} row {row}, items {start} to {end}" for shard, row, start, end in record["pieces"])
    head = f"step {record['step']} position {record['position']} rank {record['rank']}"
    return f"{head}: {names[record['domain_id']]}, epoch {record['epoch']}\n{pieces}"
