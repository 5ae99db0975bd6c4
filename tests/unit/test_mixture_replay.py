"""Replays of mixing algorithms: on traces with a reference, and on runs, whose weights they reproduce."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.report.report_files import write_report
from mixtera_hpc.track.event_reader import read_events

DATA = Path(__file__).resolve().parents[1] / "data" / "ado"
ADO = "mixture.algorithm={name: ado, warmup: 6, refit_interval: 4}"
ODM = "mixture.algorithm={name: odm}"
SHAPE = ["dataplane.global_batch_size=16", "dataplane.seq_len=16", "dataplane.chunk_steps=2"]
HELD_OUT = ["query.holdout.fraction=0.3", "training.validate_steps=2", "training.validate_every=4"]
SKILL_IT = "mixture.algorithm={name: skill-it, eta: 0.5}"


def run_of(collection: list[str], root: Path, *words: str) -> RunFolder:
    """A run of 24 steps with a mixture that is learned; it validates every 4 steps if samples are held out."""
    plain = [word for word in collection if not word.startswith("mixture.")]
    words = (*plain, *SHAPE, "mixture.kind=dynamic", "mixture.group_by=[source]", *words)
    config = compose([*words, f"run.root={root}", "training.num_steps=24"])
    folder = prepare_run(config, list(words), datetime.now(UTC))
    random = np.random.Generator(np.random.Philox(0))
    with DataPlane.open(config, comm=Local(), folder=folder) as plane:
        held_out = plane.held_out() if config.query.holdout.fraction else None
        for batch in plane:
            losses = 1.0 + batch.domain_ids / 3 + 3.0 / (2 + batch.step) + random.normal(0, 0.05, len(batch.domain_ids))
            plane.record(batch, np.broadcast_to(losses[:, None], batch.loss_mask.shape))
            if held_out is not None and (batch.step + 1) % 4 == 0:
                for validated in held_out.batches():
                    level = 1.0 + validated.domain_ids + 2.0 / (2 + batch.step)
                    held_out.record(validated, np.broadcast_to(level[:, None], validated.loss_mask.shape))
                held_out.reduce(batch.step + 1)
            if batch.step == 23:
                break
    return folder


@pytest.mark.parametrize(
    "words",
    [(ADO,), (ODM, "mixture.floor=0.05", "mixture.cap=0.6"), (SKILL_IT, *HELD_OUT)],
    ids=["ado", "odm with bounds", "skill-it from held-out losses"],
)
def test_a_replayed_run_has_its_recorded_weights(
    collection: list[str], tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(collection, tmp_path / "runs", *words)
    assert main(["mixture", "replay", str(folder.path), "--out", str(tmp_path / "out.npz")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The replay agrees with the recorded weights of 10 chunks" in printed
    with np.load(tmp_path / "out.npz") as out:
        assert out["mixture"].shape[0] == 24
        assert np.ptp(out["mixture"], axis=0).max() > 0.003, "the mixture must move for the comparison to say anything"


def test_what_was_learned_is_in_the_metrics_and_on_the_page(collection: list[str], tmp_path: Path) -> None:
    folder = run_of(collection, tmp_path / "runs", ADO)
    events = read_events(folder.metric("mixture"))
    recorded = [{"epsilon", "alpha", "residual", "law_status"} <= set(event) for event in events]
    # Refits are in the steps 6, 10, 14, …: some chunks have no new laws. A description exists from chunk 2 on.
    assert recorded[:2] == [False, False]
    assert 0 < sum(recorded) < len(recorded) - 2
    report = write_report(folder)
    page = report.page.read_text()
    assert "Learned by the mixture" in page
    assert "residual" in page


def test_a_replay_of_coarse_metrics_says_how_far_it_is(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(collection, tmp_path / "runs", ADO, "training.log_every=3")
    assert main(["mixture", "replay", str(folder.path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The replay DIFFERS from the recorded weights of 10 chunks; the largest difference" in printed
    assert "one line for 3 steps" in printed


def test_an_exported_trace_replays_like_its_run(collection: list[str], tmp_path: Path) -> None:
    folder = run_of(collection, tmp_path / "runs", ODM)
    trace = tmp_path / "trace.npz"
    words = ["--algorithm", "odm", "algorithm.decay=0.8"]
    assert main(["mixture", "export", str(folder.path), "--out", str(trace)]) == 0
    for source, out in ((str(trace), "a.npz"), (str(folder.path), "b.npz")):
        assert main(["mixture", "replay", source, *words, "--out", str(tmp_path / out)]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b, np.load(trace) as exported:
        assert a["mixture"].tolist() == b["mixture"].tolist()
        assert exported["counts"].sum(axis=1).tolist() == [16] * 24
        assert exported["weights"].sum(axis=1) == pytest.approx(np.ones(24))
        assert set(exported) == {"names", "mu", "counts", "loss_mean", "B", "seq_len", "tokens", "weights"}


@pytest.mark.parametrize(("variant", "file", "limit"), [("paper", "paper_k3", 1e-8), ("authors", "authors_k3", 2e-5)])
def test_the_command_follows_the_reference(variant: str, file: str, limit: float, tmp_path: Path) -> None:
    words = ["mixture", "replay", str(DATA / "trace_k3.npz"), "algorithm.warmup=1000"]
    assert main([*words, "--algorithm", "ado", "--variant", variant, "--out", str(tmp_path / "o.npz")]) == 0
    with np.load(tmp_path / "o.npz") as out, np.load(DATA / f"{file}.npz") as stored:
        known = ~np.isnan(stored["mixture"]).any(axis=1)
        assert np.abs(out["mixture"] - stored["mixture"])[known].sum(axis=1).max() / 2 < limit
        assert out["refit_steps"].tolist() == [1000, 2000, 3000]
        assert out["speed"].shape == (3, 3)


def test_a_domain_of_weight_0_stays_at_0_in_a_replay(tmp_path: Path) -> None:
    steps = 30
    np.savez(
        tmp_path / "trace.npz",
        names=np.array(["a", "b", "c"]),
        mu=np.array([0.5, 0.0, 0.5]),
        counts=np.full((steps, 3), 8),
        loss_mean=np.full((steps, 3), [3.0, 2.0, 1.0]),
        B=24,
        seq_len=16,
    )
    out = tmp_path / "out.npz"
    assert main(["mixture", "replay", str(tmp_path / "trace.npz"), "--algorithm", "odm", "--out", str(out)]) == 0
    with np.load(out) as replayed:
        assert replayed["mixture"][:, 1].max() == 0.0
        assert replayed["mixture"][-1, 0] > replayed["mixture"][-1, 2] > 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the algorithm"),
        (["--algorithm", "adoo"], "Did you mean 'ado'"),
        (["--algorithm", "ado", "warmup=3"], "'warmup=3' is not a parameter. Write algorithm.KEY=VALUE"),
        (["--algorithm", "ado", "algorithm.warm_up=3"], "Did you mean 'warmup'"),
        (["--algorithm", "ado", "algorithm.warmup={"], "has no valid value"),
        (["--algorithm", "skill-it"], "learns from held-out losses, and the trace has none"),
        (["--algorithm", "exponentiated-gradient"], "from_run=RUN"),
        (["--algorithm", "ado", "--out", "x.txt"], "expected a name that ends in .npz"),
        (["--algorithm", "ado", "--json"], "--json belongs to mixture set or show"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixture", "replay", str(DATA / "trace_k3.npz"), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    assert main(["mixture", "replay", str(tmp_path / "other.npz"), "--algorithm", "ado"]) == 2
    assert "has no array 'mu', so it is not a trace of losses" in capsys.readouterr().err
    (tmp_path / "text.npz").write_text("no npz")
    assert main(["mixture", "replay", str(tmp_path / "text.npz"), "--algorithm", "ado"]) == 2
    assert main(["mixture", "show", "demo", "--variant", "paper"]) == 2
    assert "--variant belongs to mixture replay or export" in capsys.readouterr().err
