"""What ADO costs on rank 0: CPU time of a step and of a refit, by number of domains and length of the run.

    python -m bench.ado

Prints a table and writes bench/out/ado.json. CPU time of this process, all threads. The published codes' figures are quoted
from measurements made elsewhere, not taken in this run.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mixtera_hpc.core.mixing.ado import Ado, AdoState
from mixtera_hpc.core.statistics import DomainStatistics

OUT = Path(__file__).resolve().parent / "out" / "ado.json"
NUM_DOMAINS = (3, 22, 200, 1000)
NUM_STEPS = (100, 10_000)
SEQ_LEN = 1024
GOALS = {"update_ms at 1000 domains": 1.0, "refit_ms at 22 domains": 30.0, "refit_ms at 1000 domains": 1000.0}
QUOTED = {
    "refit at 22 domains": "195 s (authors, recompiling each time), 190 s (Mixtera)",
    "refit at 1000 domains": "about 24,000 s (authors), 9,200 s (Mixtera)",
    "update at 1000 domains after 10,000 steps": "113 ms and 37 ms (the two public codes)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement."""

    num_domains: int
    num_steps: int
    num_bins: int
    history_bytes: int
    update_ms: float
    refit_ms: float


def steps(num_domains: int, batches: np.ndarray) -> Iterator[DomainStatistics]:
    """Losses that follow power laws with noise; `batches` are the sequences of every step."""
    random = np.random.Generator(np.random.Philox(0))
    shares = random.dirichlet(np.full(num_domains, 2.0))
    epsilon, beta = random.uniform(0.5, 2.5, num_domains), random.uniform(4.0, 12.0, num_domains)
    alpha = random.uniform(0.15, 0.4, num_domains)
    for step, n in enumerate(np.cumsum(batches)):
        sequences = random.multinomial(batches[step], shares)
        noise = 0.35 * random.standard_normal(num_domains) / np.sqrt(np.maximum(sequences, 1))
        tokens = sequences * SEQ_LEN
        yield DomainStatistics(
            step=step,
            loss_sum=(epsilon + beta * float(n) ** -alpha + noise) * tokens,
            num_tokens=tokens,
            num_sequences=sequences,
            num_nonfinite=np.zeros(num_domains, np.int64),
        )


def measure(num_domains: int, batches: np.ndarray, num_steps: int) -> Row:
    """Train up to the last step, which is due for a refit, and time it and the step before."""
    size, half = len(batches), len(batches) // 2
    algorithm = Ado(Ado.Config(warmup=half, refit_interval=size - half, first_fitted_step=size // 20))
    state = before = algorithm.start(np.full(num_domains, 1 / num_domains))
    for last in steps(num_domains, np.append(batches, batches[-1])):
        if last.step < size:
            before, (state, _) = state, algorithm.update(state, last)
    arrays = state.history.arrays()
    return Row(
        num_domains=num_domains,
        num_steps=num_steps,
        num_bins=len(arrays["history_key"]),
        history_bytes=sum(values.nbytes for values in arrays.values()),
        update_ms=cpu_ms(lambda: algorithm.update(before, last), repeats=200),
        refit_ms=cpu_ms(lambda: refitted(algorithm, state, last), repeats=5),
    )


def refitted(algorithm: Ado, state: AdoState, last: DomainStatistics) -> None:
    after, _ = algorithm.update(state, last)
    if after.stale.any():
        raise RuntimeError("the last step was not due for a refit")


def cpu_ms(call: Callable[[], object], repeats: int) -> float:
    """Mean CPU time of a call; states are values, so the same step can be taken again and again."""
    call()
    began = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - began) * 1e3 / repeats


def rows() -> Iterator[Row]:
    for num_domains in NUM_DOMAINS:
        batch = max(64, 2 * num_domains)
        for num_steps in NUM_STEPS:
            yield measure(num_domains, np.full(num_steps, batch), num_steps)
        # A long run, its steps taken in growing strides, that has as many bins as there ever are.
        ends = np.geomspace(500, 100_000, 600).astype(np.int64)
        yield measure(num_domains, np.diff(ends, prepend=0) * batch, 100_000)


def main() -> None:
    """Measure, print, write."""
    print(f"{'domains':>8} {'steps':>9} {'bins':>5} {'history':>10} {'update':>10} {'refit':>10}   (CPU time)")
    measured = []
    for row in rows():
        measured.append(row)
        print(
            f"{row.num_domains:8,} {row.num_steps:9,} {row.num_bins:5} {row.history_bytes / 1e6:7.2f} MB "
            f"{row.update_ms:7.3f} ms {row.refit_ms:7.1f} ms"
        )
    worst = {name: max(getattr(r, name.split()[0]) for r in measured if f" {r.num_domains} " in name) for name in GOALS}
    for name, goal in GOALS.items():
        print(f"goal  {name}: {worst[name]:.3g} of at most {goal:g}{'' if worst[name] <= goal else '   MISSED'}")
    for name, figure in QUOTED.items():
        print(f"quoted, not measured here  {name}: {figure}")
    OUT.parent.mkdir(exist_ok=True)
    content = {"rows": [asdict(r) for r in measured], "worst": worst, "goals": GOALS, "quoted": QUOTED}
    OUT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
