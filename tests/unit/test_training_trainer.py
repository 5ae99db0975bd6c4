"""The reference trainer over a real index: metrics, checkpoints and resuming."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataPlaneConfig,
    IndexConfig,
    MixtureConfig,
    PropertyConfig,
    TrainingConfig,
)
from mixtera_hpc.errors import ConfigError, MixtureError, SavedAndStopped
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.track.event_reader import read_events
from mixtera_hpc.training.checkpoint import load_newest_checkpoint
from mixtera_hpc.training.trainer import run_training

pytestmark = pytest.mark.slow
"""Trains small models."""

WORDS = [*"abcdefghijklmnop", "the", "cat", "return", "import", "garden", "(", ")", "=", "."]
TRAINING = TrainingConfig(num_steps=10, num_layers=1, num_heads=2, embedding_dim=16, warmup_steps=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Configure ADO with chunks of 2 steps over an index of three domains of 60 documents each."""
    root = tmp_path_factory.mktemp("data")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 60 + i % 7)) for i in range(180)]
    rows = [json.dumps({"text": text, "kind": "abc"[i % 3]}) for i, text in enumerate(texts)]
    (root / "part.jsonl").write_text("\n".join(rows) + "\n")
    made = Config(
        data=DataConfig(root=str(root), include=["*.jsonl"], properties={"kind": PropertyConfig(path="kind")}),
        index=IndexConfig(path=str(root / "index.h5"), block_rows=16),
        mixture=MixtureConfig(kind="dynamic", group_by=["kind"]),
        dataplane=DataPlaneConfig(
            tokenizer=str(train_bpe(texts, 300, root / "tokenizer.json")),
            seq_len=16,
            global_batch_size=6,
            chunk_steps=2,
            workers=0,
        ),
        training=TRAINING,
    )
    build_index(made, Local())
    return made


