"""Chooses how many examples the property tests try."""

import pytest
from hypothesis import settings

from .examples import ALL


def pytest_configure(config: pytest.Config) -> None:
    """Try all examples unless tests marked `full` are left out, as `make test` leaves them out."""
    if "not full" not in config.getoption("markexpr"):
        settings.register_profile(ALL)
        settings.load_profile(ALL)
