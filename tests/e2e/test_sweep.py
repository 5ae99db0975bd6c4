"""A sweep on this machine: real ranks, then the scaling report, and nothing to do when it is repeated."""

import csv
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

Cli = Callable[..., CompletedProcess[str]]


def test_a_local_sweep_trains_every_point_once_and_compares_them(cli: Cli, small: list[str], tmp_path: Path) -> None:
    sweep = ["sweep", *small, "sweep=weak", "job.nodes=1,2", "dataplane.global_batch_size=6", "--local"]
    sweep += ["training.num_steps=8", f"run.root={tmp_path}"]

    first = cli(*sweep)

    assert first.stdout.count("exit code 0") == 2
    with (tmp_path / "small/scaling/scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ranks"], row["global_batch_size"]) for row in rows] == [("1", "6"), ("2", "12")]
    again = cli(*sweep)
    assert "2 of 2 done, nothing to submit." in again.stdout
    assert len(list(tmp_path.glob("small/*/config.yaml"))) == 2
