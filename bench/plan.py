"""Cost of planning on rank 0, of planning the same mixture with other systems, and of resuming a run.

    python -m bench plan

Prints tables and writes bench/out/plan.json. Each peer runs in its own process. MIXTERA_BENCH_PEERS lists Python
interpreters, separated by colons, that have mosaicml-streaming, megatron-core, grain or datasets installed. A peer that
no interpreter has is reported as absent. All times are wall-clock times. Planning is measured as the median of 200
chunks in the fastest of eight rounds, everything else once.
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
from numpy.typing import NDArray

from bench._corpus import make_tokenizer, source_text
from bench._results import write_results
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.core.planner import Planner
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.dataplane.plane import STATE_KEY, DataPlane
from mixtera_hpc.dataplane.plane_state import PlaneState
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

GLOBAL_BATCH_SIZE = 1024
CHUNKS_PER_ROUND = 200
NUM_ROUNDS = 8
NUM_SAMPLES = 10_000_000
"""Samples that every system plans."""
GOALS_US = {7: 50, 100: 80, 1000: 200}
"""Number of domains → largest time to plan a chunk, in µs."""
KIB = 1024
MIB = 1 << 20

PEERS = ("mosaic", "megatron", "grain", "huggingface")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTiming:
    """The cost of planning a chunk."""

    num_domains: int
    chunk_steps: int
    step: int
    """Step at which the run is."""
    decide_us: float
    """Time until the plan can be broadcast."""
    after_us: float
    """Time to compute the planner state for the next chunk, during the broadcast."""
    broadcast_bytes: int

    @property
    def total_us(self) -> float:
        return self.decide_us + self.after_us


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeTiming:
    """The cost of opening a run of 1,000 domains and continuing at a step."""

    step: int
    open_ms: float
    """Opening the index, its tables and the domains; a new run does the same."""
    restore_ms: float
    """Restoring the saved state."""
    first_batch_ms: float
    """Expanding the plan, ordering the epochs of the domains, and reading, tokenizing and packing the first batch of
    1,048,576 tokens."""
    state_bytes: int


def main() -> None:
    """Measure, print and write all results."""
    plan_timings = measure_planning()
    print_planning(plan_timings)
    missed = check_goals(plan_timings)

    peers = list(measure_systems(NUM_SAMPLES))
    print_systems(peers)

    resume_timings = list(measure_resumes())
    print_resumes(resume_timings)

    content = {
        "chunks": [asdict(timing) for timing in plan_timings],
        "peers": peers,
        "resumes": [asdict(timing) for timing in resume_timings],
        "goals_us": GOALS_US,
        "missed": missed,
    }
    write_results("plan", content)


def measure_planning() -> list[PlanTiming]:
    """Measure all cases in several rounds; return for each case the round that other processes disturbed least."""
    rounds = [[measure_chunks(*case) for case in planning_cases()] for _ in range(NUM_ROUNDS)]
    return [min(timings, key=lambda timing: timing.total_us) for timings in zip(*rounds, strict=True)]


def planning_cases() -> Iterator[tuple[int, int, int]]:
    """Yield numbers of domains, steps per chunk, and the step at which the run is."""
    for num_domains in GOALS_US:
        yield (num_domains, 8, 10)
        yield (num_domains, 8, 10_000_000)
        yield (num_domains, 1, 10)
        yield (num_domains, 1000, 10)


def measure_chunks(num_domains: int, chunk_steps: int, step: int) -> PlanTiming:
    """Plan `CHUNKS_PER_ROUND` consecutive chunks with weights from Zipf's law."""
    weights = 1 / np.arange(1, num_domains + 1)
    weights /= weights.sum()
    planner = Planner(
        capacity=np.full(num_domains, Planner.UNLIMITED),
        batch_schedule=BatchSchedule.constant(GLOBAL_BATCH_SIZE),
        chunk_steps=chunk_steps,
        on_exhausted="repeat",
    )
    state = state_at_step(planner, weights, step)
    decide_s = np.empty(CHUNKS_PER_ROUND)
    after_s = np.empty(CHUNKS_PER_ROUND)
    for i in range(CHUNKS_PER_ROUND):
        started = time.perf_counter()
        plan = planner.decide(state, weights)
        decided = time.perf_counter()
        state = planner.after(plan)
        decide_s[i] = decided - started
        after_s[i] = time.perf_counter() - decided
    return PlanTiming(
        num_domains=num_domains,
        chunk_steps=chunk_steps,
        step=step,
        decide_us=float(np.median(decide_s)) * 1e6,
        after_us=float(np.median(after_s)) * 1e6,
        broadcast_bytes=plan.to_array().nbytes,
    )


