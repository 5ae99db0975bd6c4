"""Fixtures shared by several test files."""

import functools
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml
from mixtera_hpc.core.domains import select
from mixtera_hpc.core.query.parse import parse_predicate
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import UserError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.verify import deeply_changed_shards
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run
from mixtera_hpc.track.tracker import JsonLinesTracker

RunMaker = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> RunMaker:
    """Return a function that fabricates the folder of a run with domains `names`.

    Each attempt is given as (first step, one past the last step). The folder is below `root`, by default a new one.

    A step takes 0.5 s, of which 0.05 s are data wait; the first step of an attempt takes 5 s and 4 s. The loss of
    domain d at step s is 10 + d - s / 100. Every step counts 100 tokens and 4 sequences per domain. A chunk has 4
    steps. After the steps `validated_at` there are held-out losses, which are higher by 10; the last domain has none.
    """

    def make(
        names: list[str], attempts: list[tuple[int, int]], *, run_id: str = "20260101-000000-aaaa", **options: Any
    ) -> RunFolder:
        root = options.pop("root", None) or tmp_path_factory.mktemp("runs")
        run = RunFolder(root / str(options.pop("name", "trial")) / run_id)
        run.metrics.mkdir(parents=True)
        config = {
            "training": {"num_steps": options.pop("num_steps", 20)},
            "mixture": {"kind": "static", "max_epochs": options.pop("max_epochs", None)},
            "dataplane": {"global_batch_size": 8, "seq_len": 32},
        }
        run.config.write_text(dump_yaml(config))
        for number, (first, end) in enumerate(attempts, 1):
            _record(run, number, names, range(first, end), options)
        return run

    return make


def _record(run: RunFolder, attempt: int, names: list[str], steps: range, options: dict[str, Any]) -> None:
    clock = _ticks()
    tracker = JsonLinesTracker(run.metrics, attempt, clock=lambda: next(clock))
    count = len(names)
    ranks = options.get("num_ranks", 2)
    about = {"step": steps.start, "num_ranks": ranks, "num_nodes": 1, "domains": names, "num_parameters": 1000}
    tracker.log("attempts", {**about, "device": "cpu × 1"})
    for step in steps:
        if step % 4 == 0 and options.get("with_mixture", True):
            weights = np.full(count, 1 / count)
            epochs = np.arange(1, count + 1) * step / 100
            tracker.log("mixture", {"step": step, "domains": names, "weights": weights, "epochs": epochs})
            tracker.log("comm", {"step": step, "plan_s": 1e-4, "broadcast_s": 2e-3})
        tracker.log("comm", {"step": step, "reduce_s": 3e-3})
        tracker.log("steps", _step(step, count, options, is_first=step == steps.start))
        if step in options.get("validated_at", ()):
            tracker.log("validation", _validation(step, count))
    tracker.close()


def _validation(step: int, count: int) -> dict[str, Any]:
    """Return a validation event in which the last domain has no held-out samples."""
    losses = [20 + d - step / 100 for d in range(count - 1)]
    tokens = [50] * (count - 1) + [0]
    return {"step": step, "loss": 20 - step / 100, "domain_loss": [*losses, None], "domain_tokens": tokens}


def _step(step: int, count: int, options: dict[str, Any], is_first: bool) -> dict[str, Any]:
    step_s = 5.0 if is_first else 0.5
    wait_s = 4.0 if is_first else 0.05
    loss = [10 + d - step / 100 for d in range(count)]
    return {
        "step": step,
        "num_steps": 1,
        "loss": float(np.mean(loss)),
        "tokens": 100 * count,
        "tokens_per_s": options.get("tokens_per_s", 100 * count / step_s),
        "step_s": step_s,
        "data_wait_s": wait_s,
        "learning_rate": 1e-3,
        "num_ranks": options.get("num_ranks", 2),
        "num_nonfinite": options.get("num_nonfinite", 0),
        "domain_loss": loss,
        "domain_tokens": [100] * count,
        "domain_sequences": [4] * count,
    }


def _ticks() -> Iterator[datetime]:
    now = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)
    while True:
        yield now
        now += timedelta(seconds=1)


