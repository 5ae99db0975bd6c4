"""Run the actions of `mixtera-hpc index` on every rank, and print their results on rank 0."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mixtera_hpc.cli.answers.store_text import announce_store
from mixtera_hpc.cli.collection import compose_build, compose_data, open_collection
from mixtera_hpc.cli.index_progress import show_progress
from mixtera_hpc.cli.index_text import (
    build_lines,
    derive_lines,
    duplicate_lines,
    index_facts,
    print_facts,
    refresh_lines,
)
from mixtera_hpc.comm.communicator import Communicator
from mixtera_hpc.comm.launcher import open_communicator, run_guarded
from mixtera_hpc.config.schema import Config
from mixtera_hpc.errors import ConfigError, pluralize
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.chat_check import check_chat_template
from mixtera_hpc.index.read.duplicates import find_duplicates
from mixtera_hpc.index.read.open import PropertyIndex
from mixtera_hpc.index.read.verify import ChangedShard, changed_shards, deeply_changed_shards, refuse_changed
from mixtera_hpc.index.scan.parallel_scan import ProgressCallback
from mixtera_hpc.index.token_store.store_check import changed_stores, refuse_changed_stores
from mixtera_hpc.tokens.tokenizer import Tokenizer, load_vocabulary

__all__ = ["run_action"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionOutput:
    """Output that rank 0 prints after all ranks have finished."""

    text: str = ""
    exit_code: int = 0


def run_action(args: argparse.Namespace) -> int:
    """Run one action and return the exit code. **Collective.**"""
    if args.action == "inspect":
        return _inspect(args)
    actions = {
        "build": _build,
        "derive": _derive,
        "duplicates": _duplicates,
        "refresh": _refresh,
        "verify": _verify,
    }
    comm = open_communicator(creates_group=True)
    outputs: list[ActionOutput] = []
    failed = run_guarded(comm, lambda: outputs.append(actions[args.action](args, comm)))
    if failed or comm.rank > 0:
        return failed
    # Printed after the last collective call: a reader of the pipe that has left cannot hang the other ranks.
    (output,) = outputs
    print(output.text)
    return output.exit_code


def _build(args: argparse.Namespace, comm: Communicator) -> ActionOutput:
    config = compose_build(args.overrides)

    def build(progress: ProgressCallback | None) -> Any:
        return build_index(config, comm, progress, announce_store)

    return _with_progress(args, comm, build, build_lines)


def _refresh(args: argparse.Namespace, comm: Communicator) -> ActionOutput:
    config = compose_build(args.overrides)
    return _with_progress(
        args, comm, lambda progress: refresh_index(config, comm, progress, announce_store), refresh_lines
    )


def _derive(args: argparse.Namespace, comm: Communicator) -> ActionOutput:
    config = compose_data(args.overrides)

    def derive(progress: ProgressCallback | None) -> Any:
        return derive_properties(config, comm, progress, again=args.again)

    return _with_progress(args, comm, derive, derive_lines)


def _with_progress(
    args: argparse.Namespace,
    comm: Communicator,
    work: Callable[[ProgressCallback | None], Any],
    lines_of: Callable[[Any], list[str]],
) -> ActionOutput:
    """Do the work, show its progress, and describe its report. **Collective.**"""
    with show_progress(comm) as progress:
        report = work(progress)
    if comm.rank > 0:
        return ActionOutput()
    if args.json:
        return ActionOutput(text=msgspec.json.encode(report).decode())
    return ActionOutput(text="\n".join(lines_of(report)))


def _inspect(args: argparse.Namespace) -> int:
    _, index = open_collection(args.overrides)
    with index:
        facts = index_facts(index)
        if args.json:
            print(json.dumps(facts, ensure_ascii=False))
        else:
            print_facts(index, facts)
    return 0


def _verify(args: argparse.Namespace, comm: Communicator) -> ActionOutput:
    config, index = open_collection(args.overrides, reads_shards=True, announce=comm.rank == 0)
    with index:
        tokenizer = _load_counting_tokenizer(config, index) if args.deep else None
        # A store that no run would take is refused first: the check of the shards may take hours.
        stores = changed_stores(config, index, tokenizer, comm) if tokenizer is not None else []
        changed = deeply_changed_shards(index, tokenizer, comm) if args.deep else []
        if comm.rank > 0:
            return ActionOutput()
        by_time = changed_shards(index)
        if not args.deep:
            return _verified(args, index, by_time, {}, "size and modification time")
        # Content decides. Shards that only have another modification time are named, because a run refuses them.
        known = {shard.path for shard in changed}
        touched = [shard.path for shard in by_time if shard.path not in known]
        compared = "fingerprints and samples" + (", tokens included" if tokenizer is not None else "")
        if not args.json:
            refuse_changed(index, changed)
            refuse_changed_stores(stores)
        more = {"touched": touched, "stores": [f"{problem.path} row {problem.row}" for problem in stores]}
        return _verified(args, index, changed, more, compared)


def _verified(
    args: argparse.Namespace,
    index: PropertyIndex,
    changed: list[ChangedShard],
    more: dict[str, list[str]],
    compared: str,
) -> ActionOutput:
    """Return the output of `index verify`; `more` is added to the JSON fields."""
    if args.json:
        listed = [{"path": shard.path, "problem": shard.problem} for shard in changed]
        is_fresh = not changed and not more.get("stores")
        text = json.dumps({"fresh": is_fresh, "changed": listed, **more})
        return ActionOutput(text=text, exit_code=0 if is_fresh else 2)
    refuse_changed(index, changed)
    shards = pluralize(len(index.tables.shards.path), "shard")
    text = f"{index.path}: {shards} below {index.data_root} unchanged (compared {compared})"
    touched = more.get("touched", [])
    if touched:
        text += (
            f"\n  {pluralize(len(touched), 'shard')} with the same content but another modification time, e.g. "
            f"{touched[0]}: run mixtera-hpc index refresh, so that runs accept them"
        )
    return ActionOutput(text=text)


def _duplicates(args: argparse.Namespace, comm: Communicator) -> ActionOutput:
    config, index = open_collection(args.overrides, reads_shards=True, announce=comm.rank == 0)
    write = Path(args.write) if args.write else None
    if write is not None and not write.absolute().parent.is_dir():
        raise ConfigError(f"--write {write}: there is no folder {write.absolute().parent}. Make it first.")
    with index:
        if comm.rank == 0:
            refuse_changed(index, changed_shards(index))
        report = find_duplicates(index, comm, write, config.query.where)
    if comm.rank > 0:
        return ActionOutput()
    if args.json:
        return ActionOutput(text=msgspec.json.encode(report).decode())
    return ActionOutput(text="\n".join(duplicate_lines(report)))


def _load_counting_tokenizer(config: Config, index: PropertyIndex) -> Tokenizer | None:
    """Load the tokenizer that counted the tokens of the index, if it is configured; None skips token counts."""
    tokenizer = load_vocabulary(config.dataplane)
    fingerprint = index.tokenizer_fingerprint
    if tokenizer is not None and tokenizer.fingerprint != fingerprint:
        raise ConfigError(
            f"dataplane.tokenizer is not the tokenizer that this index was counted with ({str(fingerprint)[:12]}).\n"
            "  Set that one, or leave it out: token counts are not compared then."
        )
    if tokenizer is not None:
        check_chat_template(index, tokenizer)
    return tokenizer