def state_at_step(planner: Planner, weights: np.ndarray, step: int) -> PlannerState:
    """Return the planner state of a run with constant weights at `step`.

    One large chunk leads there; how the steps are divided into chunks does not change the state.
    """
    start = PlannerState.start(len(weights))
    if step == 0:
        return start
    _, state = replace(planner, chunk_steps=step).plan(start, weights)
    return replace(state, chunk=step // planner.chunk_steps)


def measure_systems(num_samples: int) -> Iterator[dict[str, Any]]:
    """Measure our planner and the peers with `_plan_peers.py`, each in its own process."""
    yield run_system(Path(sys.executable), "mixtera-hpc", num_samples)
    interpreters = [Path(path) for path in os.environ.get("MIXTERA_BENCH_PEERS", "").split(":") if path]
    for name in PEERS:
        result = {"name": name, "absent": "MIXTERA_BENCH_PEERS is not set"}
        for interpreter in interpreters:
            result = run_system(interpreter, name, num_samples)
            if "absent" not in result:
                break
        yield result


def run_system(interpreter: Path, name: str, num_samples: int) -> dict[str, Any]:
    """Return what `_plan_peers.py` measures, or the reason under `absent` if it fails."""
    script = Path(__file__).with_name("_plan_peers.py")
    # Peers must not import this repository by accident.
    python_path = str(script.parents[1]) if name == "mixtera-hpc" else ""
    done = subprocess.run(
        [interpreter, script, name, str(num_samples)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines() or ["the process printed nothing"]
        return {"name": name, "absent": errors[-1]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def measure_resumes(num_domains: int = 1000) -> Iterator[ResumeTiming]:
    """Resume a run at an early and at a late step; the fastest of three tries each."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose(make_collection(Path(folder), num_domains))
        build_index(config)
        for step in (10, 1_000_000):
            state = fabricate_state(open_source(config, Local()), step)
            tries = [measure_resume(config, state, step) for _ in range(3)]
            yield min(tries, key=lambda timing: timing.open_ms + timing.restore_ms + timing.first_batch_ms)


def fabricate_state(source: Source, step: int) -> NDArray[np.uint8]:
    """Return the state of a run that has served `step` steps."""
    planner_state = state_at_step(source.planner, source.weights, step)
    state = PlaneState(
        next_step=step,
        plan=source.planner.decide(planner_state, source.weights),
        mixer={},
        num_fed=step,
        decisions=[],
        stream_version=source.stream_version,
        identity=source.identity(),
    )
    return state.to_array()


def measure_resume(config: Config, state: NDArray[np.uint8], step: int) -> ResumeTiming:
    """Open a data plane, restore a state and take the first batch."""
    started = time.perf_counter()
    with DataPlane.open(config, Local()) as plane:
        opened = time.perf_counter()
        plane.load_state_dict({STATE_KEY: state})
        restored = time.perf_counter()
        batch = next(iter(plane))
        served = time.perf_counter()
        if batch.step != step:
            raise RuntimeError(f"The data plane resumed at step {batch.step}, expected step {step}.")
    return ResumeTiming(
        step=step,
        open_ms=(opened - started) * 1e3,
        restore_ms=(restored - opened) * 1e3,
        first_batch_ms=(served - restored) * 1e3,
        state_bytes=state.nbytes,
    )


def make_collection(folder: Path, num_domains: int) -> list[str]:
    """Write 30,000 rows of 300 characters whose sources have names of realistic length; return the overrides."""
    text = source_text()
    num_rows = 30_000
    source = np.minimum(np.random.Generator(np.random.Philox(0)).zipf(1.3, num_rows) - 1, num_domains - 1)
    source[:num_domains] = np.arange(num_domains)  # Every domain has at least one row.
    with (folder / "rows.jsonl").open("w") as file:
        for i, domain in enumerate(source.tolist()):
            row = {"text": text[i * 300 : (i + 1) * 300], "source": f"crawl-{domain:04d}"}
            file.write(json.dumps(row) + "\n")
    return [
        f"data.root={folder}",
        "data.include=[rows.jsonl]",
        "data.properties.source=source",
        f"index.path={folder / 'index.h5'}",
        f"dataplane.tokenizer={make_tokenizer()}",
        f"dataplane.global_batch_size={GLOBAL_BATCH_SIZE}",
        "mixture.group_by=[source]",
    ]


def print_planning(timings: list[PlanTiming]) -> None:
    print("planning a chunk on rank 0; the plan is broadcast after `decide`, `next state` overlaps with the broadcast")
    print(
        f"{'domains':>7} {'steps/chunk':>11} {'at step':>10} {'decide':>9} {'next state':>10} {'total':>9} "
        f"{'broadcast':>10}"
    )
    for timing in timings:
        print(
            f"{timing.num_domains:7,} {timing.chunk_steps:11,} {timing.step:10,} {timing.decide_us:6.0f} µs "
            f"{timing.after_us:7.0f} µs {timing.total_us:6.0f} µs {timing.broadcast_bytes / KIB:6.1f} KiB"
        )


def check_goals(timings: list[PlanTiming]) -> list[str]:
    """Print every goal next to the largest measured time; return those that were missed."""
    missed = []
    for num_domains, goal in GOALS_US.items():
        worst = max(timing.total_us for timing in timings if timing.num_domains == num_domains)
        text = f"{num_domains:5,} domains: at most {goal} µs, measured {worst:.0f} µs"
        if worst > goal:
            missed.append(text.strip())
            text += "   MISSED"
        print(f"goal: {text}")
    return missed


def print_systems(results: list[dict[str, Any]]) -> None:
    print(f"\nplanning {NUM_SAMPLES:,} samples of 7 domains")
    print(
        "prefix, window: largest deviation from the weights, in sequences, over any prefix and over any 1,024 samples"
    )
    print(
        f"{'system':>12} {'first plan':>11} {'whole plan':>11} {'memory':>9} {'prefix':>9} {'window':>9} "
        f"{'of 1,024':>8}  version"
    )
    for result in results:
        if "absent" in result:
            print(f"{result['name']:>12} absent: {result['absent']}")
            continue
        note = "" if result["samples"] > 0.99 * NUM_SAMPLES else f"  (deviations over {result['samples']:,} samples)"
        print(
            f"{result['name']:>12} {result['first_s'] * 1e3:8.2f} ms {result['plan_s'] * 1e3:8.1f} ms "
            f"{result['bytes'] / MIB:6.1f} MB {result['prefix']:9.2f} {result['window']:9.2f} "
            f"{result['window'] / 10.24:7.2f}%  {result['version']}{note}"
        )


def print_resumes(timings: list[ResumeTiming]) -> None:
    print("\nresuming a run of 1,000 domains")
    print(f"{'at step':>9} {'open':>9} {'restore':>9} {'first batch':>12} {'state':>9}")
    for timing in timings:
        print(
            f"{timing.step:9,} {timing.open_ms:6.0f} ms {timing.restore_ms:6.1f} ms {timing.first_batch_ms:9.0f} ms "
            f"{timing.state_bytes / KIB:5.1f} KiB"
        )


if __name__ == "__main__":
    main()
