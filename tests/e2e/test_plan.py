"""Output of `plan` and `query`: exact, reproducible, and independent of the job."""

import json
from itertools import accumulate
from pathlib import Path

import pytest

from mixtera_hpc import DataPlane, compose

from .conftest import Cli

STEPS = 30
FIXED = ["mixture=natural", "mixture.group_by=[source]", "dataplane.global_batch_size=12"]


@pytest.fixture(scope="module")
def words(collection: list[str]) -> list[str]:
    return [*(o for o in collection if not o.startswith("mixture.group_by")), *FIXED, "dataplane.seq_len=32"]


@pytest.fixture(scope="module")
def printed(cli: Cli, words: list[str]) -> str:
    return cli("plan", *words, "--json", f"plan.steps={STEPS}").stdout


@pytest.mark.parametrize(
    "shape", ["job.ranks_per_node=2", "job.nodes=3", "job.ranks_per_node=4 dataplane.prefetch_batches=1"]
)
def test_the_plan_does_not_depend_on_the_job(shape: str, verb: Cli, words: list[str], printed: str) -> None:
    assert verb("plan", *words, "--json", f"plan.steps={STEPS}", *shape.split()).stdout == printed


@pytest.mark.parametrize("first", [1, 8, 17])
def test_a_plan_that_starts_later_equals_the_rest_of_the_whole_plan(
    first: int, verb: Cli, words: list[str], printed: str
) -> None:
    rest = verb("plan", *words, "--json", f"plan.first_step={first}", f"plan.steps={STEPS - first}").stdout
    assert rest == "".join(line for line in printed.splitlines(True) if json.loads(line)["step"] >= first)


def test_every_prefix_of_whole_steps_is_within_one_sequence_of_the_weights(
    verb: Cli, words: list[str], printed: str
) -> None:
    weights = {d["domain_id"]: d["weight"] for d in json.loads(verb("query", *words, "--json").stdout)["domains"]}
    sequences = [json.loads(line) for line in printed.splitlines()]
    assert len(sequences) == STEPS * 12
    for domain, weight in weights.items():
        # Inside a step, positions are sorted by lane: the order of the plan holds from step to step.
        counts = list(accumulate(int(s["domain_id"] == domain) for s in sequences))[11::12]
        assert len(counts) == STEPS
        assert all(abs(count - weight * 12 * steps) < 1 + 0.01 * steps for steps, count in enumerate(counts, 1))


def test_sequences_have_the_documented_fields(printed: str) -> None:
    first = json.loads(printed.splitlines()[0])
    assert list(first) == ["step", "position", "domain_id", "epoch", "segments"]
    assert sum(end - start for _, _, start, end in first["segments"]) == 33


def test_the_forecast_reports_when_data_run_out(verb: Cli, words: list[str]) -> None:
    done = verb("plan", *words, "mixture.on_exhausted=stop", "training.num_steps=1000")
    assert "The data ends after" in done.stdout and "mixture.on_exhausted=redistribute" in done.stdout


def test_the_advice_for_a_single_domain_is_to_repeat_it(verb: Cli, words: list[str]) -> None:
    single = ["mixture.group_by=[]", "mixture.on_exhausted=stop", "training.num_steps=1000"]
    printed = verb("plan", *words, *single).stdout
    assert "or set mixture.on_exhausted=repeat" in printed and "redistribute" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["query.where=sourc == 'ast'"], "Did you mean 'source'"),
        (["query.where=source == 'asd'"], "Did you mean 'ast'"),
        (["mixture.group_by=[sources]"], "Did you mean 'source'"),
        (["dataplane.shuffel=none"], "Did you mean 'dataplane.shuffle'"),
        (["mixture=adoo"], "Did you mean 'ado'"),
        (["--json", "mixture.max_epochs=1", "plan.first_step=100000"], "the data ends before it"),
        (["index.path=/nowhere/index.h5"], "mixtera-hpc index build"),
        (["dataplane.tokenizer=/nowhere/tokenizer.json"], "dataplane.tokenizer"),
    ],
)
def test_invalid_input_is_refused_with_a_suggestion(
    overrides: list[str], message: str, verb: Cli, words: list[str], tmp_path: Path
) -> None:
    done = verb("plan", *words, *overrides, cwd=tmp_path, rc=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_digests_require_json(verb: Cli, words: list[str]) -> None:
    assert "Add --json" in verb("plan", *words, "plan.digests=true", rc=2).stderr


def test_planned_digests_are_those_of_the_sequences_that_are_served(verb: Cli, words: list[str]) -> None:
    printed = verb("plan", *words, "--json", "plan.steps=6", "plan.digests=true").stdout
    planned = [json.loads(line) for line in printed.splitlines()]

    served = []
    with DataPlane.open(compose([*words, "dataplane.audit=true"])) as plane:
        for batch in plane:
            served += zip([batch.step] * 12, batch.positions.tolist(), batch.digests or [], strict=True)
            if batch.step == 5:
                break
    assert [(row["step"], row["position"], row["digest"]) for row in planned] == served
