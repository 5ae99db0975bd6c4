"""Numbers of examples of property tests."""

from hypothesis import HealthCheck, settings

ALL = "all examples"
"""Profile of `make test-full`; see `conftest.py`."""
SHARE = 4


def whole_runs(examples: int) -> settings:
    """Return settings for a test whose examples open several data planes each: a fourth of them in `make test`."""
    tried = examples if settings.get_current_profile_name() == ALL else max(examples // SHARE, 3)
    return settings(max_examples=tried, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
