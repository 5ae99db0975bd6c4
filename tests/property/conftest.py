"""Chooses how many examples the property tests try, without limits on their time."""

import pytest
from hypothesis import settings

from .examples import ALL, UNLIMITED


def pytest_configure(config: pytest.Config) -> None:
    """Try all examples unless tests marked `full` are left out, as `make test` leaves them out."""
    # No test may fail because a machine is busy.
    settings.register_profile("default", UNLIMITED)
    settings.load_profile("default")
    if "not full" not in config.getoption("markexpr"):
        settings.register_profile(ALL, UNLIMITED)
        settings.load_profile(ALL)
