"""`data.transform`: the same results for any number of ranks and workers and after a resume; errors name the row."""

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

FUNCTIONS = """
import os
import signal
import subprocess
import sys
import threading
import time
import numpy as np
from mixtera_hpc import CostedSample

def augment(row, sample):
    noise = sample.rng().random(3)
    return {"id": row["id"], "noise": noise, "where": (sample.shard, sample.row, sample.step, sample.position)}

def image(row, sample):
    return sample.read_bytes(row["image"])

def fail_at_7(row, sample):
    return 1 / (row["id"] - 7)

def exit_at_7(row, sample):
    return sys.exit(0) if row["id"] == 7 else row["id"]

def ends_children(row, sample):
    # How a program and a fork end on SIGTERM.
    program = subprocess.Popen(["sleep", "60"])
    program.terminate()
    ready, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(write_end)
    os.kill(child, signal.SIGUSR2)  # Slurm's warning, which is delivered before SIGTERM.
    os.kill(child, signal.SIGTERM)
    return program.wait(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def no_pickle(row, sample):
    return threading.Lock()

def complex_cost(row, sample):
    return CostedSample(row["id"], cost=np.complex64(1))

def costed(row, sample):
    return CostedSample(row["id"], cost=row["id"] % 10)

not_a_function = 3
"""
NUM_ROWS = 40
SMALL = ["mixture.unit=samples", "data.text=null", "dataplane.global_batch_size=6", "dataplane.chunk_steps=2"]


@pytest.fixture
def overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the overrides of an index of 40 rows, each with the name of an image; functions are in `my_transforms`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_transforms.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for i in range(NUM_ROWS):
        (data / "images" / f"{i}.bin").write_bytes(b"image %d" % i)
    rows = [{"id": i, "image": f"images/{i}.bin"} for i in range(NUM_ROWS)]
    (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = [f"data.root={data}", "data.include=[a.jsonl]", f"index.path={tmp_path / 'i.h5'}", *SMALL]
    build_index(compose(base))
    yield base
    sys.modules.pop("my_transforms", None)


def serve(overrides: Sequence[str], num_ranks: int = 1, first: int = 0, stop: int = 14) -> dict[Any, Any]:
    """Serve steps; return (step, position) → sample. Begins at step `first` after a resume."""
    config = compose(overrides)

    def rank(comm: Any) -> list[Batch]:
        with DataPlane.open(config, comm=comm) as plane:
            batches = iter(plane)
            before = [next(batches) for _ in range(first)]
            state = plane.state_dict() if before else None
        with DataPlane.open(config, comm=comm) as plane:
            if state is not None:
                plane.load_state_dict(state)
            batches = iter(plane)
            return [next(batches) for _ in range(first, stop)]

    by_rank = [rank(Local())] if num_ranks == 1 else run_ranks(num_ranks, rank)
    return {
        (batch.step, position): sample
        for batches in by_rank
        for batch in batches
        for position, sample in zip(batch.positions.tolist(), batch.payloads or [], strict=True)
    }


def test_random_numbers_depend_on_step_and_position_only(overrides: list[str]) -> None:
    overrides = [*overrides, "data.transform=my_transforms.augment"]
    expected = serve(overrides)
    assert len({sample["noise"].tobytes() for sample in expected.values()}) == 14 * 6
    for (step, position), sample in expected.items():
        assert sample["where"] == ("a.jsonl", sample["id"], step, position)

    for other in (
        serve(overrides, num_ranks=3),
        serve([*overrides, "dataplane.workers=2"]),
        serve(overrides, num_ranks=2, first=5),
    ):
        assert other.keys() <= expected.keys()
        for key, sample in other.items():
            assert np.array_equal(sample["noise"], expected[key]["noise"]) and sample["id"] == expected[key]["id"]
    other_seed = serve([*overrides, "dataplane.seed=1"])
    assert not np.array_equal(other_seed[0, 0]["noise"], expected[0, 0]["noise"])


def test_files_that_rows_name_are_read_below_the_root(overrides: list[str]) -> None:
    plain = serve(overrides)
    images = serve([*overrides, "data.transform=my_transforms.image"])
    assert {key: f"image {row['id']}".encode() for key, row in plain.items()} == images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../secret", r"names the file '\.\./secret', which is not below"),
        ("none.bin", r"names the file .* cannot be read"),
    ],
)
def test_a_wrong_file_is_named_with_its_row(image: str, message: str, overrides: list[str], tmp_path: Path) -> None:
    shard = tmp_path / "data" / "a.jsonl"
    (tmp_path / "secret").write_text("secret")
    rows = [json.loads(line) for line in shard.read_text().splitlines()]
    rows[11]["image"] = image
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_index(compose(overrides))
    with pytest.raises(DataError, match=rf"a\.jsonl row 11 {message}"):
        serve([*overrides, "data.transform=my_transforms.image"])


