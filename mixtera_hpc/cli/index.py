"""`mixtera-hpc index build|inspect|verify|refresh|derive`: the property index of a data collection."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixtera_hpc.cli.console import pluralize
from mixtera_hpc.errors import ConfigError

if TYPE_CHECKING:
    from mixtera_hpc.comm.communicator import Communicator
    from mixtera_hpc.config.schema import Config
    from mixtera_hpc.index.scan.parallel_scan import ProgressCallback

__all__ = ["arguments", "run"]

_FLAGS = {
    "json": ("build", "inspect", "verify", "refresh", "derive"),
    "submit": ("build", "refresh", "derive"),
    "dry_run": ("build", "refresh", "derive"),
    "wait": ("build", "refresh", "derive"),
    "deep": ("verify",),
    "again": ("derive",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=sorted([*_WORK, "inspect"]),
        help="build one, show it, compare it with its shards, bring it up to date, add properties of documents; all but "
        "inspect also under mpiexec or srun",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. data.root=DIR dataplane.tokenizer=FILE")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--deep", action="store_true", help="verify: compare content, not only size and time of change")
    parser.add_argument("--again", action="store_true", help="derive: compute properties the index has once more")
    parser.add_argument("--submit", action="store_true", help="send the work to Slurm: cluster=NAME job.nodes=N")
    parser.add_argument("--dry-run", action="store_true", help="with --submit: print the script and do nothing")
    parser.add_argument(
        "--wait", action="store_true", help="with --submit: follow the job and leave with its exit code"
    )


def run(args: argparse.Namespace) -> int:
    _check_flags(args)
    if args.submit:
        from mixtera_hpc.cli.index_submit import submit

        return submit(args)
    if args.action == "inspect":
        return _inspect(args)
    from mixtera_hpc.comm.launcher import open_communicator, run_guarded

    comm = open_communicator()
    answers: list[Answer] = []
    failed = run_guarded(comm, lambda: answers.append(_WORK[args.action](args, comm)))
    if failed or comm.rank > 0:
        return failed
    print(answers[0].text)
    return answers[0].code


def _check_flags(args: argparse.Namespace) -> None:
    for flag, actions in _FLAGS.items():
        name = flag.replace("_", "-")
        if getattr(args, flag) and args.action not in actions:
            raise ConfigError(f"index {args.action} has no --{name}; it belongs to index {', '.join(actions)}.")
        if getattr(args, flag) and flag in ("dry_run", "wait") and not args.submit:
            raise ConfigError(f"--{name} goes with --submit.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is printed once all ranks are done, and nothing can hang them any more."""

    text: str = ""
    code: int = 0


def _build(args: argparse.Namespace, comm: "Communicator") -> Answer:
    from mixtera_hpc.cli.index_text import build_text
    from mixtera_hpc.index.build.build import build_index

    return _carried_out(args, comm, lambda config, report: build_index(config, comm, report), build_text)


def _refresh(args: argparse.Namespace, comm: "Communicator") -> Answer:
    from mixtera_hpc.cli.index_text import refresh_text
    from mixtera_hpc.index.build.refresh import refresh_index

    return _carried_out(args, comm, lambda config, report: refresh_index(config, comm, report), refresh_text)


def _derive(args: argparse.Namespace, comm: "Communicator") -> Answer:
    from mixtera_hpc.cli.index_text import derive_text
    from mixtera_hpc.index.build.derive import derive_properties

    return _carried_out(
        args, comm, lambda config, report: derive_properties(config, comm, report, args.again), derive_text
    )


def _carried_out(
    args: argparse.Namespace,
    comm: "Communicator",
    work: Callable[["Config", "ProgressCallback | None"], Any],
    text_of: Callable[[Any], list[str]],
) -> Answer:
    """Compose, work with progress shown, put the report into words."""
    from mixtera_hpc.cli.collection import compose_data
    from mixtera_hpc.cli.index_text import progress

    config = compose_data(args.overrides)
    with progress(comm) as report:
        result = work(config, report)
    if comm.rank > 0:
        return Answer()
    if args.json:
        import msgspec

        return Answer(text=msgspec.json.encode(result).decode())
    return Answer(text="\n".join(text_of(result)))


def _inspect(args: argparse.Namespace) -> int:
    from mixtera_hpc.cli.collection import open_collection
    from mixtera_hpc.cli.index_text import facts_of, print_facts

    _, index = open_collection(args.overrides)
    with index:
        facts = facts_of(index)
        if args.json:
            print(json.dumps(facts, ensure_ascii=False))
        else:
            print_facts(index, facts)
    return 0


def _verify(args: argparse.Namespace, comm: "Communicator") -> Answer:
    from mixtera_hpc.cli.collection import open_collection
    from mixtera_hpc.index.read.verify import changed_shards, deeply_changed_shards, refuse_changed

    config, index = open_collection(args.overrides)
    with index:
        tokenizer = _tokenizer(config, index.tokenizer_fingerprint) if args.deep else None
        changed = changed_shards(index) if comm.rank == 0 else []
        if args.deep:
            deep = {shard.path: shard for shard in deeply_changed_shards(index, tokenizer, comm)}
            changed += [shard for path, shard in deep.items() if path not in {c.path for c in changed}]
        if comm.rank > 0:
            return Answer()
        if args.json:
            told = [{"path": c.path, "problem": c.problem} for c in changed]
            return Answer(text=json.dumps({"fresh": not changed, "changed": told}), code=2 if changed else 0)
        refuse_changed(index, changed)
        how = "by fingerprint and samples" if args.deep else "by size and time of change"
        how += ", token counts included" if tokenizer is not None else ""
        shards = len(index.tables.shards.path)
        return Answer(text=f"{index.path}: {pluralize(shards, 'shard')} below {index.data_root}, all as indexed, {how}")


def _tokenizer(config: "Config", fingerprint: str | None) -> Any:
    """The one that counted, when it is given; None leaves token counts unchecked."""
    from mixtera_hpc.tokens.tokenizer import load_vocabulary

    tokenizer = load_vocabulary(config.dataplane)
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise ConfigError(
            f"dataplane.tokenizer is not the one this index was counted with ({str(fingerprint)[:12]}).\n  Give that one, "
            "or leave it out: token counts are not compared then."
        )
    return tokenizer


_WORK: dict[str, Callable[[argparse.Namespace, "Communicator"], Answer]] = {
    "build": _build,
    "derive": _derive,
    "refresh": _refresh,
    "verify": _verify,
}
