"""Lanes that are not set follow from the largest global batch and the data; a run keeps the number that it began with.

Recorded numbers are made by configurations that set them, as an earlier release with another default did.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Communicator, Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading import lane_count
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError, DataError, LaunchError
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.launch.resume import NO_EDITS, ResumeRequest, amended_config
from mixtera_hpc.launch.sweep.sweep_plan import _fingerprint, plan_sweep
from mixtera_hpc.swarm.swarm_folder import SwarmFolder, SwarmRecord
from mixtera_hpc.swarm.swarm_runs import SwarmRuns
from mixtera_hpc.swarm.swarm_sample import sample_swarm
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.served_run import ServedRun

LARGE_BATCH = "dataplane.global_batch_size=8192"
SHARDS = 40
TYPED = ["data.root=/data", "mixture.unit=samples", "run.name=trial"]
RECORDED = 5
"""No default: a run that has it got it from its records."""


@pytest.mark.parametrize(
    ("more", "lanes"),
    [
        ("dataplane.global_batch_size=1", 16),
        ("dataplane.global_batch_size=64", 16),
        ("dataplane.global_batch_size=1023", 16),
        ("dataplane.global_batch_size=1024", 32),
        ("dataplane.global_batch_size=8192", 256),
        ("dataplane.global_batch_size=12000", 256),
        ("dataplane.global_batch_size=100000", 1024),
        ("dataplane.global_batch_size=64 dataplane.batch_schedule=[{start:9,size:2048},{start:12,size:128}]", 64),
        ("dataplane.global_batch_size=8192 dataplane.lanes=3", 3),
        # Without windows there are no lanes.
        ("dataplane.global_batch_size=8192 dataplane.shuffle=sequence", 16),
    ],
)
def test_the_largest_global_batch_decides(collection: list[str], more: str, lanes: int) -> None:
    config = compose([*collection, *more.split(), "dataplane.seq_len=16", "dataplane.chunk_steps=1"])
    source = open_source(config, Local())

    assert source.identity()["lanes"] == lanes
    assert source.config.dataplane.lanes == lanes
    if config.dataplane.shuffle == "window":
        assert source.lanes.lanes == lanes


@pytest.mark.parametrize(("num_blocks", "lanes"), [(20, 16), (32, 32), (39, 32), (SHARDS, 256)])
def test_windows_of_compressed_data_fit_into_the_memory_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int, lanes: int
) -> None:
    """Two domains share all blocks, so one window of each lane has the rows of a block. All blocks may fit."""
    words = [*compressed(tmp_path, "never"), LARGE_BATCH]
    source = open_source(compose([*words, "dataplane.lanes=1"]), Local())
    block_bytes = float((source.blocks.length * source.layout.expansion[source.blocks.shard]).mean())
    monkeypatch.setattr(lane_count, "MAX_WINDOW_BYTES", num_blocks * block_bytes + 1)
    assert open_source(compose(words), Local()).lanes.lanes == lanes


def test_plan_says_why_compressed_data_have_fewer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*compressed(tmp_path, "never"), LARGE_BATCH]
    monkeypatch.setattr(lane_count, "MAX_WINDOW_BYTES", 1)
    assert main(["plan", *words, "plan.steps=1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Lanes: 16, the default for global batches of 8,192, and not 256, because windows of compressed data" in text


def test_plan_names_domains_with_fewer_sequences_than_lanes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*compressed(tmp_path, "never"), LARGE_BATCH, "plan.steps=1"]
    assert main(["plan", *words]) == 0
    assert "fewer sequences than lanes" not in capsys.readouterr().out
    assert main(["plan", *words, "dataplane.lanes=65536"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Lanes: 65,536, from dataplane.lanes or the start of the run; the default" in text
    assert "An epoch of 2 of 2 domains has fewer sequences than lanes" in text


def test_stores_do_not_change_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compose([*compressed(tmp_path, "never"), LARGE_BATCH])
    stored = compose([*compressed(tmp_path, "always"), LARGE_BATCH])
    monkeypatch.setattr(lane_count, "MAX_WINDOW_BYTES", 1)

    assert open_source(stored, Local()).index.row_stores
    assert not open_source(plain, Local()).index.row_stores
    assert [open_source(config, Local()).lanes.lanes for config in (plain, stored)] == [16, 16]


def compressed(folder: Path, materialize: str) -> list[str]:
    """Return the overrides of an index over compressed files of one block each, in which two domains alternate."""
    data_folder = folder / "data"
    if not data_folder.exists():
        data_folder.mkdir()
        rng = random.Random(0)
        for shard in range(SHARDS):
            rows = [{"text": rng.randbytes(20).hex(), "source": "ab"[row % 2]} for row in range(50)]
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (data_folder / f"{shard:02d}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    words = [
        *(f"data.root={data_folder}", f"index.path={folder / materialize}.h5", "data.properties.source=source"),
        *("mixture.unit=samples", "mixture.group_by=[source]", "dataplane.window_bytes=1", "dataplane.workers=0"),
        f"data.materialize={materialize}",
    ]
    assert main(["index", "build", *words]) == 0
    return words


SERVED = [
    *("dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "dataplane.audit=true"),
    *("training.num_steps=30", "query.holdout.fraction=0.3", "training.validate_steps=1"),
]


@pytest.fixture(scope="module")
def words(collection: list[str]) -> list[str]:
    return [*(word for word in collection if not word.startswith("mixture.group_by")), "mixture.group_by=[source]"]


def own_loop(
    words: list[str], more: list[str], steps: int, state: Any = None, folder: RunFolder | None = None, ranks: int = 1
) -> tuple[list[list[str] | None], Any]:
    """Serve some steps as a program of the user's does; return their digests of rank 0, and the state."""
    config = compose([*words, *SERVED, *more])

    def serve(comm: Communicator) -> tuple[list[list[str] | None], Any]:
        with DataPlane.open(config, comm, folder=folder) as plane:
            if state is not None:
                plane.load_state_dict(state if comm.rank == 0 else None)
            digests = [batch.digests for batch, _ in zip(plane, range(steps), strict=False)]
            return digests, plane.state_dict()

    return serve(Local()) if ranks == 1 else run_ranks(ranks, serve)[0]