def with_training(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def train(config: Config, path: Path, attempt: int = 1) -> RunFolder:
    run_training(config, Local(), RunFolder(path), attempt)
    return RunFolder(path)


def step_results(run: RunFolder) -> list[tuple[Any, ...]]:
    """Return the recorded values that must not depend on interruptions."""
    events = read_events(run.metrics / "steps.jsonl")
    return [(e["step"], e["loss"], e["domain_loss"], e["domain_tokens"], e["learning_rate"]) for e in events]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train a run without interruption."""
    return train(config, tmp_path_factory.mktemp("whole"))


def test_every_step_is_recorded_with_every_token_counted_once(whole: RunFolder) -> None:
    events = read_events(whole.metrics / "steps.jsonl")
    assert [e["step"] for e in events] == list(range(10))
    for event in events:
        assert event["tokens"] == sum(event["domain_tokens"])
        assert sum(event["domain_sequences"]) == 6
        assert 0.9 * 6 * 16 <= event["tokens"] <= 6 * 16
    assert events[-1]["loss"] < events[0]["loss"]


def test_the_attempt_event_describes_hardware_and_model(whole: RunFolder) -> None:
    (event,) = read_events(whole.metrics / "attempts.jsonl")
    assert (event["step"], event["num_ranks"], event["num_nodes"], event["device"]) == (0, 1, 1, "cpu × 1")
    assert event["domains"] == ["kind=a", "kind=b", "kind=c"]
    assert event["num_parameters"] == event["vocab_size"] * 16 + 12 * 16**2 + 3 * 16


def test_a_checkpoint_is_saved_after_the_last_step(whole: RunFolder) -> None:
    checkpoint = load_newest_checkpoint(whole)
    assert checkpoint is not None
    assert checkpoint.step == 10


@pytest.mark.parametrize(
    "stop_after", [pytest.param(1, marks=pytest.mark.full), 5, pytest.param(9, marks=pytest.mark.full)]
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_run(
    config: Config, whole: RunFolder, tmp_path: Path, stop_after: int
) -> None:
    with pytest.raises(SavedAndStopped, match=f"Stopped after {stop_after} of 10 steps"):
        train(with_training(config, stop_after=stop_after), tmp_path)
    run = train(config, tmp_path, attempt=2)
    assert step_results(run) == step_results(whole)
    resumed = load_newest_checkpoint(run)
    uninterrupted = load_newest_checkpoint(whole)
    assert resumed is not None
    assert uninterrupted is not None
    assert all(torch.equal(resumed.model[name], uninterrupted.model[name]) for name in uninterrupted.model)


def test_steps_after_the_last_complete_checkpoint_are_trained_again(
    config: Config, whole: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=3, keep=9)), tmp_path)
    assert [p.name[-2:] for p in sorted(run.checkpoints.glob("step_*"))] == ["03", "06", "09", "10"]
    for step in (9, 10):
        (run.checkpoint(step) / "model.pt").unlink()
    train(config, tmp_path, attempt=2)
    first, second = (warning for warning in warnings_of(caplog) if "Checkpoint" in warning)
    assert "step_00000010" in first
    assert "step_00000009" in second
    attempts = [e["attempt"] for e in read_events(run.metrics / "steps.jsonl")]
    assert attempts == [1] * 6 + [2] * 4
    assert step_results(run) == step_results(whole)


def test_micro_batches_do_not_change_losses_and_counts(config: Config, whole: RunFolder, tmp_path: Path) -> None:
    cut = train(with_training(config, micro_batch_size=4), tmp_path)
    assert [e[1] for e in step_results(cut)] == pytest.approx([e[1] for e in step_results(whole)], abs=1e-5)
    assert [e[3] for e in step_results(cut)] == [e[3] for e in step_results(whole)]


def test_events_over_several_steps_sum_to_the_same_tokens(config: Config, whole: RunFolder, tmp_path: Path) -> None:
    events = read_events(train(with_training(config, log_every=4), tmp_path).metrics / "steps.jsonl")
    assert [(e["step"], e["num_steps"]) for e in events] == [(3, 4), (7, 4), (9, 2)]
    assert sum(e["tokens"] for e in events) == sum(e["tokens"] for e in read_events(whole.metrics / "steps.jsonl"))


def test_resuming_a_finished_run_records_nothing(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path)
    before = step_results(run)
    train(config, tmp_path, attempt=2)
    assert step_results(run) == before


def test_a_stop_at_the_last_step_ends_the_run_normally(config: Config, tmp_path: Path) -> None:
    train(with_training(config, stop_after=10), tmp_path)


def test_training_ends_with_a_warning_when_the_data_end(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = dataclasses.replace(config.mixture, kind="natural", on_exhausted="stop", max_epochs=0.2)
    run = train(dataclasses.replace(with_training(config, num_steps=1000), mixture=mixture), tmp_path)
    (warning,) = warnings_of(caplog)
    assert re.search(r"The data ended after \d+ of training\.num_steps=1000 steps", warning)
    checkpoint = load_newest_checkpoint(run)
    assert checkpoint is not None
    assert 0 < checkpoint.step < 1000
    assert len(step_results(run)) == checkpoint.step


def test_data_for_less_than_one_step_are_refused(config: Config, tmp_path: Path) -> None:
    mixture = dataclasses.replace(config.mixture, kind="natural", on_exhausted="stop", max_epochs=0.001)
    with pytest.raises(MixtureError, match=r"The data ended after 0 of .* mixture\.max_epochs=0\.001"):
        train(dataclasses.replace(config, mixture=mixture), tmp_path)
    assert not RunFolder(tmp_path).checkpoints.exists()


def test_unit_samples_is_refused(config: Config, tmp_path: Path) -> None:
    mixture = dataclasses.replace(config.mixture, unit="samples")
    with pytest.raises(ConfigError, match=r"mixture\.unit is samples, but the reference trainer predicts tokens"):
        train(dataclasses.replace(config, mixture=mixture), tmp_path)


def test_a_control_file_stops_the_run(config: Config, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.control.mkdir()
    (run.control / "stop").touch()
    with pytest.raises(SavedAndStopped):
        train(config, tmp_path)
    assert step_results(train(config, tmp_path, attempt=2))[-1][0] == 9


def test_resuming_with_another_model_size_is_refused(config: Config, tmp_path: Path) -> None:
    train(with_training(config, num_steps=2), tmp_path)
    with pytest.raises(
        ConfigError, match=r"training\.num_layers is 2, but the checkpoint of step 2 was written with 1"
    ):
        train(with_training(config, num_layers=2), tmp_path, attempt=2)


def test_a_run_without_a_tokenizer_is_refused(config: Config, tmp_path: Path) -> None:
    plane = dataclasses.replace(config.dataplane, tokenizer=None)
    with pytest.raises(ConfigError, match=r"dataplane\.tokenizer is not set"):
        train(dataclasses.replace(config, dataplane=plane), tmp_path)


@pytest.mark.parametrize(("attention", "is_warned"), [("sequence", True), ("document", False)])
def test_balancing_is_of_use_only_with_attention_inside_documents(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, attention: Any, is_warned: bool
) -> None:
    plane = dataclasses.replace(config.dataplane, balance="attention")
    training = dataclasses.replace(config.training, num_steps=1, attention=attention)
    run_training(dataclasses.replace(config, dataplane=plane, training=training), Local(), RunFolder(tmp_path), 1)
    text = "dataplane.balance=attention is of no use: the reference trainer has training.attention=sequence"
    assert (text in caplog.text) == is_warned
