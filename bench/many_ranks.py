"""Cost of one rank's batches as a rank of 1, 64, 256 and 1,024 ranks that each have the same number of sequences.

    python -m bench many_ranks

Every rank has 8 sequences of 4,096 tokens of a step, of plain JSONL or of stored tokens, with seven domains. The four
ranks of a node are measured together, one after the other in one process on one core, with and without shared windows;
costs are per rank. The number of lanes is the default of the global batch, and for 1,024 ranks also 16. A large job
passes through the corpus in few steps, so the same readers serve several nodes, in different lanes. They have opened
all files before. CPU times are medians of interleaved rounds. Prints a table and writes bench/out/many_ranks.json.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench._corpus import FOLDER, make_once, make_rows
from bench._peers.process import use_one_core
from bench._results import write_results
from bench.stored_tokens import token_settings, write_corpus
from bench.text import corpus_settings
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.reading import domain_streams
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.lookup import steps_ahead
from mixtera_hpc.dataplane.reading.processes.block_memory import share_windows
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.index.build.build import build_index

OWN_SEQUENCES = 8
SEQ_LEN = 4096
NUM_ROWS = 2_400_000
NUM_DOCUMENTS = 2_400_000
NODE_RANKS = 4
ROUNDS = 5
UNUSED_LANE = 15
"""Lane in which no node is measured."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job of which some nodes are measured."""

    num_ranks: int
    warm_up_steps: int
    """Steps before those that are measured, in which the first windows are built."""
    steps: int
    nodes: int
    """Nodes that are measured, each in a lane of its own."""
    lanes: int | None = None
    """Number of lanes; None for the default of the global batch."""


JOBS = (Job(1, 64, 3072, 1), Job(64, 16, 64, 4), Job(256, 8, 24, 7), Job(1024, 8, 8, 14), Job(1024, 8, 8, 14, 16))
"""1,024 ranks serve the corpus in 17 steps, and need new windows in each of them. Eight steps are read together."""


@dataclass(slots=True)
class WindowBuilds:
    """The CPU time in which windows were built, or copied from other ranks, so far."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCost:
    """CPU time of a rank per step, the median of interleaved rounds."""

    data: str
    num_ranks: int
    lanes: int
    has_shared_windows: bool
    step_ms: float
    ratio: float
    """To a rank alone, the median of the ratios of all rounds."""
    lowest: float
    highest: float
    windows_ms: float
    """Part of the time for new windows, with the columns of the index."""
    windows_us_per_sequence: float
    """The same per sequence of the global batch."""


class Node:
    """The ranks of one node, which have opened all files and read nothing else."""

    def __init__(self, source: Source, num_ranks: int, *, has_shared_windows: bool) -> None:
        self.num_ranks = num_ranks
        self.size = min(num_ranks, NODE_RANKS)
        windows = share_windows(Local(), self.size) if has_shared_windows else None
        self._source = replace(source, memory=replace(source.memory, windows=windows))
        self._makers = [
            BatchMaker(self._source, BatchSlice(group=rank, num_groups=num_ranks), audit=False)
            for rank in range(self.size)
        ]
        self.serve(num_ranks * UNUSED_LANE // 16, 0, 8)

    def serve(self, first_rank: int, warm_up_steps: int, steps: int) -> tuple[float, float]:
        """Serve steps of the node that begins with a rank; return the CPU seconds of all, and those for windows."""
        for number, maker in enumerate(self._makers):
            # A rank keeps its place. Here, the same readers are at one place after the other.
            maker._slice = BatchSlice(group=(first_rank + number) % self.num_ranks, num_groups=self.num_ranks)
            maker._contents._slice = maker._slice
        state = PlannerState.start(self._source.num_domains)
        began_s = time.process_time()
        windows_began_s = WINDOWS.seconds
        step = 0
        while step < warm_up_steps + steps:
            plan, state = self._source.planner.plan(state, self._source.weights)
            if step == warm_up_steps:
                began_s = time.process_time()
                windows_began_s = WINDOWS.seconds
            for maker in self._makers:
                served = sum(1 for _ in maker.batches(plan, 0))
            step += served
        return time.process_time() - began_s, WINDOWS.seconds - windows_began_s


WINDOWS = WindowBuilds()


def main(options: Sequence[str] = ()) -> None:
    """Measure, print and write all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=DATA, default=list(DATA))
    parser.add_argument("--ranks", nargs="*", type=int, default=[job.num_ranks for job in JOBS])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(options)
    use_one_core()
    domain_streams.build_windows = _timed(domain_streams.build_windows)
    # A large job is measured for one chunk, and would also pay for the look-up of those after it.
    steps_ahead.MAX_CHUNKS = 1
    jobs = [job for job in JOBS if job.num_ranks in (1, *arguments.ranks)]
    costs = []
    titles = ("data", 8), ("ranks", -6), ("lanes", -6), ("windows", -8), ("per step", -11), ("ratio", -18)
    more_titles = ("of windows", -12), ("per sequence", -13)
    print(*(f"{title:{'<' if width > 0 else '>'}{abs(width)}}" for title, width in (*titles, *more_titles)))
    for data in arguments.only:
        for cost in _measure(data, jobs, arguments.rounds):
            costs.append(cost)
            print(
                f"{data:8} {cost.num_ranks:>6,} {cost.lanes:>6} {'shared' if cost.has_shared_windows else 'own':>8} "
                f"{cost.step_ms:>8.3f} ms {cost.ratio:>6.2f} ({cost.lowest:.2f}–{cost.highest:.2f}) "
                f"{cost.windows_ms:>9.3f} ms {cost.windows_us_per_sequence:>10.3f} us",
                flush=True,
            )
    write_results("many_ranks", {"costs": [asdict(cost) for cost in costs]})


