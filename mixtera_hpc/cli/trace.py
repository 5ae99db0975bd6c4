"""`mixtera-hpc trace`: which samples a step of a run was made of, when a sample was seen, and the proof of what was consumed."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="run id, name or folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", type=int, help="the step to list")
    what.add_argument("--steps", metavar="A..B", help="the steps to list")
    what.add_argument("--row", type=int, help="with --shard: every step, rank and position this row was served at")
    what.add_argument("--diff", metavar="RUN_B", help="the first difference to another run, and its cause")
    what.add_argument(
        "--verify", action="store_true", help="prove that every planned sequence was consumed exactly once"
    )
    parser.add_argument("--rank", type=int, help="only what this rank was given")
    parser.add_argument("--domain", help="only this domain, by id or name")
    parser.add_argument("--shard", help="only what is of this shard, e.g. train/a.jsonl")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--root", type=Path, help="folder of all runs (default: $MIXTERA_RUNS or ./runs)")


def run(args: argparse.Namespace) -> int:
    from mixtera_hpc.config.run_folder import RunFolder, runs_root
    from mixtera_hpc.errors import ConfigError

    if args.row is not None and args.shard is None:
        raise ConfigError("--row needs --shard, the path of the row's file below the data root.")
    asked = (args.step, args.steps, args.rank, args.domain, args.shard, args.row, args.diff)
    if not args.verify and all(word is None for word in asked):
        raise ConfigError(
            "trace needs --step S or --steps A..B to list steps, --rank, --domain or --shard to list what is of one, --shard "
            "FILE --row N to find a sample, --verify to prove the whole run, or --diff RUN_B to compare."
        )
    root = args.root or runs_root()
    folder = RunFolder.find(args.run_name, root)
    sources, history = _opened(folder)
    if args.verify:
        _verify(sources, folder, history, args.json)
    elif args.diff is not None:
        return _diff((sources, history), _opened(RunFolder.find(args.diff, root)), args.json)
    elif args.row is not None:
        _seen(sources, history, args)
    else:
        _list(sources, folder, history, args)
    return 0


def _opened(folder: Any) -> tuple[Any, Any]:
    from mixtera_hpc.config.compose import load_config
    from mixtera_hpc.dataplane.journal import History
    from mixtera_hpc.trace.list import AttemptSources

    history = History(folder.journal)
    return AttemptSources(load_config(folder.config)), history


def _verify(sources: Any, folder: Any, history: Any, as_json: bool) -> None:
    from mixtera_hpc.trace.list import verify_run

    verdict = verify_run(sources, folder, history)
    if as_json:
        _print_json(verdict)
        return
    print(
        f"verified: {verdict.num_sequences:,} sequences of {verdict.num_steps} steps, each consumed exactly once as planned, "
        f"over {verdict.num_attempts} attempt{'s' if verdict.num_attempts != 1 else ''}"
    )
    if verdict.unfinished_step is not None:
        print(
            f"step {verdict.unfinished_step} was under way when the last attempt was killed; it is not part of the proof"
        )


def _diff(first: Any, second: Any, as_json: bool) -> int:
    from mixtera_hpc.trace.diff import first_difference

    found = first_difference(first, second)
    if as_json:
        _print_json(found)
        return 0
    if found.step is None:
        ends = first[1].end, second[1].end
        rest = "" if ends[0] == ends[1] else f"; they have {ends[0]} and {ends[1]}"
        print(f"the same data in all {found.num_same_steps} steps that both have{rest}")
        return 0
    print(f"the same data up to step {found.step} position {found.position}, where they were served:")
    for record in (found.first, found.second):
        print(_pieces_of(record) if record else "    nothing: the global batch is smaller")
    print("\n".join(f"differs: {cause}" for cause in found.causes) or "settings and weights are the same")
    return 0


def _seen(sources: Any, history: Any, args: argparse.Namespace) -> None:
    from mixtera_hpc.trace.locate import locate_row

    found, attempts = 0, {attempt.number: attempt for attempt, _ in history.extents()}
    _check_rank(args.rank, attempts.values())
    for record in locate_row(sources, history, args.shard, args.row):
        if not _was_given(args.rank, attempts[record["attempt"]], record):
            continue
        found += 1
        if args.json:
            _print_json(record)
            continue
        start, end = record["piece"]
        print(
            f"step {record['step']} position {record['position']} rank {record['rank']} (attempt {record['attempt']}): "
            f"epoch {record['epoch']}, items {start} to {end}"
        )
    if not found and not args.json:
        print(f"{args.shard} row {args.row} has not been served up to step {history.end}")


def _list(sources: Any, folder: Any, history: Any, args: argparse.Namespace) -> None:
    domain: int | None = None
    chosen = _steps(args, history.end)
    extents = [(a, range(max(s.start, chosen.start), min(s.stop, chosen.stop))) for a, s in history.extents()]
    extents = [(attempt, steps) for attempt, steps in extents if len(steps)]
    _check_rank(args.rank, [attempt for attempt, _ in extents])
    for attempt, steps in extents:
        source = sources.of(attempt)
        _check_shard(args.shard, source)
        if args.domain is not None:
            domain = _domain(args.domain, source.names)
        for record in _records(source, folder, attempt, steps):
            shards = [piece[0] for piece in record["pieces"]]
            wanted = (
                _was_given(args.rank, attempt, record),
                domain in (None, record["domain_id"]),
                args.shard in (None, *shards),
            )
            if all(wanted):
                _print_json(record) if args.json else print(_readable(record, source.names))


def _steps(args: argparse.Namespace, end: int) -> range:
    from mixtera_hpc.errors import ConfigError, DataError

    steps = range(end)
    if args.step is not None:
        steps = range(args.step, args.step + 1)
    elif args.steps is not None:
        match = re.fullmatch(r"(\d+)\.\.(\d+)", args.steps)
        if not match or int(match[1]) > int(match[2]):
            raise ConfigError(f"--steps is {args.steps!r}, expected the first and the last step, e.g. --steps 10..19.")
        steps = range(int(match[1]), int(match[2]) + 1)
    if steps.stop > end or steps.start < 0:
        raise DataError(f"Step {steps.stop - 1} has not been served: the run has {end} steps so far.")
    return steps


def _was_given(rank: int | None, attempt: Any, record: dict[str, Any]) -> bool:
    """Whether a rank, or its dp_group, was given a sequence; records name the first rank of a group."""
    return rank is None or rank // attempt.model_parallel_size * attempt.model_parallel_size == record["rank"]


def _check_rank(rank: int | None, attempts: Iterable[Any]) -> None:
    from mixtera_hpc.errors import ConfigError

    most = max((attempt.num_ranks for attempt in attempts), default=0)
    if rank is not None and most and not 0 <= rank < most:
        raise ConfigError(
            f"--rank is {rank}, but these steps were served to {most} ranks.\n  Give one of 0 to {most - 1}."
        )


def _check_shard(shard: str | None, source: Any) -> None:
    from mixtera_hpc.errors import DataError, did_you_mean

    paths = source.facts.shard_paths
    if shard is not None and shard not in paths:
        raise DataError(f"The index has no shard {shard!r}.{did_you_mean(shard, paths)}")


def _domain(text: str, names: list[str]) -> int:
    from mixtera_hpc.errors import ConfigError, did_you_mean

    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ConfigError(f"{text!r} is not a domain of this run.{did_you_mean(text, names)}")


def _records(source: Any, folder: Any, attempt: Any, steps: range) -> Iterator[dict[str, Any]]:
    """What `served_sequences` gives, with ranks and digests."""
    from mixtera_hpc.trace.list import read_audit, served_sequences

    digests = read_audit(folder, attempt.number, steps)
    for record in served_sequences(source, attempt, steps):
        record["rank"] = attempt.rank_of(record["position"])
        if (digest := digests.get((record["step"], record["position"]))) is not None:
            record["digest"] = digest
        yield record


def _print_json(value: Any) -> None:
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _readable(record: dict[str, Any], names: list[str]) -> str:
    head = f"step {record['step']} position {record['position']} rank {record['rank']}"
    return f"{head}: {names[record['domain_id']]}, epoch {record['epoch']}\n{_pieces_of(record)}"


def _pieces_of(record: Any) -> str:
    return "\n".join(f"    {shard} row {row}, items {start} to {end}" for shard, row, start, end in record["pieces"])
