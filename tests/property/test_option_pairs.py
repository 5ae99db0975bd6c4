"""Pairs of the options that decide sequences and positions: they serve the same on any ranks, or are refused.

An edit of `dataplane.seq_len` in the middle of a run is one of the options.
"""

from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.resume.run_edits import read_run_edits, record_run_edit, run_edit_between
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

STEPS = 7
CHANGE_SEQ_LEN = "change-seq-len"
OPTIONS = {
    "best_fit": ["dataplane.pack=best_fit", "dataplane.pack_group=5"],
    "shuffle=sequence": ["dataplane.shuffle=sequence"],
    "lanes": ["dataplane.lanes=3"],
    "balance=attention": ["dataplane.balance=attention", "dataplane.balance_group=6"],
    "balance=cost": ["dataplane.balance=cost", "dataplane.sample_cost=tokens"],
    "sample_budget": ["dataplane.sample_budget=3000", "dataplane.sample_cost=tokens"],
    "batch_schedule": ["dataplane.batch_schedule=[{start: 2, size: 18}, {start: 5, size: 6}]"],
    "samples": ["mixture.unit=samples"],
    # The data end in the sixth step.
    "pad": ["dataplane.last_batch=pad", "mixture.group_by=[]", "mixture.max_epochs=0.0333"],
    "no overlap": ["dataplane.overlap_one_token=false"],
    "store": ["data.tokens=auto"],
    CHANGE_SEQ_LEN: [],
}
REFUSED = {
    ("best_fit", "shuffle=sequence"),
    ("best_fit", "samples"),
    ("balance=attention", "samples"),
    # Without `mixture.unit=samples`.
    *((name, other) for name in ("balance=cost", "sample_budget") for other in OPTIONS if other != "samples"),
}
"""Pairs that make no sense together."""
COMMON = [
    "mixture=natural",
    "dataplane.audit=true",
    "dataplane.workers=0",
    "dataplane.seq_len=24",
    "dataplane.global_batch_size=12",
    "dataplane.chunk_steps=2",
    "dataplane.window_bytes=4000",
    "data.max_amplification=1e9",
]


@pytest.fixture(scope="module")
def stored(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the override that names a token store of the collection."""
    setting = f"data.tokens={tmp_path_factory.mktemp('stored') / 'tokens'}"
    write_store(compose([*collection, setting]), Local())
    return setting


@lru_cache(maxsize=4)
def composed(*words: str) -> Config:
    return compose(words)


def serve(config: Config, folder: Path, attempt: int, until: int, state: Any, comm: Communicator) -> Any:
    """Return the digests of every position of the steps before `until`, their micro-batches, and the state."""
    with DataPlane.open(config, comm, RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        batches: list[Batch] = []
        for batch in plane:
            batches.append(batch)
            plane.finish(batch)
            if batch.step + 1 == until:
                break
        return batches, plane.state_dict()


def run(words: list[str], folder: Path, attempts: list[tuple[int, int]], change_at: int | None) -> list[list[str]]:
    """Return the digests of every step of a run of several attempts, given as (ranks, steps until its end)."""
    folder.mkdir()
    paths = RunFolder(folder)
    config = composed(*words)
    state = None
    digests: list[list[str]] = []
    for attempt, (ranks, until) in enumerate(attempts, start=1):
        if change_at is not None and len(digests) == change_at:
            longer = composed(*words, "dataplane.seq_len=37")
            edit = run_edit_between(config, longer, read_run_edits(paths.decisions), at_step=change_at)
            assert edit is not None
            record_run_edit(paths.decisions, edit)
            config = longer
        served = run_ranks(ranks, partial(serve, config, folder, attempt, until, state))
        state = served[0][1]
        for step in zip(*(batches for batches, _ in served), strict=True):
            assert len({len(batch.micro_batches) for batch in step}) == 1
            digests.append([digest for batch in step for digest in batch.digests or []])
    proof = verify_run(ServedRun(paths, config))
    assert proof.num_steps == len(digests)
    return digests


@pytest.mark.parametrize("pair", list(combinations(OPTIONS, 2)), ids=" + ".join)
def test_two_options_serve_the_same_on_any_ranks_or_are_refused(
    pair: tuple[str, str], collection: list[str], stored: str, tmp_path: Path
) -> None:
    words = [*collection, *COMMON, *(word for name in pair for word in OPTIONS[name])]
    if "store" in pair:
        words.append(stored)
    if set(pair) == {"pad", "samples"}:
        words.append("mixture.max_epochs=0.138")
    if pair in REFUSED or pair[::-1] in REFUSED:
        with pytest.raises(ConfigError, match=r"Set |Remove |set "):
            run(words, tmp_path / "refused", [(1, 2), (1, STEPS)], 2 if CHANGE_SEQ_LEN in pair else None)
        return
    change_at = 3 if CHANGE_SEQ_LEN in pair else None
    alone = run(words, tmp_path / "alone", [(1, STEPS)] if change_at is None else [(1, 3), (1, STEPS)], change_at)
    others = run(words, tmp_path / "others", [(2, 3), (3, STEPS)], change_at)
    assert len(alone) > 4
    assert any(set(digest) == {"0"} for digest in alone[-1]) == ("pad" in pair)
    assert alone == others
