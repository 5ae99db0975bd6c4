"""The user's function from a raw row to what the trainer gets (`data.transform`): decoding, augmentation, tokens.

It runs where samples are read: in the reading thread, or in the processes of `dataplane.workers`. Its random numbers
depend on the seed, the step and the position in the global batch. So they are the same for any number of ranks and
workers, and after a resume, and differ whenever a sample is served again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.errors import USER_CODE_ERRORS, DataError
from mixtera_hpc.formats.user_functions import import_function

__all__ = ["CostedSample", "ServedSample", "Transform", "check_cost", "load_transform", "transformed"]

_PURPOSE = 2
"""Last word of the counter: these random words are not those of the shuffles, see `core.order`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSample:
    """A sample that is served: the second argument of a `data.transform` function."""

    seed: int
    """`dataplane.seed`."""
    step: int
    """Step of the data."""
    position: int
    """Position in the global batch."""
    shard: str
    """Path of the shard, below the data root where there is a single one."""
    row: int
    """Number of the row in its shard."""
    root: Path
    """Folder of the data set."""

    def rng(self) -> np.random.Generator:
        """Return a new generator of this sample's random numbers."""
        counter = np.array([0, self.position, self.step, _PURPOSE], np.uint64)
        return np.random.Generator(np.random.Philox(key=np.array([self.seed, 0], np.uint64), counter=counter))

    def read_bytes(self, path: str) -> bytes:
        """Read a file below the folder of the data set, for example an image that a row names.

        Raises:
            DataError: the path leads out of the folder, or the file cannot be read.
        """
        root = self.root.resolve()
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"{self.shard} row {self.row} names the file {path!r}, which is not below {self.root}.")
        try:
            return file.read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.shard} row {self.row} names the file {path!r}, but {file} cannot be read: {error.strerror}.\n"
                "  Copy the file there, or leave the row out with query.where."
            ) from None


@dataclass(frozen=True, slots=True)
class CostedSample:
    """A sample and its cost. A `data.transform` function returns it with `dataplane.sample_cost=transform`."""

    sample: Any
    """The sample that the trainer gets."""
    cost: float
    """At least 0 and at most `dataplane.sample_budget`, for example the number of text and image tokens."""


Transform = Callable[[Any, ServedSample], Any]


def load_transform(path: str | None) -> Transform | None:
    """Import the function of `data.transform`; None without one.

    Raises:
        ConfigError: it cannot be imported.
    """
    return None if path is None else import_function(path, "data.transform")  # type: ignore[return-value]


def transformed(transform: Transform, payload: Any, sample: ServedSample) -> Any:
    """Return what the function makes of a raw row.

    Raises:
        DataError: the function raised an exception; the message names the row.
    """
    try:
        return transform(payload, sample)
    except DataError:
        raise
    except USER_CODE_ERRORS as error:
        name = f"{transform.__module__}.{getattr(transform, '__qualname__', type(transform).__name__)}"
        raise DataError(
            f"data.transform={name} failed for {sample.shard} row {sample.row} (step {sample.step}, position "
            f"{sample.position}): {type(error).__name__}: {error}.\n"
            "  Correct the function, or leave the row out with query.where."
        ) from error


def check_cost(result: Any, sample: ServedSample, budget: float) -> None:
    """Raise DataError unless a function has returned a `CostedSample` that a micro-batch can hold."""
    place = f"{sample.shard} row {sample.row} (step {sample.step}, position {sample.position})"
    if not isinstance(result, CostedSample):
        raise DataError(
            f"data.transform returned a {type(result).__name__} for {place}, but with dataplane.sample_cost=transform "
            "it has to return mixtera_hpc.CostedSample(sample, cost).\n  Correct the function, or set "
            "dataplane.sample_cost to a number property."
        )
    if not isinstance(result.cost, int | float | np.integer | np.floating) or not 0 <= result.cost <= budget:
        raise DataError(
            f"data.transform gave {place} the cost {result.cost!r}, expected a number from 0 to "
            f"dataplane.sample_budget={budget:g}.\n"
            "  Raise the budget, make the sample smaller in the function, or leave the row out with query.where."
        )
