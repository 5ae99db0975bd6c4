"""What planning costs on rank 0, what other systems' planning costs on the same mixture, and what resuming costs.

    python -m bench.plan

Prints tables and writes bench/out/plan.json. Peers run in processes of their own: MIXTERA_BENCH_PEERS names one or more
interpreters, separated by colons, that have mosaicml-streaming, megatron-core, grain or datasets; what none of them has is
listed as absent. Times are wall clock: of planning the median of 200 chunks in the quietest of eight rounds, all else once.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench._corpus import make_tokenizer, source_text
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.planner import Planner, PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

OUT = Path(__file__).resolve().parent / "out" / "plan.json"
BATCH, REPEATS, ROUNDS = 1024, 200, 8
SAMPLES = 10_000_000
GOALS_US = {7: 50, 100: 80, 1000: 200}
KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One way to plan a chunk."""

    num_domains: int
    chunk_steps: int
    step: int
    """Where the run stood."""
    decide_us: float
    """Until the plan can be broadcast."""
    after_us: float
    """The state for the next chunk, while this one is on its way."""
    broadcast_bytes: int

    @property
    def total_us(self) -> float:
        return self.decide_us + self.after_us


def quietest() -> list[Planned]:
    """Every way, in rounds; of each the round that was least disturbed by what else the machine does."""
    rounds = [[planned(*way) for way in ways()] for _ in range(ROUNDS)]
    return [min(tries, key=lambda r: r.total_us) for tries in zip(*rounds, strict=True)]


def planned(num_domains: int, chunk_steps: int, step: int) -> Planned:
    """Plan `REPEATS` chunks in a row, weights from Zipf's law."""
    weights = 1 / np.arange(1, num_domains + 1)
    weights /= weights.sum()
    endless = np.full(num_domains, Planner.UNLIMITED)
    planner = Planner(capacity=endless, global_batch_size=BATCH, chunk_steps=chunk_steps, on_exhausted="repeat")
    state = state_at(planner, weights, step)
    decide, after = np.empty(REPEATS), np.empty(REPEATS)
    for i in range(REPEATS):
        began = time.perf_counter()
        plan = planner.decide(state, weights)
        decided = time.perf_counter()
        state = planner.after(plan)
        decide[i], after[i] = decided - began, time.perf_counter() - decided
    return Planned(
        num_domains=num_domains,
        chunk_steps=chunk_steps,
        step=step,
        decide_us=float(np.median(decide)) * 1e6,
        after_us=float(np.median(after)) * 1e6,
        broadcast_bytes=plan.to_array().nbytes,
    )


