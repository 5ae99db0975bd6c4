"""Writing and loading checkpoints: each is complete or absent, and damaged ones are skipped."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane_state import pack_state, unpack_state
from mixtera_hpc.errors import DataError
from mixtera_hpc.training.checkpoint import Checkpoint, load_newest_checkpoint, write_checkpoint


def checkpoint(step: int) -> Checkpoint:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, step)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = pack_state({"next_step": step}, {"plan": np.arange(step), "mixer/weights": np.array([0.25, 0.75])})
    return Checkpoint(
        step=step,
        model_settings={"training.num_layers": 1},
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        dataplane=state,
    )


def write(run: RunFolder, *steps: int, keep: int = 10) -> None:
    for step in steps:
        write_checkpoint(run, checkpoint(step), keep)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def newest(run: RunFolder) -> int:
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint.step


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.mark.slow
def test_a_loaded_checkpoint_equals_the_written_one(run: RunFolder) -> None:
    written = checkpoint(7)
    write_checkpoint(run, written, keep=1)
    loaded = load_newest_checkpoint(run)
    assert loaded is not None
    assert (loaded.step, loaded.model_settings) == (7, {"training.num_layers": 1})
    assert torch.equal(loaded.model["weight"], written.model["weight"])
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], written.optimizer["state"][0]["exp_avg"])
    assert loaded.optimizer["param_groups"] == written.optimizer["param_groups"]
    facts, arrays = unpack_state(loaded.dataplane)
    assert facts == {"next_step": 7}
    assert arrays["plan"].tolist() == list(range(7))
    assert arrays["mixer/weights"].tolist() == [0.25, 0.75]


def test_a_folder_without_checkpoints_loads_none(run: RunFolder) -> None:
    assert load_newest_checkpoint(run) is None


def test_a_run_with_only_damaged_checkpoints_is_refused(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    write(run, 5, 10)
    truncate(run.checkpoints / "step_00000010" / "model.pt")
    reset_version(run.checkpoints / "step_00000005" / "training.json")
    message = r"(?s)No checkpoint in .* can be used:.* its version is 0.* move that folder away"
    with pytest.raises(DataError, match=message):
        load_newest_checkpoint(run)
    assert "is skipped" in caplog.text


def test_latest_contains_the_name_of_the_newest_checkpoint(run: RunFolder) -> None:
    write(run, 5, 10)
    assert run.latest_checkpoint.read_text() == "step_00000010\n"


def test_only_the_newest_checkpoints_are_kept(run: RunFolder) -> None:
    write(run, 5, 10, 15, keep=2)
    assert names(run) == ["LATEST", "step_00000010", "step_00000015"]


def test_a_second_checkpoint_of_a_step_replaces_the_first(run: RunFolder) -> None:
    write(run, 5, 5, keep=1)
    assert newest(run) == 5
    assert names(run) == ["LATEST", "step_00000005"]


def test_the_files_of_a_killed_save_are_ignored_and_later_removed(run: RunFolder) -> None:
    write(run, 5)
    shutil.copytree(run.checkpoints / "step_00000005", run.checkpoints / ".step_00000010.partial")
    (run.checkpoints / ".step_00000010.partial" / "model.pt").write_bytes(b"half")
    assert newest(run) == 5
    write(run, 12)
    assert names(run) == ["LATEST", "step_00000005", "step_00000012"]


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def reset_version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.pt", truncate, "model.pt has .* bytes, expected"),
        ("optimizer.pt", flip_one_bit, "the checksum of optimizer.pt does not match"),
        ("dataplane.npz", Path.unlink, "dataplane.npz is missing"),
        ("dataplane.npz", truncate, "dataplane.npz has .* bytes"),
        ("training.json", Path.unlink, "training.json cannot be read"),
        ("training.json", truncate, "training.json cannot be read"),
        ("training.json", reset_version, "its version is 0"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    run: RunFolder, name: str, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(run, 5, 10)
    damage(run.checkpoints / "step_00000010" / name)
    assert newest(run) == 5
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"step_00000010 is skipped: .*{reason}", record.message)


def test_saving_removes_a_damaged_checkpoint_of_a_later_step(run: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    write(run, 5, 20, keep=1)
    flip_one_bit(run.checkpoints / "step_00000020" / "model.pt")
    write(run, 10, keep=1)
    assert newest(run) == 10
    assert caplog.records == []


def test_pickled_code_in_a_checkpoint_is_not_executed(run: RunFolder) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return (exec, ("raise SystemExit('boom')",))

    bomb = pack_state({}, {"plan": np.array([Bomb()], dtype=object)})
    write_checkpoint(run, Checkpoint(step=1, model_settings={}, model={}, optimizer={}, dataplane=bomb), keep=1)
    with pytest.raises(DataError, match="allow_pickle"):
        load_newest_checkpoint(run)
