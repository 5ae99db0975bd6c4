"""Imports and file accesses of a rank before its first step: at a thousand ranks, each file access counts."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HEAVY_MODULES = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "sympy",
    "transformers",
    "lightning",
    "pandas",
    "matplotlib",
    "tensorboard",
    "wandb",
)
"""Modules that a run of the reference trainer does not need."""

OTHER_RANKS_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "journal.jsonl"}
"""Files that ranks other than 0 open or look for."""

RUN_AND_LIST_MODULES = """
import sys
from mixtera_hpc.cli.main import main
try:
    main(["run", *sys.argv[1:]])
except SystemExit as error:
    assert not error.code, error.code
print("modules:", " ".join(sys.modules))
"""

OPEN_ON_THREE_RANKS = """
import os
import sys
from pathlib import Path
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.testing.thread_ranks import run_ranks

folder = RunFolder(Path(sys.argv[1]))
config = compose(sys.argv[2:])

def open_plane(comm):
    os.path.exists(f"/begin/{comm.rank}")
    plane = DataPlane.open(config, comm=comm, folder=folder)
    os.path.exists(f"/end/{comm.rank}")
    plane.close()

run_ranks(3, open_plane)
"""

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=6"]


def test_the_reference_trainer_imports_no_compiler_and_no_sharding(collection: list[str], tmp_path: Path) -> None:
    overrides = [*collection, *SMALL, "training.num_steps=2", f"run.root={tmp_path}"]
    result = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST_MODULES, *overrides], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    modules = set(result.stdout.rpartition("modules:")[2].split())
    assert "torch" in modules
    assert not modules.intersection(HEAVY_MODULES)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed: file accesses are not counted")
def test_opening_a_data_plane_touches_few_files(collection: list[str], tmp_path: Path) -> None:
    """Rank 0 reads the index and records the attempt. The others read the tokenizer and nothing else."""
    log = tmp_path / "calls.log"
    program = [sys.executable, "-c", OPEN_ON_THREE_RANKS, str(tmp_path / "run"), *collection, *SMALL]
    subprocess.run(["strace", "-f", "-e", "trace=%file", "-o", str(log), *program], check=True)

    # The file accesses of each rank's thread between its two markers, below the folders of the data and the run.
    data_folder = collection[0].removeprefix("data.root=").removesuffix("/data")
    rank_of_thread: dict[str, int] = {}
    paths = defaultdict(list)
    for line in log.read_text().splitlines():
        call = re.match(r'(\d+) +(\w+)\(.*?"(/[^"]*)"', line)
        if call is None:
            continue
        thread, _, path = call.groups()
        if path.startswith("/begin/"):
            rank_of_thread[thread] = int(path.removeprefix("/begin/"))
        elif path.startswith("/end/"):
            del rank_of_thread[thread]
        elif thread in rank_of_thread and path.startswith((data_folder, str(tmp_path))):
            paths[rank_of_thread[thread]].append(path)

    assert 0 < len(paths[0]) <= 40
    for rank in (1, 2):
        assert len(paths[rank]) <= 7, paths[rank]
        assert {Path(path).name for path in paths[rank]} <= OTHER_RANKS_FILES
