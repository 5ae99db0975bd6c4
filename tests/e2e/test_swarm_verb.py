"""A swarm from the command line: sample, train, fit, check, and a second one that reuses the first."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.swarm.tables import read_table
from mixtera_hpc.testing.markov_corpus import entropy_rates, write_markov_corpus

TRAINING = (
    *("query.holdout.fraction=0.1", "dataplane.seq_len=32", "dataplane.global_batch_size=16", "dataplane.workers=0"),
    *("training.num_layers=1", "training.num_heads=2", "training.embedding_dim=32", "training.learning_rate=1e-2"),
    "training.validate_min_sequences=32",
)
"""The settings of docs/swarm.md."""
TINY = ("training.num_steps=4", "training.validate_every=4", "training.validate_steps=2", "training.embedding_dim=8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the overrides of a corpus of Markov chains."""
    return write_markov_corpus(tmp_path_factory.mktemp("markov"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXTERA_RUNS", str(tmp_path / "runs"))
    return tmp_path


def proposal_of(folder: Path) -> dict[str, float]:
    plain = json.loads((folder / "proposal.json").read_text())
    return dict(zip(plain["domains"], plain["weights"], strict=True))


@pytest.mark.slow
def test_a_swarm_proposes_a_mixture_that_a_second_one_reuses(
    corpus: list[str], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*corpus, *TRAINING, *TINY, "swarm.num_proxies=6", "mixture.cap=0.6"]
    three = [*words, "query.where=source != 'branch'"]
    # Half of the data, so that the proxies repeat it as often as a run of twice their tokens.
    limits = ["mixture.fraction=0.5", "mixture.max_epochs=2", "swarm.target_tokens=200000"]
    assert main(["swarm", "sample", "first", *three, *limits]) == 0
    ratios = read_table(home / "first" / "ratios.csv")
    assert ratios.values.shape == (6, 3)
    assert (ratios.values <= 0.6 + 1e-6).all()
    # About 315 documents of 161 tokens in training, twice, of 200,000 tokens.
    chain = ratios.columns.index("source=chain")
    assert 0.45 < ratios.values[:, chain].max() <= 0.55
    assert "fraction: 0.5" in (home / "first" / "mixture" / "first-000.yaml").read_text()
    assert main(["swarm", "sample", "whole", *three]) == 0
    sizes = [json.loads((home / name / "swarm.json").read_text())["sizes"] for name in ("first", "whole")]
    assert sizes[0] == sizes[1], "limits of epochs are those of all samples, not of an estimate"
    assert main(["swarm", "train", "first"]) == 0
    assert "6 trained, 0 had finished" in capsys.readouterr().out

    # A proxy that is lost is trained again, and only this one.
    shutil.rmtree(home / "runs" / "first" / "first-004")
    assert main(["swarm", "train", "first"]) == 0
    assert "1 trained, 5 had finished" in capsys.readouterr().out

    assert main(["swarm", "fit", "first"]) == 0
    recorded = home / "runs" / "first" / "first-004" / "config.yaml"
    text = recorded.read_text()
    recorded.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert main(["swarm", "fit", "first"]) == 2
    assert "other values of training" in capsys.readouterr().err
    recorded.write_text(text)
    assert main(["swarm", "train", "first", "--check"]) == 0
    assert main(["swarm", "fit", "first"]) == 0
    checks = json.loads((home / "first" / "proposal.json").read_text())["checks"]
    assert [check["run"].split("-")[1] for check in checks] == ["natural", "uniform", "proposal"]
    assert all(check["measured"] > 0 for check in checks)
    page = (home / "first" / "swarm.html").read_text()
    assert page.count("<svg") == 6
    assert "source=chain" not in page.split("<footer>")[0].replace("first", ""), "names are short"

    proposal = proposal_of(home / "first")
    assert sum(proposal.values()) == pytest.approx(1)
    assert proposal["source=chain"] <= 0.55
    assert "fraction" not in (home / "first" / "mixture" / "first-proposal.yaml").read_text(), "it is for all data"
    monkeypatch.setenv("MIXTERA_CONF", str(home / "first"))
    written = [word for word in three if not word.startswith(("mixture", "swarm"))]
    capsys.readouterr()
    assert main(["plan", *written, "mixture=first-proposal"]) == 0
    assert f"{proposal['source=chain']:.4f}" in capsys.readouterr().out

    # A domain is added: the others keep their ratios.
    assert main(["swarm", "sample", "second", *words, "--reuse", "first"]) == 0
    shares = read_table(home / "second" / "ratios.csv")
    old = np.array([proposal[name] for name in shares.columns if name != "source=branch"])
    new = shares.columns.index("source=branch")
    rest = np.delete(shares.values, new, axis=1)
    assert rest == pytest.approx(np.outer(rest.sum(axis=1), old), abs=1e-5)
    assert main(["swarm", "train", "second"]) == 0
    assert main(["swarm", "fit", "second"]) == 0
    result = json.loads((home / "second" / "proposal.json").read_text())
    assert result["num_runs"] == 12, "the earlier proxies take part"
    assert result["weights"][new] > 0

    # Metrics that were measured elsewhere, of our proxies and of others.
    lines = ["run,score", *(f"second-00{i},{1 + shares.values[i, new]}" for i in range(6)), "theirs,1.5"]
    (home / "theirs.csv").write_text("\n".join(lines) + "\n")
    (home / "mixtures.csv").write_text("run,source=branch,source=chain\ntheirs,0.5,0.5\n")
    outside = ["--metrics", "theirs.csv", "--ratios", "mixtures.csv", "swarm.objective.score=1"]
    capsys.readouterr()
    assert main(["swarm", "fit", "second", *outside]) == 0
    result = json.loads((home / "second" / "proposal.json").read_text())
    assert result["objective"] == {"score": 1.0}
    assert result["num_runs"] == 7
    assert result["weights"][new] == pytest.approx(shares.values[:, new].min(), abs=1e-4), "score grows with branch"


@pytest.mark.slow
def test_a_swarm_of_two_phases_proposes_a_schedule(
    corpus: list[str], home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*corpus, *TRAINING, *TINY, "dataplane.chunk_steps=1"]
    phases = ["swarm.phases=[0.75,0.25]", "swarm.num_proxies=6", "swarm.target_tokens=4000000", "mixture.max_epochs=20"]
    assert main(["swarm", "sample", "phased", *words, *phases]) == 0
    shown = capsys.readouterr().out
    assert "phase 2: source=chain" in shown
    ratios = read_table(home / "phased" / "ratios.csv")
    assert ratios.values.reshape(6, 2, 4).sum(axis=2) == pytest.approx(np.ones((6, 2)), abs=1e-6)
    text = (home / "phased" / "mixture" / "phased-000.yaml").read_text()
    assert "kind: schedule" in text
    assert "start: 3.0" in text, "three of four steps"
    for step in (["train"], ["fit"], ["train", "--check"], ["fit"]):
        assert main(["swarm", step[0], "phased", *step[1:]]) == 0

    # The last step was served from the second mixture.
    events = (home / "runs" / "phased" / "phased-000" / "metrics" / "mixture.jsonl").read_text().splitlines()
    weights = [json.loads(event).get("weights") for event in events]
    assert weights[0] == pytest.approx(ratios.values[0, :4], abs=1e-6)
    assert weights[3] == pytest.approx(ratios.values[0, 4:], abs=1e-6)

    plain = json.loads((home / "phased" / "proposal.json").read_text())
    assert plain["phases"] == [0.75, 0.25]
    assert np.array(plain["weights"]).sum(axis=1) == pytest.approx(np.ones(2))
    assert all(check["measured"] > 0 for check in plain["checks"])
    page = (home / "phased" / "swarm.html").read_text()
    assert "phase 2: chain" in page
    assert "Scale <code>start</code>" not in page
    proposal = (home / "phased" / "mixture" / "phased-proposal.yaml").read_text()
    assert "unit: tokens" in proposal
    assert "start: 3000000.0" in proposal, "three quarters of the tokens of the final run"
    monkeypatch.setenv("MIXTERA_CONF", str(home / "phased"))
    written = [word for word in words if not word.startswith("mixture")]
    assert main(["plan", *written, "mixture=phased-proposal", "training.num_steps=8000"]) == 0

    capsys.readouterr()
    assert main(["swarm", "sample", "later", *words, *phases, "--reuse", "phased"]) == 2
    assert "a mixture for each of 2 phases" in capsys.readouterr().err
    assert main(["swarm", "sample", "short", *words, "swarm.phases=[0.9,0.1]"]) == 2
    assert "phase 2 has no chunk of its own" in capsys.readouterr().err


def test_wrong_swarms_are_refused(corpus: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*corpus, *TRAINING, *TINY]

    def refused(*command: str) -> str:
        assert main(["swarm", *command]) == 2
        return capsys.readouterr().err

    assert "training.validate_every is 0" in refused("sample", "x", *words, "training.validate_every=0")
    assert "mixture.kind is dynamic" in refused("sample", "x", *words, "mixture=ado", "mixture.group_by=[source]")
    assert "compares at least two" in refused("sample", "x", *words, "mixture.group_by=[]")
    assert "swarm.temperature is 0" in refused("sample", "x", *words, "swarm.temperature=0")
    assert "Did you mean" in refused("sample", "x", *words, "swarm.num_proxy=3")
    assert "names the swarm" in refused("sample", "-x y", *words)
    assert "is no swarm" in refused("train", "x")
    assert "is no swarm" in refused("fit", "x")
    assert not (home / "x").exists(), "nothing was written"
    limits = ["mixture.max_epochs=1", "swarm.target_tokens=1000000000"]
    assert "Raise mixture.max_epochs" in refused("sample", "x", *words, *limits)

    assert main(["swarm", "sample", "x", *words]) == 0
    capsys.readouterr()
    elsewhere = ["environment=venv", "environment.venv=/venv", "sweep.scaling=strong"]
    assert main(["swarm", "sample", "x", *words, *elsewhere, "swarm.num_proxies=14"]) == 0, "proxies can be added"
    assert "another configuration" in refused("sample", "x", *words, "swarm.seed=1")
    assert "0 runs of the swarm x have losses" in refused("fit", "x")
    assert "takes no overrides" in refused("train", "x", "dataplane.seed=1")
    assert "has no proposal to check" in refused("train", "x", "--check")
    assert "--reuse belongs to swarm sample" in refused("fit", "x", "--reuse", "y")
    assert "--check belongs to swarm train and submit" in refused("fit", "x", "--check")
    assert "--max-parallel is 0" in refused("submit", "x", "--max-parallel", "0")
    assert "--ratios needs --metrics" in refused("fit", "x", "--ratios", "a.csv")
    assert "swarm fit takes swarm.objective" in refused("fit", "x", "swarm.seed=3")
    assert "has no proposal yet" in refused("sample", "y", *words, "--reuse", "x")
    (home / "metrics.csv").write_text("run,loss\n" + "".join(f"x-{i:03d},{i}\n" for i in range(8)))
    assert "losses above 0" in refused("fit", "x", "--metrics", "metrics.csv")
    assert "names 'los'" in refused("fit", "x", "--metrics", "metrics.csv", "swarm.objective.los=1")
    (home / "x" / "swarm.json").write_text("{")
    assert "is damaged" in refused("fit", "x")


@pytest.mark.full
def test_the_proposal_beats_natural_and_uniform_with_three_seeds(corpus: list[str], home: Path) -> None:
    for seed in range(3):
        name = f"seed{seed}"
        seeds = [f"swarm.seed={seed}", f"training.seed={seed}", f"dataplane.seed={seed}", "swarm.num_proxies=12"]
        steps = ["training.num_steps=60", "training.validate_every=60"]
        assert main(["swarm", "sample", name, *corpus, *TRAINING, *steps, *seeds]) == 0
        assert main(["swarm", "train", name]) == 0
        assert main(["swarm", "fit", name]) == 0
        assert main(["swarm", "train", name, "--check"]) == 0
        assert main(["swarm", "fit", name]) == 0

        checks = json.loads((home / name / "proposal.json").read_text())["checks"]
        natural, uniform, proposal = (check["measured"] for check in checks)
        assert proposal < uniform < natural, f"seed {seed}: {checks}"
        weights = proposal_of(home / name)
        assert weights["source=chain"] + weights["source=branch"] > 0.65, "known: these two need the data"
        assert proposal > np.mean(list(entropy_rates().values())), "no model is better than the source"
