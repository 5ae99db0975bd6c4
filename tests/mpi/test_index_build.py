"""An index built by many ranks equals the one built by a single rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.tokens.bpe_training import train_bpe

MPIEXEC = Path(sys.executable).with_name("mpiexec")
VERB = [sys.executable, "-m", "mpi4py", "-m", "mixtera_hpc", "index", "build", "--json"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(7):
        rows = [{"text": f"text {j} " * (j % 9), "c": f"v{(i * j) % 5}", "n": i * j} for j in range(40 * i + 1)]
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train_bpe(["text 1 2 3 4 5"] * 9, 265, folder / "tokenizer.json")
    return folder


def build(root: Path, index: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    settings = [
        f"data.root={root}",
        f"index.path={index}",
        f"dataplane.tokenizer={root / 'tokenizer.json'}",
        "+data.properties={c:c,n:{path:n,kind:number}}",
    ]
    command = [MPIEXEC, "-n", str(ranks), *VERB, *settings, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=index.parent, env=dict(os.environ))


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    index = tmp_path_factory.mktemp("alone") / "index.h5"
    done = build(root, index, 1)
    assert done.returncode == 0, done.stderr
    return index.read_bytes()


@pytest.mark.parametrize(
    "ranks", [2, pytest.param(4, marks=pytest.mark.full), 5, pytest.param(8, marks=pytest.mark.full)]
)
def test_any_number_of_ranks_writes_the_same_bytes(ranks: int, root: Path, alone: bytes, tmp_path: Path) -> None:
    done = build(root, tmp_path / "index.h5", ranks)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == sum(40 * i + 1 for i in range(7)), "one rank reports, once"
    assert (tmp_path / "index.h5").read_bytes() == alone
    assert [p.name for p in tmp_path.iterdir()] == ["index.h5"]


def test_a_bad_row_on_any_rank_ends_all_of_them_and_is_named(root: Path, tmp_path: Path) -> None:
    (root / "bad.jsonl").write_text('{"text": "fine"}\noops\n')
    try:
        done = build(root, tmp_path / "index.h5", 3)
        assert done.returncode != 0
        assert "bad.jsonl' row=1: " in done.stderr and not (tmp_path / "index.h5").exists()
        continued = build(root, tmp_path / "index.h5", 2, "data.exclude=[bad.jsonl]")
        assert continued.returncode == 0, continued.stderr
    finally:
        (root / "bad.jsonl").unlink()
