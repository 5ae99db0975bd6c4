"""Model-parallel layouts with real ranks: same batches for peers, exact statistics from halves of sequences."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane import DataPlane

PROGRAM = Path(__file__).with_name("layout_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
WORDS = ["dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "dataplane.audit=true"]
LAUNCHERS: dict[str, list[Any]] = {
    "torch": [sys.executable, PROGRAM.with_name("forked_ranks.py"), "8"],
    "mpi": [MPIEXEC, "-n", "4", sys.executable, "-m", "mpi4py"],
}
STEPS = 5


def alone(overrides: list[str]) -> tuple[list[list[str]], list[list[float]]]:
    """Return the digests and losses of every step of one rank."""
    digests = []
    with DataPlane.open(compose(overrides), Local()) as plane:
        for batch, _ in zip(plane, range(STEPS), strict=False):
            digests.append(batch.digests)
            plane.record(batch, (1.0 + (batch.tokens[:, 1:] % 97) / (3 + batch.step)).astype(np.float32))
        plane.state_dict()
        return digests, [figures.loss_sum.tolist() for figures in plane.completed_statistics()]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_layout_serves_the_same_and_counts_each_loss_once(collection: list[str], launcher: str) -> None:
    words = [*LAUNCHERS[launcher], PROGRAM, launcher, *collection, *WORDS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    digests, losses = alone([*collection, *WORDS])
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert len(ranks) == {"torch": 8, "mpi": 4}[launcher]
    for layouts in ranks:
        for name, group, answer in layouts:
            own = range(4 * group, 4 * group + 4)
            assert [positions for positions, _ in answer["served"]] == [list(own)] * STEPS, name
            assert [served for _, served in answer["served"]] == [[step[i] for i in own] for step in digests], name
            assert answer["losses"] == losses, name
