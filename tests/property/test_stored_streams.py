"""Streams of stored tokens: equal to those tokenized while reading, and proved across edits on any number of ranks."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.packing import sequences_ahead
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.reading import batch_maker
from mixtera_hpc.dataplane.reading.lookup import item_directory
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

from .examples import whole_runs

Served = tuple[list[Batch], dict[str, Any]]

COMMON = ["dataplane.audit=true", "dataplane.workers=0", "dataplane.chunk_steps=2", "dataplane.window_bytes=4000"]
PACKED = ["dataplane.pack=best_fit", "dataplane.pack_group=4"]
ORDERS = {
    "window": ["dataplane.shuffle=window", "dataplane.lanes=3"],
    "sequence": ["dataplane.shuffle=sequence"],
    "packed": PACKED,
}


@pytest.fixture(scope="module")
def store(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides of the collection with a token store."""
    overrides = [*collection, f"data.tokens={tmp_path_factory.mktemp('stored') / 'tokens'}"]
    write_store(compose(overrides), Local())
    return overrides


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides of an index of Megatron files, of two integer types."""
    folder = tmp_path_factory.mktemp("megatron")
    random = np.random.Generator(np.random.Philox(5))
    for name, count, dtype in (("a", 90, "<u2"), ("b", 50, "<i4"), ("c", 20, "<u2")):
        (folder / name).mkdir()
        lengths = np.maximum(random.lognormal(3, 1, count), 1).astype(int)
        # Every third document ends with the end-of-text token.
        documents = [[*random.integers(1, 99, size), *([0] if i % 3 == 0 else [])] for i, size in enumerate(lengths)]
        write_megatron(folder / name / "0.bin", documents, dtype)
    words = ["data.properties.source=__parent__", "dataplane.vocab_size=100", "dataplane.eos_id=0"]
    overrides = [f"data.root={folder}", f"index.path={folder / 'i.h5'}", "index.block_rows=8", *words]
    build_index(compose(overrides))
    return [*overrides, "mixture=natural", "mixture.group_by=[source]"]


def batches_of(config: Config, steps: int) -> Iterator[tuple[Any, ...]]:
    with DataPlane.open(config, Local()) as plane:
        for batch, _ in zip(plane, range(steps), strict=False):
            yield batch.digests, batch.document_ids.tolist(), batch.loss_mask.tolist(), batch.domain_ids.tolist()


def divide_reads(patch: pytest.MonkeyPatch) -> None:
    """Write few batches of a read at a time, and find documents in a directory, as large runs do."""
    patch.setattr(batch_maker, "TOKENS_PER_WRITE", 250)
    patch.setattr(item_directory, "MIN_DOCUMENTS", 1)


def test_stored_tokens_are_those_tokenized_while_reading(
    collection: list[str], store: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ["dataplane.seq_len=40", "dataplane.global_batch_size=6"]
    packs = [["dataplane.pack=concat"], PACKED]
    for pack, shuffle in product(packs, ["none", "block", "window", "sequence"]):
        if pack is PACKED and shuffle == "sequence":
            continue  # Refused: each sequence would cost a group.
        order = [*pack, f"dataplane.shuffle={shuffle}", "dataplane.balance=attention"]
        with monkeypatch.context() as patch:
            divide_reads(patch)
            stored = list(batches_of(compose([*store, *COMMON, *sizes, *order]), 3))
        assert len(stored) == 3
        assert stored == list(batches_of(compose([*collection, *COMMON, *sizes, *order]), 3)), order
    assert open_source(compose(store), Local()).index.token_stores
    assert not open_source(compose(collection), Local()).index.token_stores


def serve(config: Config, folder: Path, attempt: int, steps: int, state: Any = None, comm: Any = None) -> Served:
    """Return the batches until `steps` are done, and the state after them."""
    with DataPlane.open(config, comm or Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches = []
        for batch in plane:
            batches.append(batch)
            plane.finish(batch)
            if batch.step + 1 == steps:
                break
        return batches, plane.state_dict()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stored", ["store", "megatron"])
def test_a_ramp_and_a_longer_sequence_are_proved_on_other_ranks(
    stored: str, order: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = request.getfixturevalue(stored)
    schedule = "dataplane.batch_schedule=[{start: 2, size: 12}, {start: 5, size: 18}]"
    words = [*overrides, *COMMON, *ORDERS[order], schedule, "dataplane.global_batch_size=6"]
    first = compose([*words, "dataplane.seq_len=16"])
    longer = compose([*words, "dataplane.seq_len=33"])
    digests = []
    # The edit is at step 3, inside a group of `best_fit`; the second resume is inside one too.
    for name, ranks in (("one", (1, 1)), ("more", (2, 3))):
        if name == "more":
            divide_reads(monkeypatch)
        folder = tmp_path / name
        folder.mkdir()
        run = RunFolder(folder)
        begun, state = serve(first, folder, 1, 3)
        edit = run_edit_between(first, longer, read_run_edits(run.decisions), at_step=3)
        assert edit is not None
        record_run_edit(run.decisions, edit)
        parts = [[batch.digests for batch in begun]]
        for attempt, (num_ranks, stop) in enumerate(zip(ranks, (5, 8), strict=True), start=2):
            served = run_ranks(num_ranks, partial(serve, longer, folder, attempt, stop, state))
            state = served[0][1]
            steps = zip(*(batches for batches, _ in served), strict=True)
            parts.append([[digest for batch in step for digest in batch.digests or []] for step in steps])
        proof = verify_run(ServedRun(run, longer))
        assert (proof.num_steps, proof.num_sequences) == (8, 2 * 6 + 3 * 12 + 3 * 18)
        digests.append(parts)
    assert digests[0] == digests[1]


def digests_of(config: Config, folder: Path, ranks: tuple[int, int], resume_at: int, steps: int) -> list[list[str]]:
    """Return the digests of all sequences of each step of a run that is resumed once, maybe on other ranks."""
    folder.mkdir()
    begun = run_ranks(ranks[0], partial(serve, config, folder, 1, resume_at, None))
    resumed = run_ranks(ranks[1], partial(serve, config, folder, 2, steps, begun[0][1]))
    return [
        [digest for batch in step for digest in batch.digests or []]
        for served in (begun, resumed)
        for step in zip(*(batches for batches, _ in served), strict=True)
    ]


@whole_runs(12)
@given(
    seq_len=st.integers(9, 40),
    chunk_steps=st.integers(1, 5),
    ramp=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([6, 12, 30])), max_size=2),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    resume_at=st.integers(1, 19),
)
def test_sequences_permuted_ahead_are_those_of_a_run_without(
    megatron: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    seq_len: int,
    chunk_steps: int,
    ramp: list[tuple[int, int]],
    ranks: tuple[int, int],
    resume_at: int,
) -> None:
    starts = np.cumsum([distance for distance, _ in ramp]).tolist()
    stages = ", ".join(f"{{start: {start}, size: {size}}}" for start, (_, size) in zip(starts, ramp, strict=True))
    words = [*megatron, *COMMON, *ORDERS["sequence"], f"dataplane.seq_len={seq_len}", "dataplane.global_batch_size=18"]
    # All domains are repeated.
    config = compose([*words, f"dataplane.chunk_steps={chunk_steps}", f"dataplane.batch_schedule=[{stages}]"])
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        counts: list[int] = []
        permute = sequences_ahead.SequencesAhead._permute
        patch.setattr(
            sequences_ahead.SequencesAhead,
            "_permute",
            lambda *asked: (counts.append(permute(*asked)), counts[-1])[1],
        )
        served = digests_of(config, folder / "ahead", ranks, resume_at, 20)
        assert sum(counts) >= 2
        # As if no call could be followed by others.
        patch.setattr(sequences_ahead, "CALLS_AHEAD", 1)
        counts.clear()
        assert served == digests_of(config, folder / "alone", (1, 1), 20 - resume_at, 20)
        assert not any(counts)
