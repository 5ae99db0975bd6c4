"""Forecasts of very long runs end."""

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.trace.forecast import forecast_mixture, longest_forecast

SMALL = ["dataplane.seq_len=16", "dataplane.global_batch_size=1024", "mixture=natural"]
STEPS = 10**21


def test_more_steps_than_a_forecast_takes_are_refused_with_the_number(
    collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*collection, *SMALL, "mixture.on_exhausted=repeat", "mixture.max_epochs=null"]
    assert main(["plan", *words, f"training.num_steps={STEPS}"]) == 2
    assert f"at most {2**25} steps of this batch" in capsys.readouterr().err
    source = open_source(compose(words), Local())
    assert longest_forecast(source) == 2**25
    with pytest.raises(ConfigError, match=rf"Set plan\.steps={2**25}"):
        forecast_mixture(source, 2**25 + 1)


def test_data_that_ends_is_forecast_to_its_end(collection: list[str]) -> None:
    ending = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=2", "dataplane.global_batch_size=8"]
    source = open_source(compose([*collection, *SMALL, *ending]), Local())
    forecast = forecast_mixture(source, 10**18)
    assert 0 < forecast.num_steps < 10**6
    assert all(domain.epochs == pytest.approx(2, abs=0.5) for domain in forecast.domains)
