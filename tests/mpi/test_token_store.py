"""A token store that many ranks write equals the one of a single rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.writers import write_compressed
from mixtera_hpc.tokens.bpe_training import train_bpe

MPIEXEC = Path(sys.executable).with_name("mpiexec")
VERB = [sys.executable, "-m", "mpi4py", "-m", "mixtera_hpc", "tokenize", "--json"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    for i in range(9):
        rows = [{"text": f"text {j} " * (j % 9), "c": f"v{(i * j) % 5}"} for j in range(40 * i + 1)]
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = train_bpe(["text 1 2 3 4 5"] * 9, 265, folder / "tokenizer/tokenizer.json")
    overrides = [
        f"data.root={folder}",
        "data.include=['*.jsonl']",
        f"index.path={folder / 'i.h5'}",
        "data.properties.c=c",
        f"dataplane.tokenizer={tokenizer}",
    ]
    build_index(compose(overrides))
    return overrides


def tokenize(overrides: list[str], ranks: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(MPIEXEC), "-n", str(ranks), *VERB, *overrides, f"data.tokens={folder}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_any_number_of_ranks_writes_the_same_bytes(overrides: list[str], tmp_path: Path) -> None:
    for ranks in (1, 3):
        done = tokenize(overrides, ranks, tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["units_written"] == 9
    starts = next((tmp_path / "1").glob("starts-*.bin")).name
    for name in ("tokens.bin", starts, "store.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert (tmp_path / "3/tokens.bin").stat().st_size > 1000


def test_wrong_input_ends_all_ranks_with_exit_code_2(overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("of somebody")
    done = tokenize(overrides, 2, tmp_path / "taken")
    assert done.returncode == 2, done.stderr
    assert "is not empty and holds no token store" in done.stderr


@pytest.mark.parametrize(
    ("words", "store", "pattern"),
    [(["data.materialize=always"], "tokens", "tokens.bin"), (["mixture.unit=samples"], "rows", "places-*.bin")],
)
def test_many_ranks_build_an_index_with_its_store(
    words: list[str], store: str, pattern: str, overrides: list[str], tmp_path: Path
) -> None:
    root = Path(next(word for word in overrides if word.startswith("data.root=")).removeprefix("data.root="))
    for number in range(4):
        (root / str(number)).mkdir(exist_ok=True)
        write_compressed(root / str(number), [{"text": f"t {i}", "c": f"v{i % 3}"} for i in range(50)], ending="zst")
    sizes = set()
    for ranks in (1, 3):
        index = tmp_path / f"{ranks}.h5"
        command = [sys.executable, "-m", "mpi4py", "-m", "mixtera_hpc", "index", "build", "--json"]
        own = [*overrides, "data.include=['**/*.jsonl','**/*.zst']", f"index.path={index}", *words]
        done = subprocess.run(
            [str(MPIEXEC), "-n", str(ranks), *command, *own], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        (file,) = Path(f"{index}.{store}").glob(pattern)
        sizes.add(file.stat().st_size)
        if store == "tokens":
            assert file.read_bytes() == (tmp_path / "1.h5.tokens/tokens.bin").read_bytes()
    assert len(sizes) == 1
