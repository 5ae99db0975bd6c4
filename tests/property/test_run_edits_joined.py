"""Run edits of a run over several indexes, one of which is refreshed between two attempts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.recording.run_history import History
from mixtera_hpc.dataplane.resume.edit_checks import check_and_record_edit
from mixtera_hpc.dataplane.resume.run_edits import subset_of_run
from mixtera_hpc.dataplane.resume.run_identity import pin_to_run
from mixtera_hpc.errors import LaunchError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.trace.locate import locate_row
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run


def write_shard(path: Path, rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{path.name} {i}", "meta": {"kind": "ab"[i % 2]}}) for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")


def one_index(root: Path, name: str) -> list[str]:
    properties = "data.properties={kind: {kind: category, path: meta.kind}}"
    return [f"data.root={root / name}", f"index.path={root}/{name}.h5", "mixture.unit=samples", properties]


@pytest.fixture
def joined(tmp_path: Path) -> Config:
    """Two indexes, `prose` over 40 samples and `code` over 24."""
    for name, rows in (("prose", 40), ("code", 24)):
        write_shard(tmp_path / name / "a.jsonl", rows)
        build_index(compose(one_index(tmp_path, name)))
    paths = f"index.paths=[{tmp_path}/prose.h5,{tmp_path}/code.h5]"
    words = ["mixture.unit=samples", "mixture.group_by=[dataset]", "dataplane.global_batch_size=4"]
    return compose([paths, *words, "dataplane.audit=true", "dataplane.chunk_steps=3", "training.num_steps=30"])


def serve(config: Config, folder: RunFolder, attempt: int, until: int, state: Any = None) -> Any:
    """Serve up to step `until` as the trainer does: with the index generations that the run began with."""
    pinned = pin_to_run(config, folder.journal)
    with DataPlane.open(pinned, Local(), folder, attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        while plane.next_step < until:
            next(iter(plane))
        return plane.state_dict()


def test_edits_and_a_refresh_of_one_index_leave_a_run_that_is_proven(joined: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = serve(joined, folder, 1, 10)
    write_shard(tmp_path / "code" / "b.jsonl", 12)
    refresh_index(compose(one_index(tmp_path, "code")))

    changed = replace(joined, dataplane=replace(joined.dataplane, seed=5, global_batch_size=6))
    check_and_record_edit(folder, joined, changed, skip_steps=(12, 13), drop=["kind == 'b' and dataset == 'code'"])
    # The state is newer than the checkpoint that the edit assumes (there is none), so the run starts again.
    assert subset_of_run(folder).drop == ("kind == 'b' and dataset == 'code'",)
    serve(changed, folder, 2, 25)
    assert state is not None

    run = ServedRun(folder, changed)
    result = verify_run(run)
    assert (result.num_steps, result.num_sequences) == (25, 25 * 6)
    new_shard = str(tmp_path / "code" / "b.jsonl")
    shards = {path for attempt, _ in run.history.extents() for path in run.source_of(attempt).index.shard_paths}
    assert new_shard not in shards
    assert list(locate_row(run, str(tmp_path / "code" / "a.jsonl"), 1)) == []
    assert list(locate_row(run, str(tmp_path / "code" / "a.jsonl"), 0))


def test_an_edit_continues_from_a_checkpoint_over_several_indexes(joined: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    state = serve(joined, folder, 1, 10)
    checkpoint = folder.checkpoints / "step_00000010"
    checkpoint.mkdir(parents=True)
    state["plane"].tofile(checkpoint / "dataplane.npz")
    write_shard(tmp_path / "prose" / "b.jsonl", 12)
    refresh_index(compose(one_index(tmp_path, "prose")))

    check_and_record_edit(folder, joined, joined, drop=["kind == 'a'"])
    serve(joined, folder, 2, 25, state)
    history = History(folder.journal)
    assert [attempt.first_step for attempt, _ in history.extents()] == [0, 10]
    assert verify_run(ServedRun(folder, joined)).num_steps == 25


def test_a_drop_that_matches_nothing_is_refused_and_not_recorded(joined: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    serve(joined, folder, 1, 4)
    with pytest.raises(LaunchError, match="matches none of the samples"):
        check_and_record_edit(folder, joined, joined, drop=["kind == 'a' and kind == 'b'"])
    assert not folder.decisions.exists()
