"""Experiments: those that are shipped, and what wins when the command line chooses a group as well."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from mixtera_hpc.config.compose import compose, compose_plain
from mixtera_hpc.config.composition.conf_folders import conf_dir, group_options
from mixtera_hpc.config.schema import MixtureConfig

pytestmark = pytest.mark.slow
"""Composes every experiment."""

OWN = """# @package _global_
defaults: [override /mixture: static, override /cluster: dev]
data: {root: /data}
mixture: {unit: samples, domains: [{key: {a: x}, weight: 1}]}
job: {nodes: 4}
dataplane: {seq_len: 77, chunk_steps: 2}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of experiments: `mine`, and `based`, which is built on it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(OWN)
    (tmp_path / "experiment/based.yaml").write_text(
        "# @package _global_\ndefaults: [mine]\nmixture: {floor: 0.1}\njob: {time: '00:10:00'}\n"
    )
    monkeypatch.setenv("MIXTERA_CONF", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", group_options("experiment"))
def test_a_shipped_experiment_passes_the_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")

    config = compose([f"experiment={name}"])

    assert config.run.name == name


def leaves(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the key path and the value of everything below `node` that is not a mapping."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("name", group_options("experiment"))
def test_a_shipped_experiment_repeats_no_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    written = yaml.safe_load((conf_dir() / f"experiment/{name}.yaml").read_text())
    chosen = [f"{group.split('/')[-1]}={option}" for line in written.pop("defaults") for group, option in line.items()]
    composed = compose_plain(chosen)

    repeated = []
    for path, value in leaves(written):
        default: Any = composed
        for key in path:
            default = default.get(key) if isinstance(default, dict) else None
        if default == value:
            repeated.append(".".join(path))

    assert repeated == []


def test_there_are_experiments_to_start_from() -> None:
    assert {"demo", "slim_pajama_ado", "web_and_code", "megatron_tokens", "image_text"} <= set(
        group_options("experiment")
    )


@pytest.mark.parametrize("experiment", ["mine", "based"])
def test_a_group_chosen_on_the_command_line_replaces_what_the_experiment_sets_in_it(own: Path, experiment: str) -> None:
    config = compose([f"experiment={experiment}", "mixture=unimax", "mixture.unit=samples"])

    assert config.mixture == MixtureConfig(unit="samples", unimax_epochs=4.0)
    assert (config.data.root, config.job.nodes, config.dataplane.seq_len) == ("/data", 4, 77)
    assert config.cluster.name == "dev"


def test_several_groups_can_be_chosen(own: Path) -> None:
    config = compose(["experiment=mine", "mixture=natural", "job=default", "cluster=local", "mixture.unit=samples"])

    assert config.mixture == MixtureConfig(unit="samples")
    assert (config.job.nodes, config.cluster.name) == (1, "local")
    assert config.dataplane.seq_len == 77


def test_values_on_the_command_line_do_not_choose_a_group(own: Path) -> None:
    config = compose(["experiment=based", "mixture.cap=0.9", "job.qos=high"])

    assert (config.mixture.kind, config.mixture.floor, config.mixture.cap) == ("static", 0.1, 0.9)
    assert (config.job.nodes, config.job.time, config.job.qos) == (4, "00:10:00", "high")


def test_the_next_composition_does_not_remember_the_choice(own: Path) -> None:
    compose(["experiment=mine", "mixture=natural", "mixture.unit=samples"])

    assert compose(["experiment=mine"]).mixture.kind == "static"


def test_other_hydra_applications_of_the_process_are_left_alone(own: Path, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/main.yaml").write_text("seed: 1\n")

    with initialize_config_dir(str(tmp_path / "app"), version_base="1.3"):
        inside = compose(["experiment=mine", "mixture=natural", "mixture.unit=samples"])
        theirs = hydra_compose("main")
        providers = [
            element.provider for element in GlobalHydra.instance().config_loader().get_search_path().get_path()
        ]

    assert (inside.mixture.kind, theirs) == ("natural", {"seed": 1})
    with initialize_config_dir(str(tmp_path / "app"), version_base="1.3"):
        again = [element.provider for element in GlobalHydra.instance().config_loader().get_search_path().get_path()]
    assert not {"mixtera_hpc", "MIXTERA_CONF"} & {*providers, *again}


def test_the_hydra_application_has_the_same_rule(own: Path) -> None:
    words = ["experiment=based", "mixture=unimax", "dataplane=default", "mixture.unit=samples"]
    command = [sys.executable, "-m", "mixtera_hpc.training", "--cfg", "job", "--resolve", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = yaml.safe_load(done.stdout)

    assert printed == compose_plain(words)
    assert (printed["mixture"]["unimax_epochs"], printed["mixture"]["domains"]) == (4.0, [])
    assert (printed["dataplane"]["seq_len"], printed["job"]["nodes"]) == (1024, 4)
