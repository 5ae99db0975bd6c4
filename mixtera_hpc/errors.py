"""The exceptions users meet, and the exit code each one becomes.

MixteraError            1   ours: a bug or a broken machine
 ├─ UserError           2   something the user wrote or gave; the message says what, got, rule, do
 │   ├─ ConfigError         a config key or value
 │   ├─ PropertyIndexError  an index file: missing, stale, truncated, of another version or tokenizer
 │   ├─ MixtureError        domains, weights or exhaustion of a mixture
 │   ├─ DataError           a shard or a sample that cannot be read
 │   └─ LaunchError         a job that cannot be rendered, submitted or found
 ├─ CommError           1   ranks disagree, or the MPI launch is wrong
 └─ SavedAndStopped    75   not a failure: state is saved, run me again
"""

from typing import ClassVar

__all__ = [
    "CommError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "MixteraError",
    "MixtureError",
    "PropertyIndexError",
    "SavedAndStopped",
    "UserError",
    "did_you_mean",
    "is_clean_exit",
]


class MixteraError(Exception):
    """Base of every exception this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class UserError(MixteraError):
    """The user's input is wrong; the message says what, got, rule and do."""

    exit_code = 2


class ConfigError(UserError):
    """A config key or value is missing, unknown or out of range."""


class PropertyIndexError(UserError):
    """A property index cannot be used as it is."""


class MixtureError(UserError):
    """A mixture cannot be served as it is written."""


class DataError(UserError):
    """A shard or a sample cannot be read."""


class LaunchError(UserError):
    """A job cannot be rendered, submitted, found or continued."""


class CommError(MixteraError):
    """Ranks disagree, or were started the wrong way."""


class SavedAndStopped(MixteraError):
    """State was saved after an agreed stop; running again continues."""

    exit_code = 75


def is_clean_exit(error: BaseException) -> bool:
    """Whether `error` is how a program leaves that has done, or saved, its work, on every rank alike: `sys.exit(75)`, say."""
    return isinstance(error, SavedAndStopped) or (isinstance(error, SystemExit) and error.code in (None, 0, 75))


def did_you_mean(got: str, valid: list[str] | tuple[str, ...]) -> str:
    """A hint naming near misses of `got` among `valid`, or all of them when they are few; empty when there are none."""
    import difflib

    near = difflib.get_close_matches(got, valid, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    if valid and len(valid) <= 12:
        return f" Known: {', '.join(repr(v) for v in valid)}."
    return ""