composed = functools.cache(lambda *overrides: compose(list(overrides)))


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that composes the configuration of a run below `tmp_path` from overrides."""

    def make(*overrides: str) -> Config:
        config: Config = composed("data.root=/data", "mixture.unit=samples", "run.name=trial", *overrides)
        root = config.run.root if any(word.startswith("run.root=") for word in overrides) else f"{tmp_path}/runs"
        return replace(config, run=replace(config.run, root=root))

    return make


@pytest.fixture
def prove_run(tmp_path: Path) -> Callable[[Config], int]:
    """Return a function that serves 4 steps on one rank and 5 on three, and proves what both attempts consumed.

    It returns the number of sequences. The configuration needs `dataplane.audit`.
    """

    def serve(config: Config, comm: Communicator, attempt: int, until: int, state: Any) -> Any:
        with DataPlane.open(config, comm, RunFolder(tmp_path / "proven"), attempt) as plane:
            if state is not None:
                plane.load_state_dict(state if comm.rank == 0 else None)
            while plane.next_step < until:
                next(iter(plane))
            return plane.state_dict()

    def prove(config: Config) -> int:
        # Four planes, without a reading process for each of them.
        config = replace(config, dataplane=replace(config.dataplane, workers=0))
        run = RunFolder(tmp_path / "proven")
        state = serve(config, Local(), 1, 4, None)
        run_ranks(3, lambda comm: serve(config, comm, 2, 9, state))
        return verify_run(ServedRun(run, config)).num_sequences

    return prove


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return a function that puts a fake Slurm command on PATH and returns the file in which its calls are logged."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        log = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/bash\necho "$@" >>{shlex.quote(str(log))}\n{body}\n')
        (folder / name).chmod(0o755)
        return log

    return make


@pytest.fixture
def answers(tmp_path: Path, tiny_tokenizer: str) -> Callable[..., dict[str, str]]:
    """Return a function that builds and uses an index of `tmp_path/data`, and returns what each action answers.

    The actions are build, verify (by content), query, run (sequences of tokens) and samples (whole rows). An answer
    is what was counted or served, or the error with its notes. Without an index, there is only the answer of build.
    """

    def ask(text: str | None = "text", unit: str = "tokens", **data: Any) -> dict[str, str]:
        plain: dict[str, Any] = {
            "data": {"root": str(tmp_path / "data"), "text": text} | data,
            "index": {"path": str(tmp_path / "i.h5"), "block_rows": 4},
            "mixture": {"unit": unit, "on_exhausted": "stop"},
            # Without a reading process, which takes a second to start.
            "dataplane": {"seq_len": 4, "global_batch_size": 1, "workers": 0},
        }
        if text is not None:
            plain["dataplane"]["tokenizer"] = tiny_tokenizer
        config = from_plain(Config, plain)
        found = {"build": _answer(lambda: _build(config))}
        if "Error" in found["build"]:
            return found
        if text is not None:
            with open_configured(config) as index:
                found["tokens"] = str(index.tables.histogram.tokens.sum())
        found["verify"] = _answer(lambda: _verify(config))
        found["query"] = _answer(lambda: _query(config))
        if text is not None:
            found["run"] = _answer(lambda: _serve(config))
        samples = replace(config, mixture=replace(config.mixture, unit="samples"))
        found["samples"] = _answer(lambda: _serve(samples))
        return found

    return ask


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a tokenizer of single bytes."""
    return str(train_bpe(["a b"], 257, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def _answer(action: Callable[[], str]) -> str:
    """Return the answer of an action, or its error; a crash is raised."""
    try:
        return action()
    except UserError as error:
        notes = getattr(error, "__notes__", [])
        return "\n".join([f"{type(error).__name__}: {error}", *notes])


def _build(config: Config) -> str:
    report = build_index(config)
    return f"{report.samples} samples, {report.bad_rows} bad rows, {report.damaged_shards} damaged"


def _verify(config: Config) -> str:
    with open_configured(config) as index:
        changed = deeply_changed_shards(index, None, Local())
    return "; ".join(f"{shard.path}: {shard.problem}" for shard in changed) or "fresh"


def _query(config: Config) -> str:
    with open_configured(config) as index:
        predicate = parse_predicate(None, index.tables.properties)
        return f"{select(index.tables, predicate, [{}], index.read_blocks).selected[0]} samples"


def _serve(config: Config) -> str:
    with DataPlane.open(config, comm=Local()) as plane:
        served = sum(len(batch.tokens if batch.payloads is None else batch.payloads) for batch in plane)
    return f"{served} served"