def _measure(data: str, jobs: Sequence[Job], rounds: int) -> list[RankCost]:
    sources: dict[Job, Source] = {}
    for job in jobs:
        settings = [f"dataplane.global_batch_size={OWN_SEQUENCES * job.num_ranks}"]
        if job.lanes is not None:
            settings.append(f"dataplane.lanes={job.lanes}")
        sources[job] = open_source(compose([*DATA[data](), *settings]), Local())
        # A new tokenizer is slow until it has seen most words.
        _step_s(sources[job], job, False, 0)
    seconds: dict[tuple[Job, bool], list[tuple[float, float]]] = {
        (job, is_shared): [] for job in jobs for is_shared in ((False, True) if job.num_ranks > 1 else (False,))
    }
    for number, (job, is_shared) in itertools.product(range(rounds), seconds):
        seconds[job, is_shared].append(_step_s(sources[job], job, is_shared, number))
    alone = [total for total, _ in next(iter(seconds.values()))]
    return [
        _cost(data, job, sources[job].lanes.lanes, is_shared, of_rounds, alone)
        for (job, is_shared), of_rounds in seconds.items()
    ]


def _step_s(source: Source, job: Job, has_shared_windows: bool, round_number: int) -> tuple[float, float]:
    """Return the CPU seconds of a rank per step, and those for windows."""
    # Nothing of what other rounds have read is in memory.
    node = Node(source, job.num_ranks, has_shared_windows=has_shared_windows)
    # Not at the same place of each lane, because the domains of a lane follow each other.
    lane = job.num_ranks / source.lanes.lanes
    total = [0.0, 0.0]
    for number in range(job.nodes):
        place = (number + 0.5 + (number * 0.618 + round_number * 0.23) % 1) * lane
        first_rank = int(place) // node.size * node.size % job.num_ranks
        for part, seconds in enumerate(node.serve(first_rank, job.warm_up_steps, job.steps)):
            total[part] += seconds / (job.nodes * node.size * job.steps)
    return total[0], total[1]


def _cost(
    data: str,
    job: Job,
    lanes: int,
    has_shared_windows: bool,
    of_rounds: Sequence[tuple[float, float]],
    alone: Sequence[float],
) -> RankCost:
    ratios = [total / of_one for (total, _), of_one in zip(of_rounds, alone, strict=True)]
    windows_s = statistics.median(windows for _, windows in of_rounds)
    return RankCost(
        data=data,
        num_ranks=job.num_ranks,
        lanes=lanes,
        has_shared_windows=has_shared_windows,
        step_ms=statistics.median(total for total, _ in of_rounds) * 1e3,
        ratio=statistics.median(ratios),
        lowest=min(ratios),
        highest=max(ratios),
        windows_ms=windows_s * 1e3,
        windows_us_per_sequence=windows_s / (OWN_SEQUENCES * job.num_ranks) * 1e6,
    )


def _timed(build_windows: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build_windows)
    def timed(*arguments: Any) -> Any:
        began_s = time.process_time()
        try:
            return build_windows(*arguments)
        finally:
            WINDOWS.seconds += time.process_time() - began_s

    return timed


def _text() -> list[str]:
    return [*corpus_settings(make_rows(NUM_ROWS)), f"dataplane.seq_len={SEQ_LEN}"]


def _stored_tokens() -> list[str]:
    write = functools.partial(write_corpus, 1, num_documents=NUM_DOCUMENTS)
    folder = make_once(FOLDER / f"tokens-7-{NUM_DOCUMENTS}", write)
    index = folder.with_suffix(".h5")
    settings = token_settings(folder, index)
    if not index.exists():
        build_index(compose(settings))
    return [*settings, f"dataplane.seq_len={SEQ_LEN}"]


DATA: dict[str, Callable[[], list[str]]] = {"text": _text, "tokens": _stored_tokens}
"""Name → the settings of a corpus that is written on first use."""


if __name__ == "__main__":
    main(sys.argv[1:])
