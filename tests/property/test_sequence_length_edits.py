"""A change of the sequence length inside a run: every item of the epoch is in one sequence, and a replay proves it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.list import served_sequences
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

Served = tuple[list[Batch], dict[str, Any]]
SLOW = whole_runs(12)


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    return compose_plain([*collection, "dataplane.audit=true", "dataplane.workers=0"])


@pytest.fixture
def new_folder(tmp_path: Path) -> Callable[[], Path]:
    """Return a new folder for every example."""
    made = iter(range(10**6))

    def make() -> Path:
        folder = tmp_path / str(next(made))
        folder.mkdir()
        return folder

    return make


def config_of(plain: dict[str, Any], mixture: dict[str, Any], **plane: Any) -> Config:
    sections = {"mixture": {**plain["mixture"], **mixture}, "dataplane": {**plain["dataplane"], **plane}}
    return from_plain(Config, {**plain, **sections})


def serve(
    config: Config, folder: Path, attempt: int, steps: int, state: dict[str, Any] | None = None, comm: Any = None
) -> Served:
    """Return the batches until `steps` are done or the data ends, and the state after them."""
    with DataPlane.open(config, comm or Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches = []
        for batch in plane if plane.next_step < steps else []:
            batches.append(batch)
            plane.record(batch, 1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None]))
            if batch.step + 1 == steps:
                break
        return batches, plane.state_dict()


def edit(before: Config, folder: Path, at_step: int, drop: tuple[str, ...] = (), **plane: Any) -> Config:
    after = replace(before, dataplane=replace(before.dataplane, **plane))
    path = RunFolder(folder).decisions
    change = run_edit_between(before, after, read_run_edits(path), at_step=at_step, drop=drop)
    assert change is not None
    record_run_edit(path, change)
    return after


def served_tokens(config: Config, folder: Path) -> Counter[tuple[str, int, int]]:
    """Return how often each token of each document was served as an input: (shard, row, token) → times."""
    run = ServedRun(RunFolder(folder), config)
    times: Counter[tuple[str, int, int]] = Counter()
    for attempt, steps in run.history.extents():
        source = run.source_of(attempt)
        for record in served_sequences(source, attempt, steps):
            stride = source.grid.stride
            for shard, row, first, last in record["segments"]:
                taken = min(last - first, stride)
                stride -= taken
                times.update((shard, row, token) for token in range(first, first + taken))
    return times


@SLOW
@given(
    st.sampled_from(["none", "block", "window", "sequence", "best_fit"]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from([5, 16, 31, 64])), min_size=1, max_size=3),
)
def test_every_token_of_an_epoch_is_in_one_sequence(
    plain: dict[str, Any],
    new_folder: Callable[[], Path],
    shuffle: str,
    lanes: int,
    overlap: bool,
    changes: list[tuple[int, int]],
) -> None:
    mixture = {"group_by": ["source"], "on_exhausted": "redistribute", "max_epochs": 1.0}
    order = {"pack": "best_fit", "pack_group": 4} if shuffle == "best_fit" else {"shuffle": shuffle}
    config = config_of(plain, mixture, seq_len=24, lanes=lanes, overlap_one_token=overlap, window_bytes=4000, **order)
    config = replace(config, dataplane=replace(config.dataplane, global_batch_size=8, chunk_steps=3))
    folder = new_folder()
    step = 0
    state = None
    for attempt, (more, seq_len) in enumerate(changes):
        step += more
        _, state = serve(config, folder, attempt + 1, step, state)
        if seq_len != config.dataplane.seq_len:
            config = edit(config, folder, step, seq_len=seq_len)
    serve(config, folder, len(changes) + 1, 10**6, state)

    times = served_tokens(config, folder)
    assert max(times.values()) == 1
    # What does not fill the last sequence of a domain, or the last batch, is not served.
    epoch_items = open_source(config, Local()).layout.epoch_items()
    assert epoch_items.sum() - len(times) < (len(epoch_items) + 8) * 66
    run = RunFolder(folder)
    assert verify_run(ServedRun(run, config)).num_steps == History(run.journal).end


@SLOW
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([8, 32, 40]), st.sampled_from(["natural", "dynamic"]))
def test_a_replay_proves_changes_of_length_batch_and_data_on_any_number_of_ranks(
    plain: dict[str, Any], new_folder: Callable[[], Path], first: int, more: int, seq_len: int, kind: str
) -> None:
    dynamic = {"kind": "dynamic", "algorithm": {"name": "ado", "warmup": 4, "refit_interval": 4}}
    mixture = {"group_by": ["source"], **(dynamic if kind == "dynamic" else {})}
    config = config_of(plain, mixture, seq_len=16, global_batch_size=6, chunk_steps=3)
    digests = []
    for num_ranks in (1, 2):
        folder = new_folder()
        _, state = serve(config, folder, 1, first)
        longer = edit(config, folder, first, seq_len=seq_len, global_batch_size=12)
        [(_, state), *_] = run_ranks(num_ranks, partial(serve, longer, folder, 2, first + more, state))
        last = edit(longer, folder, first + more, seq_len=24, drop=("source == 'argparse'",))
        ranks = run_ranks(num_ranks, partial(serve, last, folder, 3, 24, state))
        run = RunFolder(folder)
        proof = verify_run(ServedRun(run, last))
        assert (proof.num_steps, proof.num_sequences) == (24, 6 * first + 12 * (24 - first))
        steps = zip(*(batches for batches, _ in ranks), strict=True)
        digests.append([[digest for batch in step for digest in batch.digests or []] for step in steps])
    assert digests[0] == digests[1]


def test_the_tokens_of_every_domain_keep_their_share_across_a_change(
    plain: dict[str, Any], new_folder: Callable[[], Path]
) -> None:
    domains = [{"key": {"source": s}, "weight": w} for s, w in (("ast", 0.5), ("enum", 0.3), ("inspect", 0.2))]
    config = config_of(plain, {"kind": "static", "domains": domains}, seq_len=32, global_batch_size=7, chunk_steps=2)
    folder = new_folder()
    batches, state = serve(config, folder, 1, 3)
    tokens = np.zeros(3)
    for number, seq_len in enumerate((8, 64, 16)):
        config = edit(config, folder, 3 * (number + 1), seq_len=seq_len)
        more, state = serve(config, folder, number + 2, 3 * (number + 2), state)
        batches += more
    for batch in batches:
        tokens += np.bincount(batch.domain_ids, minlength=3) * (batch.tokens.shape[1] - 1)
    assert np.abs(tokens - tokens.sum() * np.array([0.5, 0.3, 0.2])).max() < 64
