"""More than 300 wrong inputs over verbs, keys, files, requests and records: exit code 2, and never a traceback.

All run in this process. Each table names what is wrong; what the message must contain is the name of the thing at
fault, so that a reader finds it.
"""

import contextlib
import copy
import io
import json
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from mixtera_hpc.cli.main import VERBS, main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.check import check_run
from mixtera_hpc.config.compose import _composed, compose, from_omegaconf
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.plane_state import pack_state, unpack_state
from mixtera_hpc.errors import UserError, exit_code_of
from mixtera_hpc.testing import writers
from mixtera_hpc.training.checkpoint import Checkpoint, load_newest_checkpoint, write_checkpoint

pytestmark = pytest.mark.slow
"""Composes a configuration for every wrong value."""

BASE = ["data.root=/data", "mixture.unit=samples"]
MIN_CASES = 300
counted: dict[str, int] = {}
"""Test → number of wrong inputs that it has tried."""


class Outcome:
    """The result of a command."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text

    def problem(self, names: str, codes: Sequence[int] = (2,)) -> str:
        """Return what is wrong with a refusal; empty if nothing is."""
        if "Traceback" in self.text:
            return "a traceback: " + self.text[-700:]
        if self.code not in codes:
            return f"exit code {self.code}: {self.text[-300:]}"
        if self.code == 2 and names and names not in self.text:
            return f"the message does not name {names!r}: {self.text[-300:]}"
        return ""


def outcome_of(action: Callable[[], Any]) -> Outcome:
    """Run an action as a process would, and return its exit code and all it printed."""
    output = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            result = action()
            code = result if isinstance(result, int) else 0
        except UserError as error:
            output.write(f"{type(error).__name__}: {error}")
            code = exit_code_of(error)
        except SystemExit as error:
            code = exit_code_of(error)
        except BaseException:
            output.write(traceback.format_exc())
            code = 1
    return Outcome(code, output.getvalue())


def check_all(test: str, cases: Sequence[tuple[str, Callable[[], Any], str]], codes: Sequence[int] = (2,)) -> None:
    """Run (name, action, part of the message), count the refused ones, and fail with everything that is wrong."""
    problems = []
    counted[test] = 0
    for name, action, names in cases:
        outcome = outcome_of(action)
        counted[test] += outcome.code == 2
        problem = outcome.problem(names, codes)
        if problem:
            problems.append(f"{name}: {problem}")
    assert not problems, f"{len(problems)} of {len(cases)}:\n" + "\n".join(problems)


# Keys


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the type of every key that is no group."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from keys_of(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.default is not MISSING or field.default_factory is not MISSING:
            yield f"{prefix}{field.name}", hint


def wrong_value(hint: Any) -> str | None:
    """Return a value of another type; None if the type accepts any text."""
    options = [option for option in (get_args(hint) or (hint,)) if option is not type(None)]
    if get_origin(hint) is Literal:
        return "nope"
    if get_origin(hint) is list or any(get_origin(option) is list for option in options):
        return "7"
    if get_origin(hint) is dict or any(get_origin(option) is dict for option in options):
        return "[7]"
    if bool in options:
        return "perhaps"
    if str in options:
        return None  # Any text is text, also one in braces: it may be a template.
    if int in options or float in options:
        return "many"
    return None


@cache
def composed_base() -> Any:
    """Return the composition of `BASE`, before interpolations are resolved."""
    return _composed(BASE)


def compose_with(key: str, value: str) -> None:
    """Do what `compose` does with one more override; Hydra only parses the value, and does not compose again."""
    node = copy.deepcopy(composed_base())
    OmegaConf.update(node, key, OverridesParser.create().parse_override(f"{key}={value}").value())
    check_run(from_plain(Config, from_omegaconf(node)))


def test_a_value_of_another_type_names_its_key() -> None:
    cases = []
    for key, hint in keys_of(Config):
        value = wrong_value(hint)
        if value is not None:
            # Only Hydra itself refuses to merge a list into a mapping.
            action = (
                partial(compose, [*BASE, f"{key}={value}"]) if value == "[7]" else partial(compose_with, key, value)
            )
            cases.append((f"{key}={value}", action, key.rpartition(".")[2]))
    assert len(cases) > 100
    check_all("types", cases)


ACCEPTED_NUMBERS = {
    **{
        key: ["0"]
        for key in (
            *("data.cache_bytes", "query.holdout.fraction", "dataplane.seed", "dataplane.workers"),
            *("dataplane.watchdog_s", "mixture.floor", "mixture.cap", "training.warmup_steps", "training.weight_decay"),
            *("training.anneal_from_step", "training.anneal_from_rate", "training.validate_every"),
            *("checkpoint.every_steps", "cluster.gpus_per_node", "plan.first_step"),
            *("swarm.num_proxies", "swarm.seed", "swarm.min_share", "swarm.penalty"),
        )
    },
    "query.holdout.seed": ["-1", "0"],
    "training.seed": ["-1", "0"],
}
"""Number keys → which of -1 and 0 have a meaning there; neither has one for all other keys."""


def test_numbers_below_their_range_name_their_key() -> None:
    numbers = [key for key, hint in keys_of(Config) if {int, float} & {hint, *get_args(hint)}]
    assert set(ACCEPTED_NUMBERS) <= set(numbers)
    cases = []
    for key in numbers:
        for value in ("-1", "0"):
            if value not in ACCEPTED_NUMBERS.get(key, []):
                cases.append((f"{key}={value}", partial(compose_with, key, value), key.rpartition(".")[2]))
    check_all("ranges", cases)


def test_numbers_out_of_range_are_refused_or_harmless() -> None:
    """Some of these values are valid for some keys; none may end in a traceback."""
    numbers = [key for key, hint in keys_of(Config) if {int, float} & {hint, *get_args(hint)}]
    values = ("nan", "9" * 30)
    # The message may name another key, with which the number is too large together.
    cases = [(f"{key}={value}", partial(compose_with, key, value), "") for key in numbers for value in values]
    check_all("numbers", cases, (0, 2))
    assert counted["numbers"] > len(numbers)


# Verbs

RUN_VERBS = ("resume", "logs", "cancel", "trace", "report")


def verb_cases(folder: Path) -> Iterator[tuple[list[str], str]]:
    """Yield command lines, and what the message names."""
    for verb in VERBS:
        yield [verb, "--no-such-flag"], "mixtera-hpc"
        if verb not in ("doctor", "status", "runs"):
            yield [verb, "nonsense!"], ""
    for verb in RUN_VERBS:
        yield [verb], "RUN" if verb != "report" else ""
        options = ["--step=1"] if verb == "trace" else []
        yield [verb, "no-such-run", *options], "no-such-run"
        yield [verb, str(folder), *options], str(folder)
        yield [verb, "/dev/null", *options], "/dev/null"
        yield [verb, "a\0b", *options], ""
        yield [verb, "", *options], ""
    for verb in ("run", "submit", "sweep", "query", "plan", "tokenize"):
        yield [verb, "data.rot=/data"], "data.rot"
        yield [verb, "=3"], "=3"
        yield [verb, f"data.root={folder}/missing", "mixture.unit=samples"], "missing" if verb != "run" else "tokenizer"
        yield [verb, "job.nodes="], "job.nodes"
        yield [verb, "experiment=nope"], "nope"
        yield [verb, "cluster=nope"], "nope"
    for action in ("build", "refresh", "derive", "inspect", "verify", "duplicates"):
        yield (
            ["index", action, f"data.root={folder}/missing", f"index.path={folder}/i.h5"],
            "missing" if action == ("build") else "i.h5",
        )
        yield ["index", action, f"data.root={folder}", f"index.path={folder}"], str(folder)
        yield ["index", action, f"data.root={folder}", "index.path=/proc/no/i.h5"], "/proc/no"
    for key in ('a"b', "a\\b", "a\tb"):
        words = [f"data.root={folder}", f"index.path={folder}/i.h5", f"data.properties={{k: {json.dumps(key)}}}"]
        yield ["index", "build", *words], "data.properties"
    yield ["index"], "action"
    yield ["index", "bild"], "bild"
    yield ["index", "inspect", "--deep"], "--deep"
    yield ["index", "build", "--wait"], "--submit"
    yield ["tokenizer", "train", f"data.root={folder}", f"--out={folder}"], str(folder)
    yield ["tokenizer", "train", f"data.root={folder}", f"--out={folder}/t.json", "--vocab-size=x"], "--vocab-size"
    yield ["tokenizer", "train", f"data.root={folder}", f"--out={folder}/t.json", "--vocab-size=-5"], ""
    yield ["tokenizer", "trian", "--out=t.json"], "trian"
    for loader in ("megatron", "huggingface", "mosaic", "energon"):
        yield ["migrate", loader], ""
        yield ["migrate", loader, f"{folder}/missing", f"--out={folder}/experiment/e.yaml"], "missing"
        yield ["migrate", loader, str(folder / "binary"), f"--out={folder}/experiment/e.yaml"], ""
        yield ["migrate", loader, "0.5", "--out", f"{folder}/experiment/e.yaml"], ""
    yield ["mixture", "show"], "RUN"
    yield ["mixture", "set", "no-such-run", "mixture.kind=natural"], "no-such-run"
    yield ["mixture", "show", "no-such-run"], "no-such-run"
    yield ["mixture", "shwo", "no-such-run"], "shwo"
    yield ["status", "no-such-run"], "no-such-run"
    yield ["check", "experiment=nope"], ""
    yield ["resume", "no-such-run", "--skip-steps=x"], ""
    yield ["logs", "no-such-run", "--rank=x"], "--rank"
    yield ["watch", "no-such-run", "--once"], "no-such-run"
    yield ["watch", str(folder), "--once"], str(folder)
    yield ["runs", "--last=x"], "--last"
    yield ["runs", "--state=LOST"], "LOST"
    yield ["completion", "tcsh"], "tcsh"
    yield ["fork", "no-such-run", "--step=1", f"--set={folder}/missing"], ""
    for action in ("sample", "train", "submit", "fit"):
        yield ["swarm", action, f"{folder}/no-swarm", "mixture.kind=nope"], ""
    yield ["sweep", "training.seed=1,2", "--max-parallel=0", *BASE], "max-parallel"
    yield ["nonsense"], "nonsense"
    yield ["--nonsense"], "--nonsense"
    yield [], "usage"


def test_wrong_command_lines_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTERA_RUNS", str(tmp_path / "runs"))
    (tmp_path / "binary").write_bytes(b"\xff\0\xfe" * 9)
    cases = [(" ".join(argv), partial(main, argv), names) for argv, names in verb_cases(tmp_path)]
    check_all("verbs", cases)


# Data files


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ways in which a file is no valid one."""
    data = path.read_bytes()
    yield "half of it", data[: len(data) // 2 + 3]
    yield "other bytes", b"\xfe\xed" * 300
    yield "zeros", bytes(2000)
    yield "one byte", data[:1]


FORMATS: dict[str, tuple[Callable[[Path, Sequence[Any]], list[Path]], list[str]]] = {
    "jsonl": (writers.write_jsonl, []),
    "json": (writers.write_json, ["data.include=['*.json']"]),
    **{ending: (partial(writers.write_compressed, ending=ending), []) for ending in ("gz", "bz2", "xz", "zst")},
    "parquet": (writers.write_parquet, []),
    "arrow": (writers.write_arrow, []),
    "arrow stream": (writers.write_arrow_stream, []),
    "tar": (writers.write_tar, ["data.text=txt"]),
    "mds": (writers.write_mds_rows, []),
    "mds.zstd": (partial(writers.write_mds_rows, compression="zstd"), []),
    "megatron": (writers.write_tokens, ["dataplane.vocab_size=256"]),
}


def test_damaged_files_are_named_by_a_build(tmp_path: Path) -> None:
    rows = [{"text": "some text " * 9, "meta": {"a": 1}, "tags": ["x"]} for _ in range(40)]
    cases = []
    for kind, (write, words) in FORMATS.items():
        good = tmp_path / "good" / kind
        good.mkdir(parents=True)
        (shard,) = write(good, rows)
        for name, data in damages(shard):
            folder = tmp_path / f"{kind} {name}"
            shutil.copytree(good, folder)
            (folder / shard.name).write_bytes(data)
            argv = ["index", "build", f"data.root={folder}", f"index.path={tmp_path}/i.h5", *words]
            cases.append((f"{kind}: {name}", partial(main, argv), folder.name))
    check_all("shards", cases)


# Files of an index, a run, and requests


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a folder with data, index and an audited run of 8 steps, and the overrides of the run."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "data").mkdir()
    rows = [{"text": f"row {number}", "kind": "ab"[number % 2]} for number in range(200)]
    writers.write_jsonl(folder / "data", rows)
    words = [f"data.root={folder / 'data'}", f"index.path={folder / 'i.h5'}", "data.properties.kind=kind"]
    words += [
        "mixture.unit=samples",
        "mixture.group_by=[kind]",
        "dataplane.global_batch_size=4",
        "dataplane.audit=true",
    ]
    words += ["dataplane.chunk_steps=2", "dataplane.workers=0"]
    assert main(["index", "build", *words]) == 0
    run = RunFolder(folder / "mine/run")
    with DataPlane.open(compose(words), Local(), folder=run) as plane:
        for _ in zip(range(8), plane, strict=False):
            pass
    return folder, words


BAD_CONTENTS: dict[str, bytes | None] = {
    "nothing": b"",
    "bytes": b"\xff\xfe\0\1" * 40,
    "a list": b"[1, 2, 3]\n",
    "a number": b"7\n",
    "another object": b'{"a": {"b": 1}}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a folder": None,
}


def put(path: Path, content: bytes | None) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


def test_damaged_indexes_are_refused(good_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, words = good_run
    data = (folder / "i.h5").read_bytes()
    contents = {**BAD_CONTENTS, "half": data[: len(data) // 2], "its header": data[:600], "zeros": bytes(len(data))}
    cases = []
    for name, content in contents.items():
        path = tmp_path / f"{name}.h5"
        put(path, content)
        own = [word for word in words if not word.startswith("index.path")]
        for verb in (["index", "inspect"], ["index", "verify"], ["query"], ["plan"]):
            argv = [*verb, *own, f"index.path={path}"]
            cases.append((f"{' '.join(verb)} {name}", partial(main, argv), str(path)))
    check_all("indexes", cases)


def test_damaged_files_of_a_run_never_end_in_a_traceback(good_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Some verbs do not need some of the files, and others are read as far as they are whole."""
    folder, _ = good_run
    verbs = [["trace", "--step=1"], ["status"], ["report", "--json"], ["mixture", "show"], ["resume", "--here"]]
    run = RunFolder(folder / "mine/run")
    files = [run.config, run.journal, run.decisions, run.metric("steps"), run.metric("attempts"), run.metric("mixture")]
    files += [run.job_record(1), run.exit_record(1), run.audit_of_rank(1, 0), run.manifest]
    cases = []
    contents = {name: content for name, content in BAD_CONTENTS.items() if name not in ("nothing", "a number")}
    for file in files:
        for name, content in contents.items():
            copy = tmp_path / f"{file.name} {name}" / "mine/run"

            def damaged(verb: list[str], file: Path = file, content: bytes | None = content, copy: Path = copy) -> int:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(run.path, copy)
                target = copy / file.relative_to(run.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                put(target, content)
                options = [word for word in verb if word.startswith("--")]
                words = [word for word in verb if not word.startswith("--")]
                first = words[:2] if words[0] == "mixture" else words[:1]
                return main([*first, str(copy), *words[len(first) :], *options])

            cases += [(f"{' '.join(verb)}: {file.name} {name}", partial(damaged, verb), "") for verb in verbs]
    check_all("runs", cases, (0, 2))


REQUESTS = [
    *(content for content in BAD_CONTENTS.values() if content is not None),
    *(
        json.dumps(value).encode()
        for value in (
            {},
            {"chunk": 1},
            {"chunk": "x", "mixture": {}},
            {"chunk": -1, "mixture": {"kind": "natural"}},
            {"chunk": 1e300, "mixture": {"kind": "natural"}},
            {"chunk": 1, "mixture": {"kind": "nope"}},
            {"chunk": 1, "mixture": {"kind": "static", "domains": "x"}},
            {"chunk": 1, "mixture": {"kind": "static", "domains": [{"key": {"kind": "zz"}, "weight": 1}]}},
            {"chunk": 1, "mixture": {"kind": "static", "domains": [{"key": {"kind": "a"}, "weight": "nan"}]}},
            {"chunk": 1, "mixture": {"kind": "natural", "group_by": ["nope"]}},
            {"chunk": 1, "mixture": [1]},
            [[]],
        )
    ),
]


def test_wrong_requests_are_refused_in_writing(good_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The run goes on, and records the refusal."""
    _, words = good_run
    run = RunFolder(tmp_path / "mine/run")
    problems = []
    with DataPlane.open(compose(words), Local(), folder=run) as plane:
        batches = iter(plane)
        next(batches)
        for request in REQUESTS:
            run.control.mkdir(exist_ok=True)
            run.mixture_request.write_bytes(request)
            for _ in range(4):
                outcome = outcome_of(lambda: next(batches) and 0)
                if outcome.code:
                    problems.append(f"{request[:80]!r}: {outcome.text[-600:]}")
                    break
            if run.mixture_request.exists():
                problems.append(f"{request[:80]!r} stays")
    counted["requests"] = len(REQUESTS)
    assert not problems, "\n".join(problems)
    refusals = [line for line in run.decisions.read_text().splitlines() if "refused" in line]
    assert len(refusals) >= len(REQUESTS) // 2


# Checkpoints


def write_two_checkpoints(path: Path, state: Any) -> RunFolder:
    run = RunFolder(path)
    for step in (4, 8):
        model = {"weight": torch.ones(3)}
        own = Checkpoint(step=step, model_settings={}, model=model, optimizer={"state": {}}, dataplane=state)
        write_checkpoint(run, own, keep=9)
    return run


def bad_checkpoint_files(good: Path) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield what is wrong, and the name and the content of a file of a checkpoint; None stands for a folder."""
    names = sorted(path.name for path in good.iterdir())
    assert "training.json" in names and "dataplane.npz" in names
    for name in names:
        for kind, content in BAD_CONTENTS.items():
            yield f"{name}: {kind}", name, content
        yield f"{name}: half", name, (good / name).read_bytes()[:-9]
    table = json.loads((good / "training.json").read_text())
    for kind, changed in {
        "another version": {"version": 99},
        "no files": {"files": {}},
        "files in a list": {"files": []},
        "a path": {"files": {"../model.pt": {"bytes": 1, "crc32": 1}}},
        "sizes as text": {"files": {name: {"bytes": "x", "crc32": None} for name in table["files"]}},
        "a step as text": {"step": "four"},
        "another step": {"step": 77},
        "settings in a list": {"model_settings": [1]},
    }.items():
        yield f"training.json: {kind}", "training.json", json.dumps({**table, **changed}).encode()


def test_damaged_checkpoints_are_skipped_or_refused(good_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """An older good one is used; without one, the run does not begin again from step 0."""
    _, words = good_run
    with DataPlane.open(compose(words), Local()) as plane:
        next(iter(plane))
        state = plane.state_dict()["plane"]
    run = write_two_checkpoints(tmp_path / "whole", state)
    assert load_newest_checkpoint(run).step == 8  # type: ignore[union-attr]
    cases = []
    for kind, name, content in bad_checkpoint_files(run.checkpoint(8)):
        folder = tmp_path / kind.replace("/", "-")

        def older_is_used(folder: Path = folder, name: str = name, content: bytes | None = content) -> int:
            shutil.copytree(run.path, folder)
            put(RunFolder(folder).checkpoint(8) / name, content)
            return 0 if load_newest_checkpoint(RunFolder(folder)).step == 4 else 7  # type: ignore[union-attr]

        def none_is_left(folder: Path = folder) -> Any:
            shutil.rmtree(RunFolder(folder).checkpoint(4))
            return load_newest_checkpoint(RunFolder(folder))

        outcome = outcome_of(older_is_used)
        assert outcome.code == 0, f"{kind}: {outcome.text[-600:]}"
        cases.append((kind, none_is_left, "move that folder away"))
    check_all("checkpoints", cases)


def test_states_that_are_none_are_refused(good_run: tuple[Path, list[str]]) -> None:
    """A trainer of the user's own gives whatever its checkpoint holds."""
    _, words = good_run
    config = compose(words)
    with DataPlane.open(config, Local()) as plane:
        next(iter(plane))
        state = plane.state_dict()["plane"]
    facts, arrays = unpack_state(state)
    other = [word for word in words if not word.startswith("dataplane.global_batch_size")]
    with DataPlane.open(compose([*other, "dataplane.global_batch_size=5"]), Local()) as plane:
        next(iter(plane))
        foreign = plane.state_dict()["plane"]
    changed = {
        **{f"without {name}": {k: v for k, v in facts.items() if k != name} for name in facts},
        **{f"{name} is text": {**facts, name: "x"} for name in facts},
        **{f"{name} is a list": {**facts, name: [1]} for name in facts},
        "another version": {**facts, "version": 99},
        "a negative step": {**facts, "next_step": -3},
        "a huge step": {**facts, "next_step": 10**30},
    }
    states = {
        "nothing": np.zeros(0, np.uint8),
        "zeros": np.zeros(500, np.uint8),
        "half": state[: len(state) // 2],
        "a flipped byte": np.concatenate([state[:-60], state[-60:] ^ 1]),
        "of another run": foreign,
        **{name: pack_state(own, arrays) for name, own in changed.items()},
        "no plan": pack_state(facts, {}),
        "a plan of zeros": pack_state(facts, {**arrays, "plan": np.zeros(40, np.int64)}),
        "a short plan": pack_state(facts, {**arrays, "plan": arrays["plan"][:3]}),
        "a plan of text": pack_state(facts, {**arrays, "plan": np.array(["a", "b"])}),
    }

    def load(content: Any) -> None:
        with DataPlane.open(config, Local()) as plane:
            plane.load_state_dict({"plane": content})
            next(iter(plane))

    check_all("states", [(name, partial(load, content), "") for name, content in states.items()])


def test_more_than_300_wrong_inputs_were_tried() -> None:
    if len(counted) < 7:
        pytest.skip("the tests of this file run together")
    assert sum(counted.values()) >= MIN_CASES, counted