def begun(words: list[str], folder: RunFolder | None = None) -> Any:
    """Return the state of a run of 5 lanes after 3 steps."""
    return own_loop(words, [f"dataplane.lanes={RECORDED}"], 3, folder=folder)[1]


@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("configured", "is_refused"),
    [([], False), ([f"dataplane.lanes={RECORDED}"], False), (["dataplane.lanes=16"], True)],
)
def test_a_program_resumes_with_the_recorded_number(
    words: list[str], tmp_path: Path, has_folder: bool, ranks: int, configured: list[str], is_refused: bool
) -> None:
    folder = RunFolder(tmp_path / "mine" / "run") if has_folder else None
    state = begun(words, folder)
    if is_refused:
        with pytest.raises(ConfigError, match=r"lanes was 5, is 16(.|\n)*Set dataplane.lanes=5"):
            own_loop(words, configured, 4, state, folder, ranks)
        return
    expected, _ = own_loop(words, [f"dataplane.lanes={RECORDED}"], 4, state, ranks=ranks)
    served, after = own_loop(words, configured, 4, state, folder, ranks)
    assert served == expected
    assert own_loop(words, configured, 2, after)[0]
    if folder is not None:
        assert main(["trace", str(folder.path), "--verify"]) == 0


def test_a_program_that_begins_again_in_its_folder_keeps_the_number(words: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine" / "run")
    begun(words, folder)
    served, _ = own_loop(words, [], 3, folder=folder)
    assert served == own_loop(words, [f"dataplane.lanes={RECORDED}"], 3)[0]
    assert served != own_loop(words, [], 3)[0]


def test_held_out_samples_have_the_number_of_the_run(words: list[str]) -> None:
    state = begun(words)

    def held_out(config: Config, is_first: bool) -> list[list[int]]:
        with DataPlane.open(config, Local()) as plane:
            if is_first:
                batches = plane.held_out()
                plane.load_state_dict(state)
            else:
                plane.load_state_dict(state)
                batches = plane.held_out()
            return [batch.tokens.tolist() for batch in batches.batches()]

    config = compose([*words, *SERVED])
    expected = held_out(compose([*words, *SERVED, f"dataplane.lanes={RECORDED}"]), True)
    assert held_out(config, False) == expected
    # They were served in another order already.
    with pytest.raises(ConfigError, match=r"Set dataplane.lanes=5. Or leave dataplane.lanes out, and load the state"):
        held_out(config, True)


def test_a_job_that_its_state_makes_too_costly_is_refused(tmp_path: Path) -> None:
    """The number of lanes of the state counts, and not that of the configuration."""
    words = [*compressed(tmp_path, "never"), "data.cache_bytes=100_000"]
    with DataPlane.open(compose([*words, f"dataplane.lanes={SHARDS}"]), Local()) as plane:
        state = plane.state_dict()
    with (
        DataPlane.open(compose([*words, "data.max_amplification=2"]), Local()) as plane,
        pytest.raises(ConfigError, match=r"more than data.max_amplification=2"),
    ):
        plane.load_state_dict(state)


@pytest.mark.parametrize(
    ("recorded", "in_journal", "override", "lanes"),
    [
        # (dataplane.lanes in config.yaml, in the journal, in the overrides of resume) → in the new config.yaml
        (None, None, None, None),
        (None, None, "null", None),
        (None, RECORDED, None, None),
        (None, RECORDED, "null", None),
        (None, RECORDED, "5", RECORDED),
        (None, RECORDED, "16", "refused"),
        (RECORDED, RECORDED, None, RECORDED),
        (RECORDED, RECORDED, "null", RECORDED),
        (RECORDED, None, "null", RECORDED),
        (RECORDED, RECORDED, "5", RECORDED),
        (RECORDED, RECORDED, "16", "refused"),
    ],
)
@pytest.mark.parametrize("changes_batch", [False, True])
def test_a_resumed_run_keeps_its_number(
    make_config: Callable[..., Config],
    recorded: int | None,
    in_journal: int | None,
    override: str | None,
    lanes: int | str | None,
    changes_batch: bool,
) -> None:
    folder = prepare_run(make_config(*([f"dataplane.lanes={recorded}"] if recorded else [])), TYPED, datetime.now(UTC))
    if in_journal:
        folder.journal.write_text(json.dumps({"kind": "start", "identity": {"lanes": in_journal}}) + "\n")
    words = [f"dataplane.lanes={override}"] if override else []
    request = NO_EDITS
    if changes_batch:
        words.append("dataplane.global_batch_size=8192")
        request = ResumeRequest(change_batch_size=True)
    if lanes == "refused":
        with pytest.raises(LaunchError, match=r"dataplane.lanes: 5 before, 16 now\n  Restore the recorded values"):
            amended_config(folder, words, request)
        return
    assert amended_config(folder, words, request).dataplane.lanes == lanes


def test_a_number_is_not_changed_by_a_flag(make_config: Callable[..., Config]) -> None:
    folder = prepare_run(make_config("dataplane.lanes=5"), TYPED, datetime.now(UTC))
    with pytest.raises(LaunchError, match=r"dataplane.lanes: 5 before, 256 now"):
        amended_config(
            folder,
            ["dataplane.lanes=256", "dataplane.global_batch_size=8192"],
            ResumeRequest(change_batch_size=True),
        )


def test_a_sweep_finds_the_runs_of_an_earlier_release(collection: list[str], tmp_path: Path) -> None:
    """Their configurations had the number 16 where none was set."""
    usual = [*collection, f"run.root={tmp_path}", "run.name=sweep", LARGE_BATCH]
    [before] = plan_sweep([*usual, "dataplane.lanes=16"]).points
    folder = prepare_run(before.config, before.overrides, datetime.now(UTC))
    before.record.add_run(before.fingerprint, folder.run_id, before.overrides)

    [again] = plan_sweep(usual).points
    assert again.folder == folder
    assert again.fingerprint == before.fingerprint
    [other] = plan_sweep([*usual, "dataplane.lanes=32"]).points
    assert other.folder is None
    # A run of its own comes first.
    new = replace(before, fingerprint=_fingerprint(again.config))
    own = prepare_run(again.config, again.overrides, datetime.now(UTC))
    new.record.add_run(new.fingerprint, own.run_id, again.overrides)
    assert plan_sweep(usual).points[0].folder == own


def test_more_proxies_of_a_swarm_have_the_number_of_those_before(collection: list[str], tmp_path: Path) -> None:
    words = [*collection, LARGE_BATCH, "query.holdout.fraction=0.3", "training.validate_every=2", "dataplane.seq_len=8"]
    words += [f"run.root={tmp_path}", "dataplane.chunk_steps=1"]
    folder = SwarmFolder(tmp_path / "swarm")

    def sampled(*more: str) -> SwarmRecord:
        return sample_swarm(folder, compose([*words, *more]), [])

    assert sampled("swarm.num_proxies=2", "dataplane.lanes=5").config.dataplane.lanes == RECORDED
    assert sampled("swarm.num_proxies=3").config.dataplane.lanes == RECORDED
    proxies = SwarmRuns.proxies(folder, folder.read())
    assert [config.dataplane.lanes for config in proxies.configs()] == [RECORDED] * 3
    with pytest.raises(DataError, match="has a swarm with another configuration"):
        sampled("swarm.num_proxies=3", "dataplane.lanes=16")


def test_every_attempt_is_traced_with_its_own_number(words: list[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "mine" / "run")
    for number in (RECORDED, 7):
        own_loop(words, [f"dataplane.lanes={number}"], 3, folder=folder)
    run = ServedRun(folder)
    assert [run.source_of(attempt).lanes.lanes for attempt in run.history.attempts] == [RECORDED, 7]
    assert main(["trace", str(folder.path), "--verify"]) == 0


def test_reading_processes_take_the_number_of_the_state(words: list[str]) -> None:
    state = begun(words)
    expected, _ = own_loop(words, [f"dataplane.lanes={RECORDED}"], 4, state)
    assert own_loop(words, ["dataplane.workers=1"], 4, state)[0] == expected
