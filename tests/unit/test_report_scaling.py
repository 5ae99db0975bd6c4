"""Comparisons of runs with different numbers of ranks, and the model of larger jobs."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import dump_yaml, load_yaml
from mixtera_hpc.core.chunk_plan import ChunkPlan
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.launch.sweep.sweep_record import SweepRecord
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.scaling.scaling_model import (
    ModelConstants,
    assumptions,
    broadcast_bytes,
    model_constants,
    model_scaling,
)
from mixtera_hpc.report.scaling.scaling_table import scaling_table

RunMaker = Callable[..., RunFolder]

CONSTANTS = ModelConstants(
    num_domains=100,
    num_scalars=0,
    chunk_steps=10,
    prefetch_batches=4,
    ranks_per_node=4,
    base_ranks=8,
    step_s=0.5,
    plan_s=1e-4,
    latency_s=5e-6,
    bytes_per_s=1e10,
    metadata_per_s=1e4,
)


def set_keys(run: RunFolder, **values: Any) -> RunFolder:
    """Set keys of the recorded configuration, `group__key=value`."""
    config = load_yaml(run.config)
    for name, value in values.items():
        group, _, key = name.partition("__")
        config.setdefault(group, {})[key] = value
    run.config.write_text(dump_yaml(config))
    return run


@pytest.fixture
def curve(make_run: RunMaker, tmp_path: Path) -> list[RunFolder]:
    """Return two seeds on 1 and 2 nodes, with the record of their sweep."""
    runs = []
    record = SweepRecord(tmp_path / "curve")
    for seed in (0, 1):
        for nodes in (1, 2):
            options = {"num_ranks": nodes, "tokens_per_s": 100.0 * nodes * (1 + seed)}
            run = make_run(["en"], [(0, 8)], root=tmp_path, name="curve", run_id=f"s{seed}n{nodes}", **options)
            set_keys(run, job__nodes=nodes, dataplane__seed=seed)
            run.overrides.write_text(f"job.nodes={nodes}\ndataplane.seed={seed}\n")
            record.add_run(run.run_id, run.run_id, [])
            runs.append(run)
    record.add_sweep([run.run_id for run in runs], ["job.nodes", "dataplane.seed"], "strong")
    return runs


def test_runs_that_differ_in_more_than_the_scale_are_refused_by_name(curve: list[RunFolder]) -> None:
    metrics = [load_run_metrics(run) for run in curve]
    with pytest.raises(ConfigError, match=r"dataplane.seed: 0 \(s0n1\), 1 \(s1n1\)"):
        scaling_table(metrics)


def test_the_runs_of_a_sweep_are_compared_within_their_values_of_other_keys(
    curve: list[RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "curve", "--scaling", "--root", str(tmp_path)]) == 0

    output = capsys.readouterr().out
    assert "dataplane.seed=1" in output
    assert "binds" in output
    with (tmp_path / "curve/scaling/scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["ranks"], float(row["speedup"])) for row in rows] == [
        ("dataplane.seed=0", "1", 1.0),
        ("dataplane.seed=0", "2", 2.0),
        ("dataplane.seed=1", "1", 1.0),
        ("dataplane.seed=1", "2", 2.0),
    ]
    assert (tmp_path / "curve/scaling/scaling.png").read_bytes().startswith(b"\x89PNG")
    limits = (tmp_path / "curve/scaling/limits.csv").read_text().splitlines()
    assert limits[0].startswith("run_id,ranks,stage,")


def test_a_batch_that_grows_with_the_nodes_may_differ(make_run: RunMaker) -> None:
    runs = [
        set_keys(make_run(["en"], [(0, 8)], num_ranks=n), job__nodes=n, dataplane__global_batch_size=8 * n)
        for n in (1, 2, 4)
    ]
    assert len(scaling_table([load_run_metrics(run) for run in runs])) == 3
    set_keys(runs[2], dataplane__global_batch_size=16)
    with pytest.raises(ConfigError, match=r"dataplane\.global_batch_size"):
        scaling_table([load_run_metrics(run) for run in runs])


def test_the_default_number_of_lanes_of_an_earlier_release_may_differ(make_run: RunMaker) -> None:
    runs = [
        set_keys(make_run(["en"], [(0, 8)], num_ranks=n), job__nodes=n, dataplane__lanes=lanes)
        for n, lanes in ((1, 16), (2, None))
    ]
    assert len(scaling_table([load_run_metrics(run) for run in runs])) == 2
    set_keys(runs[0], dataplane__lanes=64)
    with pytest.raises(ConfigError, match=r"dataplane\.lanes: 64"):
        scaling_table([load_run_metrics(run) for run in runs])


def test_runs_of_other_code_are_named(make_run: RunMaker, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(["en"], [(0, 8)], num_ranks=n, run_id=f"r{n}") for n in (1, 2)]
    for run, commit in zip(runs, ("a" * 40, "b" * 40), strict=True):
        run.manifest.write_text(json.dumps({"git": {"commit": commit, "dirty": False}}))
    assert main(["report", "--scaling", *(str(run.path) for run in runs)]) == 0
    assert "note: The runs differ in commit: aaaaaaaaaa (r1), bbbbbbbbbb (r2)" in capsys.readouterr().out


def test_sizes_of_the_model_are_those_of_the_code() -> None:
    for num_domains in (1, 7, 1000):
        assert broadcast_bytes(num_domains) == 8 * ChunkPlan.array_size(num_domains)


def test_the_model_hides_what_fits_beside_the_trainer() -> None:
    rows = model_scaling(CONSTANTS, 4096)
    assert [row.nodes for row in rows] == [2**i for i in range(13)]
    last = rows[-1]
    assert (last.ranks, last.broadcast_messages, last.reduction_messages) == (16384, 16383, 2 * 14 * 16384)
    assert last.reduction_bytes == 8 * (16384 + 400 + 7)
    assert last.reduction_s == pytest.approx(2 * (14 * 5e-6 + last.reduction_bytes / 1e10))
    # Eleven doublings of the recorded 8 ranks, and a few bytes for every rank.
    assert last.exposed_s == pytest.approx(11 * 2.1e-4 + 16376 * 4e-9)
    assert 0.99 < last.efficiency < 1
    # Steps that are shorter than a reduction wait for it.
    slow = ModelConstants(**{**{f: getattr(CONSTANTS, f) for f in CONSTANTS.__slots__}, "latency_s": 0.05})
    waiting = model_scaling(slow, 4096)[-1]
    assert waiting.exposed_s == pytest.approx(2 * 14 * 0.05 - 0.5 + (1.4 - 0.5) / 3, rel=1e-2)
    assert waiting.efficiency < 0.4


def test_a_number_of_nodes_that_is_no_power_of_two_comes_last() -> None:
    assert [row.nodes for row in model_scaling(CONSTANTS, 3000)][-2:] == [2048, 3000]
    assert [row.nodes for row in model_scaling(CONSTANTS, 1)] == [1]


def test_constants_come_from_the_run_and_its_cluster(make_run: RunMaker) -> None:
    run = set_keys(make_run(["en", "de"], [(0, 8)], num_ranks=4), cluster__network_latency_us=2.0, cluster__name="x")
    constants = model_constants(load_run_metrics(set_keys(run, dataplane__chunk_steps=4)))
    assert (constants.num_domains, constants.base_ranks, constants.chunk_steps) == (2, 4, 4)
    assert (constants.latency_s, constants.plan_s) == (pytest.approx(2e-6), pytest.approx(1e-4))
    assert math.isclose(constants.step_s, 0.5)
    assert any("2 µs per message" in line for line in assumptions(constants))


def test_the_model_is_printed_and_written(make_run: RunMaker, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(["en"], [(0, 8)], num_ranks=2)
    assert main(["report", "--scaling", str(run.path), "--model", "4096"]) == 0
    output = capsys.readouterr().out
    assert "4,096" in output
    assert "Assumptions" in output
    assert len((run.report / "model.csv").read_text().splitlines()) == 14


@pytest.mark.parametrize(
    ("words", "message"), [(["--model", "8"], "Add --scaling"), (["--scaling", "--model", "0"], "at least 1 node")]
)
def test_a_model_of_nothing_is_refused(
    make_run: RunMaker, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    run = make_run(["en"], [(0, 8)])
    assert main(["report", str(run.path), *words]) == 2
    assert message in capsys.readouterr().err
