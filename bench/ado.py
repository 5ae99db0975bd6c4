"""CPU time of the ADO mixing algorithm on rank 0: per step, per refit, and of the whole feedback loop of a run.

    python -m bench ado

Prints a table and writes bench/out/ado.json. Times are CPU time of this process, over all threads. Times of the
published implementations are quoted from earlier measurements; they are not measured in this run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from bench._mixing.feedback import measure_feedback
from bench._results import write_results
from mixtera_hpc.core.mixing.ado import Ado, AdoState
from mixtera_hpc.core.statistics import DomainStatistics

NUM_DOMAINS = (3, 22, 200, 1000)
NUM_STEPS = (100, 10_000)
SEQ_LEN = 1024

GOALS = {"update_ms at 1000 domains": 0.5, "refit_ms at 22 domains": 30.0, "refit_ms at 1000 domains": 500.0}
"""Largest time in ms, over all lengths of a run."""

FEEDBACK_GOAL = 0.001
"""The whole feedback loop, as a share of a step of the reference trainer."""

QUOTED = {
    "refit at 22 domains": "195 s (authors' code, compiles at each refit), 190 s (Mixtera)",
    "refit at 1000 domains": "about 24,000 s (authors' code), 9,200 s (Mixtera)",
    "update at 1000 domains after 10,000 steps": "113 ms and 37 ms (the two published implementations)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoTiming:
    """The cost of ADO after `num_steps` steps."""

    num_domains: int
    num_steps: int
    num_bins: int
    """Bins of the loss history."""
    history_bytes: int
    update_ms: float
    """A step without a refit."""
    refit_ms: float
    """A step with a refit of all scaling laws."""


def main() -> None:
    """Measure, print and write all results."""
    print("CPU time on rank 0. update: a step without a refit. refit: a step that fits all scaling laws.")
    print(f"{'domains':>8} {'steps':>9} {'bins':>5} {'history':>10} {'update':>10} {'refit':>10}")
    timings = []
    for timing in measure_all():
        timings.append(timing)
        print(
            f"{timing.num_domains:8,} {timing.num_steps:9,} {timing.num_bins:5} "
            f"{timing.history_bytes / 1e6:7.2f} MB {timing.update_ms:7.3f} ms {timing.refit_ms:7.1f} ms"
        )

    worst = {name: _worst(timings, name) for name in GOALS}
    for name, goal in GOALS.items():
        verdict = "" if worst[name] <= goal else "   MISSED"
        print(f"goal: {name} at most {goal:g}, measured {worst[name]:.3g}{verdict}")
    for name, figure in QUOTED.items():
        print(f"quoted, not measured in this run: {name}: {figure}")

    feedback = measure_feedback()
    verdict = "" if feedback.ratio <= FEEDBACK_GOAL else "   MISSED"
    print(
        f"goal: the feedback loop at most {FEEDBACK_GOAL:.1%} of a step of the reference trainer, measured "
        f"{feedback.loop_ms:.3g} ms of {feedback.trainer_ms:,.0f} ms = {feedback.ratio:.3%}{verdict}"
    )
    content = {"rows": [asdict(timing) for timing in timings], "worst": worst, "goals": GOALS, "quoted": QUOTED}
    write_results("ado", {**content, "feedback": asdict(feedback)})


def measure_all() -> Iterator[AdoTiming]:
    """Measure every number of domains with short, long and very long runs."""
    for num_domains in NUM_DOMAINS:
        batch_size = max(64, 2 * num_domains)
        for num_steps in NUM_STEPS:
            yield measure(num_domains, np.full(num_steps, batch_size), num_steps)

        # A run of 100,000 steps, simulated by 600 steps of growing size. It has as many bins as a run can have.
        ends = np.geomspace(500, 100_000, 600).astype(np.int64)
        yield measure(num_domains, np.diff(ends, prepend=0) * batch_size, 100_000)


def measure(num_domains: int, batch_sizes: np.ndarray, num_steps: int) -> AdoTiming:
    """Feed a run to ADO whose last step triggers a refit; time that step and the one before it."""
    size = len(batch_sizes)
    warmup = size // 2
    algorithm = Ado(Ado.Config(warmup=warmup, refit_interval=size - warmup, first_fitted_step=size // 20))
    state = algorithm.start(np.full(num_domains, 1 / num_domains))
    before = state
    for statistics in synthetic_statistics(num_domains, np.append(batch_sizes, batch_sizes[-1])):
        if statistics.step < size:
            before = state
            state, _ = algorithm.update(state, statistics)
    arrays = state.history.arrays()
    return AdoTiming(
        num_domains=num_domains,
        num_steps=num_steps,
        num_bins=len(arrays["history_key"]),
        history_bytes=sum(values.nbytes for values in arrays.values()),
        update_ms=cpu_ms(lambda: algorithm.update(before, statistics), repeats=200),
        refit_ms=cpu_ms(lambda: update_with_refit(algorithm, state, statistics), repeats=5),
    )


def synthetic_statistics(num_domains: int, batch_sizes: np.ndarray) -> Iterator[DomainStatistics]:
    """Yield statistics of steps whose losses follow power laws with noise; `batch_sizes` in sequences."""
    random = np.random.Generator(np.random.Philox(0))
    shares = random.dirichlet(np.full(num_domains, 2.0))
    epsilon = random.uniform(0.5, 2.5, num_domains)
    beta = random.uniform(4.0, 12.0, num_domains)
    alpha = random.uniform(0.15, 0.4, num_domains)
    for step, num_seen in enumerate(np.cumsum(batch_sizes)):
        sequences = random.multinomial(batch_sizes[step], shares)
        noise = 0.35 * random.standard_normal(num_domains) / np.sqrt(np.maximum(sequences, 1))
        loss = epsilon + beta * float(num_seen) ** -alpha + noise
        tokens = sequences * SEQ_LEN
        yield DomainStatistics(
            step=step,
            loss_sum=loss * tokens,
            num_tokens=tokens,
            num_sequences=sequences,
            num_nonfinite=np.zeros(num_domains, np.int64),
        )


def update_with_refit(algorithm: Ado, state: AdoState, statistics: DomainStatistics) -> None:
    after, _ = algorithm.update(state, statistics)
    if after.stale.any():
        raise RuntimeError("The last step did not trigger a refit.")


def cpu_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the mean CPU time of a call. States are immutable, so the same step can be repeated."""
    call()
    started = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - started) * 1e3 / repeats


def _worst(timings: list[AdoTiming], goal: str) -> float:
    """Return the largest value for a goal such as `update_ms at 1000 domains`."""
    field, _, scope = goal.partition(" at ")
    return max(getattr(timing, field) for timing in timings if scope == f"{timing.num_domains} domains")


if __name__ == "__main__":
    main()
