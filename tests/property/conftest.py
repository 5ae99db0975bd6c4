"""Chooses how many and which examples the property tests try, without limits on their time."""

import pytest
from hypothesis import settings

from .examples import ALL, REPEATABLE, UNLIMITED


def pytest_configure(config: pytest.Config) -> None:
    """Try all examples, new ones in every run, unless tests marked `full` are left out, as `make test` does."""
    # No test may fail because a machine is busy, and none by chance.
    settings.register_profile("default", REPEATABLE)
    settings.load_profile("default")
    if "not full" not in config.getoption("markexpr"):
        settings.register_profile(ALL, UNLIMITED)
        settings.load_profile(ALL)
