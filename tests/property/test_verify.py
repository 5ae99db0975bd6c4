"""Facts that an audit log proves, and facts that it cannot prove."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.steps.digests import sample_digest
from mixtera_hpc.errors import DataError
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import VerifyResult, verify_run


@pytest.fixture(params=["tokens", "samples"])
def config(request: pytest.FixtureRequest, collection: list[str]) -> Config:
    words = ["dataplane.seq_len=32", "dataplane.global_batch_size=6", "dataplane.audit=true"]
    return compose([*collection, *words, f"mixture.unit={request.param}"])


def serve(config: Config, folder: Path, attempt: int, until: int, state: Any = None) -> Any:
    with DataPlane.open(config, Local(), RunFolder(folder), attempt) as plane:
        if state is not None:
            plane.load_state_dict(state)
        while plane.next_step < until:
            next(iter(plane))
        return plane.state_dict()


def proven(config: Config, folder: Path) -> VerifyResult:
    run = RunFolder(folder)
    return verify_run(ServedRun(run, config))


def test_a_run_of_tokens_or_samples_is_proven(config: Config, tmp_path: Path) -> None:
    serve(config, tmp_path, 1, 7)
    assert proven(config, tmp_path).num_sequences == 42


def test_other_content_is_reported_with_its_step_and_position(config: Config, tmp_path: Path) -> None:
    serve(config, tmp_path, 1, 5)
    [log] = RunFolder(tmp_path).audit(1).iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[3]["digests"][2] = "0" * 16
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        DataError, match=r"Step 3 position 2 \(attempt 1\) was consumed with other tokens or another sample"
    ):
        proven(config, tmp_path)


def test_an_attempt_without_audit_is_reported_as_such(config: Config, tmp_path: Path) -> None:
    state = serve(replace(config, dataplane=replace(config.dataplane, audit=False)), tmp_path, 1, 4)
    serve(config, tmp_path, 2, 8, state)
    with pytest.raises(DataError, match="Attempt 1, of steps 0 to 3, has no audit log"):
        proven(config, tmp_path)


def test_samples_of_any_content_have_a_digest() -> None:
    tokens = np.arange(2000)
    samples = [{"a": 1}, {"a": 1.0}, {"a": 2**70}, {"a": b"\xff"}, {"a": None}, {"a": tokens}, {"a": tokens[::-1]}]
    assert len({sample_digest(sample) for sample in samples}) == len(samples)


def test_a_journal_that_lost_lines_proves_nothing(config: Config, tmp_path: Path) -> None:
    with DataPlane.open(config, Local(), RunFolder(tmp_path)) as plane:
        while plane.next_step < 20:
            next(iter(plane))
    journal = RunFolder(tmp_path).journal
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))  # The opening and one chunk.
    with pytest.raises(DataError, match="Steps 8 to 19 were consumed, but the journal ends before step 8"):
        proven(config, tmp_path)
