"""The exceptions that users see, and the exit code of each.

MixteraError                1   an internal error, or a broken machine
├─ UserError                2   invalid input; the message says what is wrong, the value, the rule and what to do
│  ├─ ConfigError               a config key or value
│  ├─ PropertyIndexError        an index file: missing, stale, truncated, or built by another version or tokenizer
│  ├─ MixtureError              the domains, the weights or the exhaustion of a mixture
│  ├─ DataError                 a shard or a sample that cannot be read
│  └─ LaunchError               a job that cannot be rendered, submitted, found or continued, or whose ranks do not
│                               see each other
├─ CommError                1   ranks disagree, or one of them is lost
└─ SavedAndStopped         75   not a failure: the state is saved, and running again continues
"""

import difflib
import errno
import importlib.util
import os
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "EXTRAS",
    "USER_CODE_ERRORS",
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
    "exit_code_of",
    "explain_system_error",
    "is_clean_exit",
    "list_names",
    "missing_package",
    "pluralize",
    "require_package",
]

EXTRAS = {
    "mpi4py": "mpi",
    "torch": "train",
    "submitit": "slurm",
    "matplotlib": "report",
    "tensorboard": "track",
    "wandb": "track",
    "torchdata": "integrations",
    "jinja2": "chat",
}
"""Optional package → the extra of `pyproject.toml` that installs it."""

USER_CODE_ERRORS = (Exception, SystemExit, GeneratorExit)
"""Errors of a function of the user's. A `sys.exit()` in it must not end the program with exit code 0."""

EXIT_INTERRUPTED = 130
"""Exit code of a process that ended on SIGINT, as shells report it."""


_SYSTEM_CURES = {
    "Make room, or choose another place, and run the command again.": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "Make it accessible, or choose another place.": (errno.EACCES, errno.EPERM, errno.EROFS),
    "Raise the limit of open files (ulimit -n).": (errno.EMFILE, errno.ENFILE),
    "Choose a shorter name.": (errno.ENAMETOOLONG,),
    "Check the file system, and run the command again.": (
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.ELOOP,
    ),
}
"""Cure → the errors that it is for. Others, such as a missing file, may be faults of this package: they keep their
traceback."""
_SYSTEM_CURE_OF = {number: cure for cure, numbers in _SYSTEM_CURES.items() for number in numbers}


class MixteraError(Exception):
    """Base class of every exception that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class UserError(MixteraError):
    """The input is invalid; the message says what is wrong, the value, the rule and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A config key or value is missing, unknown or out of range."""


class PropertyIndexError(UserError):
    """A property index is missing, stale, damaged, or does not fit the run."""


class MixtureError(UserError):
    """The domains or weights of a mixture are invalid, or its data runs out."""


class DataError(UserError):
    """A shard or a sample cannot be read."""


class LaunchError(UserError):
    """A job cannot be rendered, submitted, found or continued, or its ranks do not see each other."""


class CommError(MixteraError):
    """Ranks disagree, or one of them is lost."""


class SavedAndStopped(MixteraError):
    """All ranks agreed to stop and the state was saved; running again continues."""

    exit_code = 75


def is_clean_exit(error: BaseException) -> bool:
    """Return True for a clean exit (finished or saved) that all ranks take together, such as `sys.exit(75)`."""
    if isinstance(error, SavedAndStopped):
        return True
    return isinstance(error, SystemExit) and error.code in (None, 0, SavedAndStopped.exit_code)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that `error` ends."""
    if isinstance(error, MixteraError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return _system_exit_code(error)
    return 1


def _system_exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) else 1


def did_you_mean(got: str, valid: list[str] | tuple[str, ...]) -> str:
    """Return a hint for an error message: near misses of `got`, else all of `valid` if they are few, else nothing.

    The hint starts with a space, so that it can be appended to a sentence.
    """
    near = difflib.get_close_matches(got, valid, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(repr(n) for n in near)}?"
    if valid and len(valid) <= 12:
        return f" Known: {', '.join(repr(v) for v in valid)}."
    return ""


def pluralize(number: int, noun: str) -> str:
    """Return a number and its noun for a message: `1 row`, `1,234 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def list_names(names: Sequence[str], limit: int) -> str:
    """Return at most `limit` names for a message: `a, b and 3 more`."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """Return the error for users if an optional package is not installed, None for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return UserError(
        f"The package {package} is not installed, which this needs.\n"
        f"  Install it: pip install 'mixtera-hpc[{EXTRAS[package]}]'"
    )


def require_package(package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        UserError: It is not; the message names the extra that installs it.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # `sys.modules[package]` is None, which forbids the import.
        spec = None
    if spec is None:
        raise missing_package(ModuleNotFoundError(name=package)) or ModuleNotFoundError(name=package)


def explain_system_error(error: OSError | MemoryError | RuntimeError) -> str | None:
    """Return the message for an error that a user can cure; None for any other."""
    if not isinstance(error, OSError):
        if isinstance(error, MemoryError) or "start new thread" in str(error):
            return f"{error or 'No memory'}.\n  Raise the limits of memory and processes of the job (ulimit -a)."
        return None
    if error.errno not in _SYSTEM_CURE_OF:
        return None
    # A failed write names no file, and some calls name a descriptor.
    place = f"{error.filename}: " if isinstance(error.filename, str | os.PathLike) else ""
    return f"{place}{os.strerror(error.errno)}.\n  {_SYSTEM_CURE_OF[error.errno]}"
