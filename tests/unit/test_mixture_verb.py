"""`mixtera-hpc mixture` beside a run: what it accepts and what it refuses at once."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.launch.prepare import prepare_run


def run_of(collection: list[str], root: Path, *, killed: bool) -> RunFolder:
    """A run of eight steps in chunks of two, which is not going on."""
    words = [*collection, "dataplane.global_batch_size=4", "dataplane.seq_len=16", "dataplane.chunk_steps=2"]
    config = compose([*words, f"run.root={root}"])
    folder = prepare_run(config, words, datetime.now(UTC))
    plane = DataPlane.open(config, comm=Local(), folder=folder)
    while plane.next_step < 8:
        next(iter(plane))
    plane.close(orderly=not killed)
    return folder


@pytest.mark.parametrize(("killed", "code"), [(False, 2), (True, 0)])
def test_a_chunk_is_planned_for_good_when_an_attempt_ends_in_order(
    collection: list[str], tmp_path: Path, killed: bool, code: int
) -> None:
    """One that was killed goes on from a checkpoint, and plans chunks anew that it had planned before."""
    folder = run_of(collection, tmp_path / "runs", killed=killed)
    (tmp_path / "wish.yaml").write_text("temperature: 2.0\n")
    assert main(["mixture", str(folder.path), "--set", str(tmp_path / "wish.yaml"), "--at-chunk", "2"]) == code
    assert (folder.control / "mixture.json").exists() == killed
