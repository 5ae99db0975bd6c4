"""A run whose configuration leaves `dataplane.lanes` open keeps its number in every verb, also with another batch."""

import json
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import load_config
from mixtera_hpc.config.run_folder import RunFolder, find_runs
from mixtera_hpc.dataplane.recording.run_history import History

SHAPE = ["dataplane.seq_len=8", "dataplane.chunk_steps=2", "dataplane.audit=true", "dataplane.global_batch_size=1024"]
MODEL = ["training.num_layers=1", "training.num_heads=2", "training.embedding_dim=8", "training.warmup_steps=1"]
STEPS = ["training.num_steps=2", "checkpoint.every_steps=2", "checkpoint.keep=9"]


def numbers_of(folder: RunFolder) -> list[int]:
    """Return the number of lanes of every attempt."""
    return [attempt.identity["lanes"] for attempt in History(folder.journal).attempts]


@pytest.mark.slow
def test_a_run_keeps_the_lanes_of_its_first_batch_size(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*words: object, rc: int = 0) -> str:
        assert main([str(word) for word in words]) == rc
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    root = tmp_path / "runs"
    answer("run", *collection, *SHAPE, *MODEL, *STEPS, f"run.root={root}", "run.id=first", "run.name=lanes")
    folder = RunFolder(root / "lanes" / "first")
    assert load_config(folder.config).dataplane.lanes is None
    assert numbers_of(folder) == [32]
    assert "Lanes: 32, the default for global batches of 1,024" in answer("plan", folder.path)

    smaller = ["--change-batch-size", "dataplane.global_batch_size=8"]
    more = ["training.num_steps=4", "--here"]
    text = answer("resume", folder.path, *smaller, *more, "dataplane.lanes=16", rc=2)
    assert "dataplane.lanes: 32 before, 16 now Restore the recorded values" in text
    answer("resume", folder.path, *smaller, *more)
    assert numbers_of(folder) == [32, 32]
    text = answer("plan", folder.path)
    assert "Lanes: 32, from dataplane.lanes or the start of the run; the default for global batches of 8 is 16" in text
    answer("resume", folder.path, "training.num_steps=6", "dataplane.lanes=32", "--here")
    answer("trace", folder.path, "--verify")
    assert "step 5" in answer("trace", folder.path, "--step", "5")

    mixture = tmp_path / "same.yaml"
    mixture.write_text(json.dumps({"kind": "natural", "group_by": ["source"]}))
    answer("fork", folder.path, "--step", "4", "--set", mixture, "--steps", "2", "--run")
    [fork] = [run for run in find_runs(root) if run.path != folder.path]
    assert set(numbers_of(fork)) == {32}
    answer("trace", fork.path, "--verify")