def state_at(planner: Planner, weights: np.ndarray, step: int) -> PlannerState:
    """Where a run with these weights stands at `step`: planned as one chunk, for the way there does not matter."""
    start = PlannerState.start(len(weights))
    if step == 0:
        return start
    _, state = replace(planner, chunk_steps=step).plan(start, weights)
    return replace(state, chunk=step // planner.chunk_steps)


def ways() -> Iterator[tuple[int, int, int]]:
    """Domains, steps per chunk, and where the run stands."""
    for num_domains in GOALS_US:
        yield from ((num_domains, 8, 10), (num_domains, 8, 10_000_000), (num_domains, 1, 10), (num_domains, 1000, 10))


def peers(num_samples: int) -> Iterator[dict[str, Any]]:
    """The systems of `_plan_peers`, each in a process of its own."""
    found = [Path(p) for p in os.environ.get("MIXTERA_BENCH_PEERS", "").split(":") if p]
    for name in ("mixtera-hpc", "mosaic", "megatron", "grain", "huggingface"):
        tried = [in_process(i, name, num_samples) for i in ([Path(sys.executable)] if name == "mixtera-hpc" else found)]
        marks = next((t for t in tried if "window" in t), None)
        yield marks or {"name": name, "absent": tried[-1]["absent"] if tried else "MIXTERA_BENCH_PEERS is not set"}


def in_process(interpreter: Path, name: str, num_samples: int) -> dict[str, Any]:
    script = Path(__file__).with_name("_plan_peers.py")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(script.parents[1]) if "mixtera" in name else "",
    }
    done = subprocess.run(
        [interpreter, script, name, str(num_samples)], capture_output=True, text=True, env=environment, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"name": name, "absent": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    marks: dict[str, Any] = json.loads(lines[-1])
    return marks


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Opening a run of 1,000 domains in the middle."""

    step: int
    open_ms: float
    """The index, its tables and the domains; the same for a fresh run."""
    restore_ms: float
    """Take over the saved state."""
    first_batch_ms: float
    """Expand the plan, order the domains' epochs, read, tokenize and pack the first batch of 1,048,576 tokens."""
    state_bytes: int


def resumes(num_domains: int = 1000) -> Iterator[Resumed]:
    """At steps early and late; the quickest of three, each with a data plane of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose(collection(Path(folder), num_domains))
        build_index(config)
        for step in (10, 1_000_000):
            state = saved(open_source(config, Local()), step)
            tries = [resumed(config, state, step) for _ in range(3)]
            yield min(tries, key=lambda r: r.open_ms + r.restore_ms + r.first_batch_ms)


def saved(source: Source, step: int) -> dict[str, Any]:
    """The state of a run that has served `step` steps."""
    plan = source.planner.decide(state_at(source.planner, source.weights, step), source.weights)
    state = PlaneState(
        next_step=step,
        plan=plan,
        mixer={},
        fed=step,
        decisions=[],
        stream_version=source.stream_version,
        identity=source.identity(),
    )
    return state.to_dict()


def resumed(config: Config, state: dict[str, Any], step: int) -> Resumed:
    text = json.dumps(state["json"])
    began = time.perf_counter()
    with DataPlane.open(config, Local()) as plane:
        opened = time.perf_counter()
        plane.load_state_dict({"json": json.loads(text), "arrays": state["arrays"]})
        restored = time.perf_counter()
        batch = next(iter(plane))
        served = time.perf_counter()
        if batch.step != step:
            raise RuntimeError(f"resumed at step {batch.step}, expected {step}")
    return Resumed(
        step=step,
        open_ms=(opened - began) * 1e3,
        restore_ms=(restored - opened) * 1e3,
        first_batch_ms=(served - restored) * 1e3,
        state_bytes=len(text) + sum(a.nbytes for a in state["arrays"].values()),
    )


def collection(folder: Path, num_domains: int) -> list[str]:
    """30,000 rows of 300 characters; the names of their sources are as long as real ones."""
    text, rows = source_text(), 30_000
    source = np.minimum(np.random.Generator(np.random.Philox(0)).zipf(1.3, rows) - 1, num_domains - 1)
    source[:num_domains] = np.arange(num_domains)
    with (folder / "rows.jsonl").open("w") as file:
        for i, s in enumerate(source.tolist()):
            file.write(json.dumps({"text": text[i * 300 : i * 300 + 300], "source": f"crawl-{s:04d}"}) + "\n")
    return [
        f"data.root={folder}",
        "data.include=[rows.jsonl]",
        "data.properties.source=source",
        f"index.path={folder / 'index.h5'}",
        f"dataplane.tokenizer={make_tokenizer()}",
        f"dataplane.global_batch_size={BATCH}",
        "mixture.group_by=[source]",
    ]


def show_planned(rows: list[Planned]) -> list[str]:
    print(
        f"{'domains':>7} {'steps/chunk':>11} {'at step':>10} {'decide':>9} {'+ after':>9} {'= chunk':>9} {'broadcast':>10}"
    )
    for r in rows:
        times = f"{r.decide_us:6.0f} µs {r.after_us:6.0f} µs {r.total_us:6.0f} µs"
        print(f"{r.num_domains:7,} {r.chunk_steps:11,} {r.step:10,} {times} {r.broadcast_bytes / KIB:6.1f} KiB")
    missed = []
    for count, goal in GOALS_US.items():
        worst = max(r.total_us for r in rows if r.num_domains == count)
        missed += [f"{count} domains: {worst:.0f} µs of {goal}"] if worst > goal else []
        print(f"goal  {count:5,} domains: {worst:.0f} µs of at most {goal}{'   MISSED' if worst > goal else ''}")
    return missed


def show_peers(rows: list[dict[str, Any]]) -> None:
    print(f"\n{SAMPLES:,} samples of 7 domains (largest deviations in sequences)")
    print(
        f"{'':>12} {'first plan':>11} {'whole plan':>11} {'memory':>9} {'prefix':>9} {'window 1024':>12} {'of 1024':>8}  version"
    )
    for r in rows:
        if "absent" in r:
            print(f"{r['name']:>12} absent: {r['absent']}")
            continue
        times = f"{r['first_s'] * 1e3:8.2f} ms {r['plan_s'] * 1e3:8.1f} ms {r['bytes'] / (1 << 20):6.1f} MB"
        print(
            f"{r['name']:>12} {times} {r['prefix']:9.2f} {r['window']:12.2f} {r['window'] / 10.24:7.2f}%  {r['version']}"
            f"{'' if r['samples'] > 0.99 * SAMPLES else '  (deviations over ' + format(r['samples'], ',') + ')'}"
        )


def show_resumes(rows: list[Resumed]) -> None:
    print(f"\nresume, 1,000 domains\n{'at step':>9} {'open':>9} {'restore':>9} {'first batch':>12} {'state':>9}")
    for r in rows:
        print(
            f"{r.step:9,} {r.open_ms:6.0f} ms {r.restore_ms:6.1f} ms {r.first_batch_ms:9.0f} ms {r.state_bytes / KIB:5.1f} KiB"
        )


def main() -> None:
    """Measure, print, write."""
    chunks = quietest()
    missed = show_planned(chunks)
    others = list(peers(SAMPLES))
    show_peers(others)
    starts = list(resumes())
    show_resumes(starts)
    OUT.parent.mkdir(exist_ok=True)
    content = {
        "chunks": [asdict(r) for r in chunks],
        "peers": others,
        "resumes": [asdict(r) for r in starts],
        "goals_us": GOALS_US,
        "missed": missed,
    }
    OUT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
