"""Numbers of examples of property tests."""

from hypothesis import HealthCheck, settings

ALL = "all examples"
"""Profile of `make test-full`; see `conftest.py`."""
SHARE = 4
TIMED = HealthCheck.too_slow
"""The health check that fails on a busy machine."""
UNLIMITED = settings(deadline=None, suppress_health_check=[TIMED])
"""Settings of all property tests: none fails because a machine is busy."""
REPEATABLE = settings(UNLIMITED, derandomize=True)
"""Settings that try the same examples in every run, so that a change passes or fails for its own sake."""
FIXTURES_TOO = [TIMED, HealthCheck.function_scoped_fixture]
"""Health checks that a test with the fixtures of a function turns off."""


def whole_runs(examples: int) -> settings:
    """Return settings for a test whose examples open several data planes each: a fourth of them in `make test`."""
    tried = examples if settings.get_current_profile_name() == ALL else max(examples // SHARE, 3)
    return settings(max_examples=tried, deadline=None, suppress_health_check=FIXTURES_TOO)
