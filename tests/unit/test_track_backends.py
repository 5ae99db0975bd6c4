"""The trackers of a run, and the names of the numbers that they record."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config, DataConfig, IndexConfig, TrackConfig
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.track.scalars import ScalarFlattener
from mixtera_hpc.track.tracker import open_tracker


def config(track: TrackConfig) -> Config:
    return Config(data=DataConfig(root="data"), index=IndexConfig(path="index.h5"), track=track)


@pytest.mark.parametrize("rank", [1, 7])
def test_ranks_other_than_0_write_nothing(tmp_path: Path, rank: int) -> None:
    tracker = open_tracker(config(TrackConfig(tensorboard=True)), RunFolder(tmp_path), rank=rank, attempt=1)
    tracker.log("steps", {"step": 0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(ConfigError, match=rf"track\.{package}=true.*\n.*pip install {package}"):
        open_tracker(config(TrackConfig(**{package: True})), RunFolder(tmp_path), rank=0, attempt=1)


def test_tensorboard_records_numbers_by_domain_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, steps in ((1, range(5)), (2, range(3, 6))):
        tracker = open_tracker(config(TrackConfig(tensorboard=True)), RunFolder(tmp_path), rank=0, attempt=attempt)
        tracker.log("attempts", {"step": steps[0], "domains": ["en", "de"]})
        for step in steps:
            tracker.log("steps", {"step": step, "domain_loss": [float(attempt), step]})
        tracker.close()
    scalars = EventAccumulator(str(tmp_path / "metrics" / "tensorboard")).Reload().Scalars("steps/domain_loss/en")
    assert [(e.step, e.value) for e in scalars] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_lists_over_domains_are_flattened_by_domain_name_and_undefined_numbers_are_skipped() -> None:
    flattener = ScalarFlattener()
    flattener.flatten("attempts", {"step": 0, "domains": ["en", "de"]})
    event = {
        "step": 3,
        "time": "now",
        "loss": np.float32(1.5),
        "domain_loss": [None, 2],
        "domain_tokens": np.array([1, 2]),
    }
    assert flattener.flatten("steps", event) == {
        "steps/loss": 1.5,
        "steps/domain_loss/de": 2,
        "steps/domain_tokens/en": 1,
        "steps/domain_tokens/de": 2,
    }
    assert flattener.flatten("comm", {"plan_s": float("nan"), "per_node": [4.0]}) == {"comm/per_node/0": 4.0}


def test_laws_and_averages_of_a_mixture_are_numbers_of_every_domain() -> None:
    flattener = ScalarFlattener()
    flattener.flatten("attempts", {"step": 0, "domains": ["en", "de"]})
    learned = {
        "domains": ["en", "de"],
        "alpha": np.array([0.3, np.nan]),
        "law_status": np.array([1, 0], np.int8),
        "average_weight": np.array([0.25, 0.75]),
        "hears_losses": True,
    }
    assert flattener.flatten("mixture", {"step": 8, **learned}) == {
        "mixture/alpha/en": 0.3,
        "mixture/law_status/en": 1.0,
        "mixture/law_status/de": 0.0,
        "mixture/average_weight/en": 0.25,
        "mixture/average_weight/de": 0.75,
    }
