"""A checkpoint is complete or not there."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtera_hpc.errors import DataError
from mixtera_hpc.training.checkpoint import Checkpoint, load_newest_checkpoint, write_checkpoint


def checkpoint(step: int) -> Checkpoint:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, step)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"json": {"next_step": step}, "arrays": {"plan": np.arange(step), "mixer/weights": np.array([0.25, 0.75])}}
    return Checkpoint(
        step=step,
        model_settings={"training.num_layers": 1},
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        dataplane=state,
    )


def write(folder: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        write_checkpoint(folder, checkpoint(step), keep)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def newest(folder: Path) -> int:
    found = load_newest_checkpoint(folder)
    assert found is not None
    return found.step


def test_what_is_loaded_is_what_was_written(tmp_path: Path) -> None:
    written = checkpoint(7)
    write_checkpoint(tmp_path, written, keep=1)
    found = load_newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.model_settings) == (7, {"training.num_layers": 1})
    assert torch.equal(found.model["weight"], written.model["weight"])
    assert torch.equal(found.optimizer["state"][0]["exp_avg"], written.optimizer["state"][0]["exp_avg"])
    assert found.optimizer["param_groups"] == written.optimizer["param_groups"]
    assert found.dataplane["json"] == {"next_step": 7}
    assert found.dataplane["arrays"]["plan"].tolist() == list(range(7))
    assert found.dataplane["arrays"]["mixer/weights"].tolist() == [0.25, 0.75]


def test_with_no_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "checkpoints") is None


def test_with_only_broken_checkpoints_a_run_does_not_begin_again(tmp_path: Path) -> None:
    write(tmp_path, 5, 10)
    cut(tmp_path / "step_00000010" / "model.pt")
    forget_version(tmp_path / "step_00000005" / "training.json")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(
            DataError, match=r"(?s)No checkpoint in .* can be used:.* its version is 0.* move that folder away"
        ),
    ):
        load_newest_checkpoint(tmp_path)


def test_latest_holds_the_name_of_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 5, 10)
    assert (tmp_path / "LATEST").read_text() == "step_00000010\n"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 5, 10, 15, keep=2)
    assert names(tmp_path) == ["LATEST", "step_00000010", "step_00000015"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, 5, 5, keep=1)
    assert newest(tmp_path) == 5
    assert names(tmp_path) == ["LATEST", "step_00000005"]


def test_what_a_killed_save_left_behind_is_ignored_and_then_removed(tmp_path: Path) -> None:
    write(tmp_path, 5)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / ".step_00000010.partial")
    (tmp_path / ".step_00000010.partial" / "model.pt").write_bytes(b"half")
    assert newest(tmp_path) == 5
    write(tmp_path, 12)
    assert names(tmp_path) == ["LATEST", "step_00000005", "step_00000012"]


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forget_version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 0}))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.pt", cut, "model.pt has .* bytes, expected"),
        ("optimizer.pt", flip, "the checksum of optimizer.pt does not match"),
        ("dataplane.npz", Path.unlink, "dataplane.npz is missing"),
        ("dataplane.json", cut, "dataplane.json has .* bytes"),
        ("training.json", Path.unlink, "training.json cannot be read"),
        ("training.json", cut, "training.json cannot be read"),
        ("training.json", forget_version, "its version is 0"),
    ],
)
def test_a_broken_checkpoint_is_skipped_and_named(
    tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path, 5, 10)
    damage(tmp_path / "step_00000010" / name)
    with pytest.warns(UserWarning, match=rf"step_00000010 is skipped: .*{reason}"):
        assert newest(tmp_path) == 5


def test_saving_after_a_broken_one_was_skipped_keeps_what_was_just_saved(tmp_path: Path) -> None:
    write(tmp_path, 5, 20, keep=1)
    flip(tmp_path / "step_00000020" / "model.pt")
    write(tmp_path, 10, keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest(tmp_path) == 10


def test_code_hidden_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return (exec, ("raise SystemExit('boom')",))

    bomb = {"json": {}, "arrays": {"plan": np.array([Bomb()], dtype=object)}}
    write_checkpoint(tmp_path, Checkpoint(step=1, model_settings={}, model={}, optimizer={}, dataplane=bomb), keep=1)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_newest_checkpoint(tmp_path)
