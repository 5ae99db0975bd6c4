"""What planning costs on rank 0, what other systems' planning costs on the same mixture, and what resuming costs.

    python -m bench.plan

Prints tables and writes bench/out/plan.json. Peers run in processes of their own: MIXTERA_BENCH_PEERS names one or more
interpreters, separated by colons, that have mosaicml-streaming, megatron-core, grain or datasets; what none of them has is
listed as absent. Times are wall clock, medians; expect twice as much on a busy machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench._corpus import make_tokenizer, pool
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.planner import ChunkPlan, Planner, PlannerState
from mixtera_hpc.dataplane.batches import BatchMaker, Share
from mixtera_hpc.dataplane.source import Source, open_source
from mixtera_hpc.dataplane.state import PlaneState
from mixtera_hpc.index.build import build_index

OUT = Path(__file__).resolve().parent / "out" / "plan.json"
BATCH, REPEATS = 1024, 1000
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
    """From the saved state to the plan and its expansion."""
    first_batch_ms: float
    """Order the domains' epochs, read, tokenize and pack the first batch."""
    state_bytes: int


def resumes(num_domains: int = 1000) -> Iterator[Resumed]:
    """At steps early and late, each as in a new process: nothing is kept from one to the next."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose(collection(Path(folder), num_domains))
        build_index(config)
        for step in (10, 1_000_000):
            yield min(
                (resumed(lambda: open_source(config, Local()), step) for _ in range(3)), key=lambda r: r.restore_ms
            )


def resumed(open_: Callable[[], Source], step: int) -> Resumed:
    began = time.perf_counter()
    source = open_()
    opened = time.perf_counter()
    planner = source.planner
    saved = PlaneState(
        next_step=step, plan=planner.decide(state_at(planner, source.weights, step), source.weights), mixer={}
    )
    facts = saved.to_dict(source.identity())
    text = json.dumps(facts["json"])
    ready = time.perf_counter()
    state = PlaneState.from_dict({"json": json.loads(text), "arrays": facts["arrays"]}, source.identity())
    planner.slots(state.plan)
    restored = time.perf_counter()
    maker = BatchMaker(source, Share(first=0, size=planner.global_batch_size), audit=False)
    batch = next(iter(maker.batches(ChunkPlan.from_array(state.plan.to_array()), step)))
    served = time.perf_counter()
    maker.close()
    if batch.step != step:
        raise RuntimeError(f"resumed at step {batch.step}, expected {step}")
    return Resumed(
        step=step,
        open_ms=(opened - began) * 1e3,
        restore_ms=(restored - ready) * 1e3,
        first_batch_ms=(served - restored) * 1e3,
        state_bytes=len(text) + sum(a.nbytes for a in facts["arrays"].values()),
    )


def collection(folder: Path, num_domains: int) -> list[str]:
    """30,000 rows of 300 characters; the names of their sources are as long as real ones."""
    text, rows = pool(), 30_000
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
        "mixture.by=[source]",
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
    chunks = [planned(*way) for way in ways()]
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
