"""`torch.distributed.checkpoint` stores and restores a data plane, with 1 rank and with 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("dcp_program.py")
MPIEXEC = Path(sys.executable).with_name("mpiexec")
WORDS = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=3", "dataplane.audit=true"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_distributed_checkpoint_resumes_at_the_saved_step(collection: list[str], tmp_path: Path, ranks: int) -> None:
    words = [sys.executable, "-m", "mpi4py", PROGRAM, tmp_path, *collection, *WORDS]
    done = subprocess.run([MPIEXEC, "-n", str(ranks), *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"resumed_at": 5, "same": [True] * ranks}
