"""Training never sees what is held out. On which side a sample is depends on the sample alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.holdout import HOLDOUT_HASH, add_holdout_hashes, shard_hash_keys
from mixtera_hpc.core.index_tables import BlockTable, SampleColumns
from mixtera_hpc.dataplane.held_out import HeldOutBatches
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.errors import ConfigError, MixtureError
from mixtera_hpc.index.build.build import build_index

from .examples import whole_runs

FEW = whole_runs(25)
ONCE = {"unit": "samples", "on_exhausted": "redistribute", "max_epochs": 1.0}


@pytest.fixture(scope="module")
def plain(collection: list[str]) -> dict[str, Any]:
    return compose_plain([*collection, "dataplane.global_batch_size=1", "dataplane.chunk_steps=50"])


def ids(config: Config, split: Any) -> set[int]:
    """Return the ids of all samples that one epoch of a split serves."""
    with DataPlane.open(config, Local(), split=split) as plane:
        served = [p["meta"]["id"] for batch in plane for p in batch.payloads or []]
    assert len(set(served)) == len(served)
    return set(served)


@FEW
@given(
    st.floats(0.05, 0.9),
    st.integers(0, 5),
    st.sampled_from([[], ["source"], ["tags"]]),
    st.sampled_from([None, "size >= 200", "source != 'argparse'"]),
    st.sampled_from(["none", "window"]),
)
def test_every_sample_is_in_either_training_or_validation(
    plain: dict[str, Any], fraction: float, seed: int, by: list[str], where: str | None, shuffle: str
) -> None:
    def config(held_out: float) -> Config:
        query = {**plain["query"], "where": where, "holdout": {"fraction": held_out, "seed": seed}}
        mixture = {**plain["mixture"], **ONCE, "group_by": by}
        return from_plain(
            Config,
            {**plain, "query": query, "mixture": mixture, "dataplane": {**plain["dataplane"], "shuffle": shuffle}},
        )

    whole = ids(config(0.0), "train")
    train = ids(config(fraction), "train")
    validation = ids(config(fraction), "validation")
    assert not train & validation
    assert train | validation == whole
    assert abs(len(validation) / len(whole) - fraction) < 4 * (fraction * (1 - fraction) / len(whole)) ** 0.5 + 1e-9


def test_new_shards_and_other_blocks_move_no_sample(own_collection: list[str], tmp_path: Path) -> None:
    words = [*own_collection, "query.holdout.fraction=0.3", "dataplane.global_batch_size=1", "mixture.unit=samples"]
    words += ["mixture.on_exhausted=redistribute"]
    before = ids(compose(words), "validation")
    root = next(w.partition("=")[2] for w in own_collection if w.startswith("data.root="))
    more = Path(root) / "0_first.jsonl"
    lines = (Path(root) / "a.jsonl").read_text().splitlines()
    more.write_text("".join(line.replace('"id": ', '"id": 99') + "\n" for line in lines))
    again = [w for w in words if not w.startswith(("index.path", "index.block_rows"))]
    again += [f"index.path={tmp_path / 'other.h5'}", "index.block_rows=7"]
    build_index(compose(again))
    after = ids(compose(again), "validation")
    assert {i for i in after if i < 990} == before
    assert len(after) > len(before)


def test_hashes_are_uniform_and_independent_between_seeds() -> None:
    num_blocks = 400
    rows = 100
    first = np.arange(num_blocks, dtype=np.int64) * rows
    blocks = BlockTable(
        shard=np.zeros(num_blocks, np.int32),
        first_row=first,
        rows=np.full(num_blocks, rows, np.int32),
        offset=first,
        length=first,
        first_sample=first,
        zones={},
    )
    nothing = np.zeros(num_blocks * rows, np.int64)
    columns = SampleColumns(combo=nothing.astype(np.int32), length=nothing, tokens=nothing, numbers={})
    every = np.arange(num_blocks, dtype=np.int32)
    one, two = (
        add_holdout_hashes(columns, shard_hash_keys(["train/a.jsonl"], seed), blocks, every).numbers[HOLDOUT_HASH]
        for seed in (0, 1)
    )
    for values in (one, two):
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert ((counts - 800) ** 2 / 800).sum() < 100  # 49 degrees of freedom; P < 1e-4.
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.02


def test_every_validation_serves_the_same_and_reports_each_domain(collection: list[str]) -> None:
    words = ["query.holdout.fraction=0.3", "dataplane.seq_len=16", "dataplane.global_batch_size=4"]
    config = compose([*collection, *words, "training.validate_every=5", "training.validate_steps=6"])
    validation = HeldOutBatches(config, Local(), BatchSlice.of(config.dataplane, 0, 1))
    first, second = (list(validation.batches()) for _ in range(2))
    assert [b.tokens.tolist() for b in first] == [b.tokens.tolist() for b in second]
    assert 1 <= len(first) <= 6
    for batch in first:
        validation.record(batch, np.full(batch.loss_mask.shape, 2.0))
    statistics = validation.reduce(5)
    assert statistics.loss_sum.sum() == pytest.approx(2.0 * sum(int(b.loss_mask.sum()) for b in first))
    assert (statistics.num_sequences > 0).sum() >= 2


def test_less_than_a_global_batch_held_out_is_refused(collection: list[str]) -> None:
    config = compose([*collection, "query.holdout.fraction=0.3", "dataplane.global_batch_size=100000"])
    with pytest.raises(MixtureError, match=r"fraction=0\.3 holds \d+ sequences out, fewer than one global batch"):
        HeldOutBatches(config, Local(), BatchSlice.of(config.dataplane, 0, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("query.holdout.fraction=1.0", "query.holdout.fraction is 1.0"),
        ("training.validate_every=3", "nothing is held out"),
    ],
)
def test_a_holdout_that_cannot_work_is_refused(collection: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([*collection, override])


def test_validation_data_without_a_holdout_is_refused(collection: list[str]) -> None:
    with pytest.raises(ConfigError, match="nothing is held out"):
        DataPlane.open(compose(collection), Local(), split="validation")
