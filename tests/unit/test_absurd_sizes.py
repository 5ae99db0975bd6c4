"""Lengths and batch sizes beyond every memory are refused wherever they can be set, before anything is recorded."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config import batch_memory
from mixtera_hpc.config.batch_memory import check_batch_memory
from mixtera_hpc.config.compose import compose, load_config
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, DataPlaneConfig
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.training import model_memory

pytestmark = pytest.mark.slow
"""Prepares many runs."""

WORDS = [
    *("dataplane.seq_len=16", "dataplane.global_batch_size=8", "dataplane.chunk_steps=1", "dataplane.workers=0"),
    *("training.num_layers=2", "training.num_heads=2", "training.embedding_dim=64", "training.device=cpu"),
]
MEMORY = 8 << 30

LENGTH = "dataplane.seq_len"
SIZE = "dataplane.global_batch_size"
STAGE = "dataplane.batch_schedule"

FAULTS = {
    "length": ([f"{LENGTH}=1000000000"], r"dataplane\.seq_len is 1000000000, expected at most 134217728"),
    "size": ([f"{SIZE}=999999", f"{LENGTH}=20000"], r"dataplane\.global_batch_size is 999999, .* 2e\+10 tokens"),
    "stage": (
        [f"{STAGE}=[{{start: 9, size: 999999}}]", f"{LENGTH}=20000"],
        r"dataplane\.batch_schedule\[0\]\.size is 999999, .* 2e\+10 tokens per step",
    ),
}
"""Sizes that no machine can hold."""

MEMORY_FAULTS = {
    "length": ([f"{LENGTH}=20000000"], r"need 10\.4 GB of memory on this node for batches, which has 8\.59 GB"),
    "size": ([f"{SIZE}=900000", f"{LENGTH}=200"], r"global_batch_size=900000 need 11\.7 GB"),
    "stage": ([f"{STAGE}=[{{start: 9, size: 900000}}]", f"{LENGTH}=200"], r"schedule\[0\]\.size=900000 need 11\.7 GB"),
    "activations": ([f"{LENGTH}=200000"], r"need at least 13\.1 GB for the activations of 8 sequences"),
}
"""Sizes that this node cannot hold."""


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batch_memory, model_memory):
        monkeypatch.setattr(module, "memory_of_node", lambda: MEMORY)


def refusal_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    return capsys.readouterr().err


def edits_of(words: list[str]) -> list[str]:
    flags = [f"--change-seq-len={word.partition('=')[2]}" for word in words if word.startswith(LENGTH)]
    sizes = [word for word in words if not word.startswith(LENGTH)]
    return [*flags, *(["--change-batch-size"] if sizes else []), *sizes]


def refused_run(collection: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    root = folder / "runs"
    text = refusal_of(["run", *collection, *WORDS, f"run.root={root}", *words], capsys)
    assert not root.exists()
    return text


def refused_plan(collection: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    return refusal_of(["plan", *collection, *WORDS, *words], capsys)


def refused_resume(collection: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    typed = [*collection, *WORDS, f"run.root={folder}"]
    return refused_edit(prepare_run(compose(typed), typed, datetime.now(UTC)), words, capsys)


def refused_edit_of_a_program(
    collection: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    run = RunFolder(folder / "mine" / "run")
    with DataPlane.open(compose([*collection, *WORDS]), Local(), folder=run) as plane:
        plane.finish(next(iter(plane)))
    return refused_edit(run, words, capsys)


def refused_edit(run: RunFolder, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = load_config(run.config)
    text = refusal_of(["resume", str(run.path), *edits_of(words)], capsys)
    assert not run.decisions.exists()
    assert load_config(run.config) == before
    return text


def refused_open(collection: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(ConfigError) as refused:
        DataPlane.open(compose([*collection, *WORDS, *words]), Local(), folder=RunFolder(folder / "run"))
    assert not (folder / "run").exists()
    return str(refused.value)


Refused = Callable[[list[str], list[str], Path, pytest.CaptureFixture[str]], str]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "refused", [refused_run, refused_plan, refused_resume, refused_edit_of_a_program, refused_open]
)
def test_sizes_beyond_every_machine_are_refused(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused, fault: str
) -> None:
    words, message = FAULTS[fault]
    assert_matches(message, refused(collection, words, tmp_path, capsys))


@pytest.mark.parametrize("fault", MEMORY_FAULTS)
@pytest.mark.parametrize("refused", [refused_run, refused_resume, refused_open])
def test_sizes_beyond_the_memory_of_the_node_are_refused(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused, fault: str
) -> None:
    words, message = MEMORY_FAULTS[fault]
    if fault == "activations" and refused is refused_open:
        return  # The data plane does not know the model.
    assert_matches(message, refused(collection, words, tmp_path, capsys))


def test_ranks_share_the_batches_and_the_memory_of_a_node() -> None:
    plane = DataPlaneConfig(seq_len=1 << 20, global_batch_size=64)
    check_batch_memory(plane, 64, ranks_on_node=4, memory_bytes=MEMORY)
    with pytest.raises(ConfigError, match="5 batches"):
        check_batch_memory(plane, 8, ranks_on_node=64, memory_bytes=MEMORY)
    with pytest.raises(ConfigError, match="64 sequences on each rank"):
        check_batch_memory(plane, 1, memory_bytes=MEMORY // 2)


@pytest.mark.parametrize(
    ("device", "num_gpus", "is_refused"), [("auto", 0, True), ("auto", 1, False), ("cpu", 1, True)]
)
def test_activations_on_a_gpu_are_not_in_the_memory_of_the_node(
    monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int, is_refused: bool
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    config = compose(["data.root=/data", "dataplane.vocab_size=9", f"{LENGTH}=1000000", f"training.device={device}"])
    with pytest.raises(ConfigError, match="activations") if is_refused else contextlib.nullcontext():
        model_memory.check_model_memory(config, 1)


def test_samples_have_no_length(collection: list[str]) -> None:
    plain = to_plain(compose([*collection, "mixture.unit=samples"]))
    plain["dataplane"]["seq_len"] = 10**9
    with DataPlane.open(from_plain(Config, plain), Local()) as plane:
        assert next(iter(plane)).payloads


def assert_matches(message: str, text: str) -> None:
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(text)
