"""`dataplane.record_losses` and `trace --worst`: the documents behind the highest losses, for any number of ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import Batch, DataPlane
from mixtera_hpc.dataplane.recording.loss_log import LossLog, read_losses
from mixtera_hpc.errors import DataError
from mixtera_hpc.testing.thread_ranks import run_ranks

WORDS = ["dataplane.seq_len=32", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2"]
KEEP = "dataplane.record_losses=true"
STEPS = 6


class TwoByTwo:
    """Part of a torch `DeviceMesh` that `DataPlane.open` reads: 2 data-parallel times 2 context-parallel threads."""

    mesh_dim_names = ("dp", "cp")

    def __init__(self, rank: int) -> None:
        self._position = {"dp": rank // 2, "cp": rank % 2}

    def size(self, dim: int) -> int:
        return 2

    def get_local_rank(self, name: str) -> int:
        return self._position[name]


def loss_of(batch: Batch, scale: float = 1.0) -> Any:
    """Return losses that depend on the tokens; the one sequence of step 3 at position 5 has one that is not finite."""
    losses = (scale * (1 + (batch.tokens[:, 1:] % 97) / (3 + batch.domain_ids[:, None]))).astype(np.float32)
    if batch.step == 3:
        rows, columns = np.nonzero(batch.loss_mask & (batch.positions == 5)[:, None])
        losses[rows[:1], columns[:1]] = np.nan
    return losses


def train(
    config: Config, folder: Path, num_ranks: int, until: int = STEPS, state: Any = None, scale: float = 1, **layout: Any
) -> Any:
    """Record every batch up to step `until`; return the state."""

    def rank(comm: Any) -> Any:
        own: dict[str, Any] = dict(layout)
        tokens = None
        if "loss_parts" in layout:
            own["mesh"] = TwoByTwo(comm.rank)
            tokens = [slice(0, 13), slice(13, 32)][comm.rank % 2]
        with DataPlane.open(config, comm, RunFolder(folder), **own) as plane:
            if state is not None:
                plane.load_state_dict(state if comm.rank == 0 else None)
            batches = iter(plane)
            while plane.next_step < until:
                batch = next(batches)
                # In two micro-batches.
                for rows in (slice(0, 1), slice(1, None)):
                    losses = loss_of(batch, scale)[rows, tokens or slice(None)]
                    plane.record(batch, losses, rows=rows, tokens=tokens)
            return plane.state_dict()

    return rank(Local()) if num_ranks == 1 else run_ranks(num_ranks, rank)[0]


def worst(folder: Path, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the records of `trace --worst`, without ranks, digests and attempts."""
    capsys.readouterr()
    assert main(["trace", str(folder), "--json", *words]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [{key: value for key, value in record.items() if key not in ("rank", "digest")} for record in records]


def expected_order(config: Config, steps: range, scale: float = 1.0) -> list[tuple[int, int, int]]:
    """Return (step, position, domain) by falling loss, from the batches of an undisturbed run."""
    entries = []
    with DataPlane.open(config, Local()) as plane:
        for batch in plane:
            if batch.step == steps.stop:
                break
            # In float64 from the float32 losses; a loss that is not finite comes first.
            losses = np.where(batch.loss_mask, loss_of(batch, scale), 0).astype(np.float64).sum(1)
            means = np.float32(np.where(np.isfinite(losses), losses / batch.loss_mask.sum(1), np.inf))
            if batch.step in steps:
                domains = batch.domain_ids.tolist()
                entries += [(-float(m), batch.step, p, d) for p, (m, d) in enumerate(zip(means, domains, strict=True))]
    return [(step, position, domain) for _, step, position, domain in sorted(entries)]


def places(records: Sequence[dict[str, Any]]) -> list[tuple[int, int, int]]:
    return [(record["step"], record["position"], record["domain_id"]) for record in records]


@pytest.fixture(scope="module")
def config(collection: list[str]) -> Config:
    return compose([*collection, *WORDS, KEEP])


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loss_log") / "run"
    train(config, folder, 2)
    return folder


@pytest.mark.parametrize(
    ("num_ranks", "layout", "files"),
    [(1, {}, 1), (4, {}, 4), (4, "peers", 4), (4, {"loss_parts": ("cp",), "data_dims": ("dp",)}, 2)],
    ids=["alone", "four", "copies", "parts"],
)
def test_the_worst_sequences_do_not_depend_on_the_ranks(
    num_ranks: int,
    layout: Any,
    files: int,
    config: Config,
    run: Path,
    collection: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = worst(run, ["--worst", "9"], capsys)
    assert places(expected) == expected_order(config, range(STEPS))[:9]
    if layout == "peers":
        train(compose([*collection, *WORDS, KEEP, "dataplane.model_parallel_size=2"]), tmp_path / "r", num_ranks)
    else:
        train(config, tmp_path / "r", num_ranks, **layout)
    assert worst(tmp_path / "r", ["--worst", "9"], capsys) == expected
    everything = worst(tmp_path / "r", ["--worst", "1000"], capsys)
    assert len(everything) == len({(record["step"], record["position"]) for record in everything}) == 8 * STEPS
    assert len(RunFolder(tmp_path / "r").ranks_with_losses(1)) == files


def test_filters_restrict_the_sequences(config: Config, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = expected_order(config, range(1, 5))
    assert places(worst(run, ["--worst", "3", "--steps", "1..4"], capsys)) == order[:3]
    assert places(worst(run, ["--worst", "2", "--step", "3"], capsys)) == expected_order(config, range(3, 4))[:2]
    for domain in sorted({domain for _, _, domain in order}):
        own = [entry for entry in order if entry[2] == domain]
        words = ["--worst", "5", "--steps", "1..4", "--domain", str(domain)]
        assert places(worst(run, words, capsys)) == own[:5]
    everything = worst(run, ["--worst", "1000", "--steps", "1..4"], capsys)
    shards = sorted({segment[0] for record in everything for segment in record["segments"]})
    assert len(shards) > 1
    for shard in shards[:2]:
        of_shard = [record for record in everything if shard in {segment[0] for segment in record["segments"]}]
        assert worst(run, ["--worst", "5", "--steps", "1..4", "--shard", shard], capsys) == of_shard[:5]
    second = [entry for entry in order if entry[1] >= 4]
    assert places(worst(run, ["--worst", "5", "--steps", "1..4", "--rank", "1"], capsys)) == second[:5]


def test_a_resume_replaces_the_losses_of_the_steps_that_it_serves_again(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = train(config, tmp_path / "r", 2, until=3)
    train(config, tmp_path / "r", 4, state=state)
    # The losses of steps 3 to 5 are a tenth now, on another number of ranks.
    train(config, tmp_path / "r", 1, state=state, scale=0.1)
    records = worst(tmp_path / "r", ["--worst", "1000"], capsys)
    assert len(records) == 8 * STEPS
    assert places(records[:1]) == [(3, 5, records[0]["domain_id"])] and records[0]["loss"] is None
    # All losses of steps 0 to 2 are higher than the new ones.
    assert {record["step"] for record in records[1:25]} == {0, 1, 2}
    order = expected_order(config, range(3, 6), 0.1)
    assert places(worst(tmp_path / "r", ["--worst", "9", "--steps", "3..5"], capsys)) == order[:9]


def test_an_attempt_that_is_opened_again_keeps_its_last_losses(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "r", 2, attempt=1)
    train(config, tmp_path / "r", 1, attempt=1, scale=0.1)
    order = expected_order(config, range(STEPS), 0.1)
    assert places(worst(tmp_path / "r", ["--worst", "1000"], capsys)) == order


def test_texts_are_shown_and_documents_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = worst(run, ["--worst", "4", "--show", "--write", str(tmp_path / "d.jsonl")], capsys)
    assert all(len(record["texts"]) == len(record["segments"]) for record in records)
    documents = {(shard, row) for record in records for shard, row, _, _ in record["segments"]}
    lines = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert len(lines) == len(documents)
    assert {(line["shard"], line["row"]) for line in lines} == documents

    assert main(["trace", str(run), "--worst", "2", "--show"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"2 of {8 * STEPS} sequences with a recorded loss, in {STEPS} steps\n")
    assert out.splitlines()[1].startswith("step 3 position 5 rank 1: ")
    assert ", loss not finite\n" in out and f", loss {records[1]['loss']:.4f}\n" in out and "\n    | " in out


def test_samples_and_padding(collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mixture.unit=samples", "mixture.on_exhausted=redistribute", "mixture.max_epochs=1"]
    config = compose(
        [
            *collection,
            *words,
            "dataplane.global_batch_size=21",
            "dataplane.last_batch=pad",
            "dataplane.chunk_steps=2",
            KEEP,
        ]
    )
    for num_ranks in (1, 3):

        def rank(comm: Any, folder: Path = tmp_path / str(num_ranks)) -> int:
            with DataPlane.open(config, comm, RunFolder(folder)) as plane:
                num_samples = 0
                for batch in plane:
                    texts = [payload and payload["text"] for payload in batch.payloads or []]
                    losses = np.array([np.nan if text is None else len(text) / 64 for text in texts])
                    # Sums over tokens; the mean is the loss again.
                    plane.record(batch, losses * 4, num_tokens=np.full(len(texts), 4))
                    num_samples += int((~batch.is_padding).sum())
                return num_samples

        totals = [rank(Local())] if num_ranks == 1 else run_ranks(num_ranks, rank)
        assert sum(totals) % 21
        records = worst(tmp_path / str(num_ranks), ["--worst", "1000", "--show"], capsys)
        assert len(records) == sum(totals)
        sizes = [len(record["sample"]["text"]) for record in records]
        assert sizes == sorted(sizes, reverse=True)
        assert [record["loss"] for record in records] == pytest.approx([size / 64 for size in sizes], rel=1e-6)


def test_a_log_that_was_cut_short_loses_its_last_step_only(tmp_path: Path) -> None:
    path = tmp_path / "losses" / "rank_00000.bin"
    log = LossLog(path)
    assert not path.exists()
    for step in range(3):
        log.write(step, np.arange(4, 8), np.full(4, step, np.float32))
    log.close()
    whole = path.read_bytes()
    size = len(whole) // 3
    assert size == 20 + 4 * 4
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert [losses.step for losses in read_losses(path)] == list(range(length // size))

        # The next writer continues after the last whole record.
        log = LossLog(path)
        log.write(7, np.arange(2), np.zeros(2, np.float32))
        log.close()
        assert [losses.step for losses in read_losses(path)] == [*range(length // size), 7]


@pytest.mark.parametrize("count", [-1, 0, 3, 5, 1000, (1 << 31) - 1])
def test_a_damaged_length_is_not_taken_for_the_end_of_a_log(count: int, tmp_path: Path) -> None:
    """The next writer would cut off all records behind it."""
    path = tmp_path / "rank_00000.bin"
    log = LossLog(path)
    for step in range(5):
        log.write(step, np.arange(4), np.full(4, step, np.float32))
    log.close()
    whole = path.read_bytes()
    for record in range(4):
        place = record * 36 + 12
        path.write_bytes(whole[:place] + count.to_bytes(4, "little", signed=True) + whole[place + 4 :])
        with pytest.raises(DataError, match=f"is damaged at byte {record * 36}"):
            list(read_losses(path))
        with pytest.raises(DataError, match="is damaged"):
            LossLog(path).write(7, np.arange(2), np.zeros(2, np.float32))
        assert path.stat().st_size == len(whole)


def test_a_killed_rank_and_a_damaged_log_are_reported(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "r", 2)
    path = RunFolder(tmp_path / "r").losses_of_rank(1, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    capsys.readouterr()
    assert main(["trace", str(tmp_path / "r"), "--worst", "1000", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 8 * STEPS - 4
    assert "Not all losses were recorded in 1 of these steps, the first of which is step 5" in captured.err

    path.write_bytes(whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    assert main(["trace", str(tmp_path / "r"), "--worst", "1"]) == 2
    assert "rank_00001.bin is damaged at byte 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worst", "0"], "--worst is 0, but must be at least 1"),
        (["--worst", "-3"], "--worst is -3, but must be at least 1"),
        (["--worst", "1", "--steps", "4..6"], "Step 6 has not been served"),
        (["--worst", "1", "--domain", "nothing"], "'nothing' is not a domain of this run"),
        (["--worst", "1", "--rank", "2"], "--rank is 2, but these steps were served to 2 ranks"),
        (["--worst", "1", "--verify"], "remove --verify, --diff"),
        (["--worst", "1", "--shard", "nothing.jsonl"], "The index has no shard 'nothing.jsonl'"),
        (["--worst", "1", "--shard", "a.jsonl", "--row", "1"], "remove --verify, --diff, --row"),
        (["--worst", "1", "--step", "1", "--export", "b.npz"], "--export"),
        (["--write", "d.jsonl", "--step", "1"], "--write needs --worst N"),
        (["--worst", "1", "--write", "no/folder/d.jsonl"], "cannot be written: No such file"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_runs_and_steps_without_losses_are_refused(
    config: Config, collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = compose([*collection, *WORDS])
    state = train(off, tmp_path / "r", 2, until=3)
    assert not RunFolder(tmp_path / "r").losses(1).exists()
    assert main(["trace", str(tmp_path / "r"), "--worst", "1"]) == 2
    error = capsys.readouterr().err
    assert "r has recorded no losses." in error and "Train with dataplane.record_losses=true" in error

    # Losses are recorded from the second attempt on.
    train(config, tmp_path / "r", 2, state=state)
    assert main(["trace", str(tmp_path / "r"), "--worst", "1", "--steps", "0..2"]) == 2
    assert "has recorded losses, but none of steps 0 to 2" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "r"), "--worst", "1"]) == 0
    assert "in 3 of these steps, the first of which is step 0" in capsys.readouterr().err