@pytest.mark.parametrize("name", ["fail_at_7", "exit_at_7"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_the_function_names_row_and_step(workers: int, name: str, overrides: list[str]) -> None:
    with pytest.raises(DataError, match=rf"my_transforms\.{name} failed for a\.jsonl row 7 \(step \d+, position"):
        serve([*overrides, f"data.transform=my_transforms.{name}", f"dataplane.workers={workers}"])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_function_can_end_what_it_has_started(workers: int, overrides: list[str]) -> None:
    served = serve([*overrides, "data.transform=my_transforms.ends_children", f"dataplane.workers={workers}"], stop=1)
    assert set(served.values()) == {(-signal.SIGTERM, -signal.SIGTERM)}


def test_what_processes_cannot_send_is_refused(overrides: list[str]) -> None:
    with pytest.raises(DataError, match=r"data\.transform returns what cannot be sent between processes"):
        serve([*overrides, "data.transform=my_transforms.no_pickle", "dataplane.workers=1"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["my_transforms.none", "no_such_module.f", "my_transforms.not_a_function", "f"])
def test_a_function_that_cannot_be_imported_is_refused(name: str, workers: int, overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.transform is"):
        serve([*overrides, f"data.transform={name}", f"dataplane.workers={workers}"])


def test_tokens_are_not_transformed() -> None:
    with pytest.raises(ConfigError, match=r"data\.transform is a\.b, but mixture\.unit is tokens"):
        compose(["data.root=/data", "dataplane.vocab_size=9", "data.transform=a.b"])


def test_the_proof_of_a_run_is_of_the_raw_rows(overrides: list[str], tmp_path: Path) -> None:
    config = compose([*overrides, "data.transform=my_transforms.augment", "dataplane.audit=true"])
    folder = RunFolder(tmp_path / "run")
    with DataPlane.open(config, comm=Local(), folder=folder) as plane:
        batches = iter(plane)
        for _ in range(4):
            next(batches)
    # A laptop need not have the function.
    (tmp_path / "code" / "my_transforms.py").unlink()
    assert verify_run(ServedRun(folder, config)).num_sequences == 24


COSTED = ["data.transform=my_transforms.costed", "dataplane.sample_cost=transform", "dataplane.sample_budget=9"]


@pytest.mark.parametrize(
    "more", [[], ["dataplane.workers=1"], ["mixture.on_exhausted=stop", "dataplane.last_batch=pad"]]
)
def test_the_function_gives_the_costs_of_micro_batches(more: list[str], overrides: list[str]) -> None:
    plain = serve(overrides, stop=5)
    config = compose([*overrides, *COSTED, *more])

    def rank(comm: Any) -> list[Batch]:
        with DataPlane.open(config, comm=comm) as plane:
            # The last step of an epoch has padding.
            return [batch for batch, _ in zip(plane, range(7), strict=False)]

    for num_ranks in (1, 2, 3):
        by_rank = run_ranks(num_ranks, rank)
        needed = []
        for batches in zip(*by_rank, strict=True):
            samples = [sample for batch in batches for sample in batch.payloads or []]
            if batches[0].step < 5:
                assert samples == [plain[batches[0].step, position]["id"] for position in range(6)]
            # All ranks run the same number of micro-batches, which hold all rows of a rank within the budget.
            assert len({len(batch.micro_batches) for batch in batches}) == 1
            for batch in batches:
                parts = [(batch.payloads or [])[rows] for rows in batch.micro_batches]
                assert [sample for part in parts for sample in part] == batch.payloads
                assert all(sum((sample or 0) % 10 for sample in part) <= 9 for part in parts)
                needed.append(sum(bool(part) for part in parts) - len(parts))
        assert num_ranks == 1 or min(needed) < 0


def test_costs_that_the_function_gives_wrongly_are_refused(overrides: list[str]) -> None:
    for words, problem in (
        (["data.transform=my_transforms.augment"], r"returned a dict for a\.jsonl row \d+ .*CostedSample"),
        (["data.transform=my_transforms.complex_cost"], r"the cost .*1\+0j.*, expected a number from 0"),
        (["dataplane.sample_budget=8"], r"row \d*9 \(step \d+, position \d\) the cost 9, .*sample_budget=8"),
    ):
        with pytest.raises(DataError, match=problem):
            serve([*overrides, *COSTED, *words])
    for words, problem in (
        (["data.transform=null"], r"data\.transform is not set"),
        (["dataplane.sample_cost=tokens"], r"(?s)not a number property of .*, or count tokens: index build with"),
        (["dataplane.sample_budget=null"], r"sample_budget is not set"),
        (["dataplane.balance=cost"], r"their cost is known afterwards"),
    ):
        with pytest.raises(ConfigError, match=problem):
            serve([*overrides, *COSTED, *words])
    # Without a budget the cost does not matter.
    assert serve([*overrides, COSTED[0]], stop=3) == {key: row["id"] for key, row in serve(overrides, stop=3).items()}
