"""The exception tree at the top of `errors.py` shows the classes and exit codes that exist."""

import inspect
import re

import pytest

from mixtera_hpc import errors
from mixtera_hpc.errors import MixteraError, SavedAndStopped, did_you_mean, exit_code_of, is_clean_exit, pluralize

LINE = re.compile(r"^(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<code>\d+)? ")


def drawn_classes() -> dict[str, tuple[str | None, int]]:
    """Return (parent, exit code) of every class in the drawing; a class without a code has that of its parent."""
    drawn: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := LINE.match(line):
            depth = len(match["indent"]) // 3
            parent = path[depth - 1] if depth else None
            code = int(match["code"]) if match["code"] else drawn[str(parent)][1]
            drawn[match["name"]] = (parent, code)
            path[depth:] = [match["name"]]
    return drawn


def test_the_drawing_shows_every_exception_with_its_parent_and_exit_code() -> None:
    classes = {name: c for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, MixteraError)}
    expected = {
        name: (None if c is MixteraError else c.__bases__[0].__name__, c.exit_code) for name, c in classes.items()
    }
    assert drawn_classes() == expected


@pytest.mark.parametrize(
    ("error", "is_clean", "code"),
    [
        (SavedAndStopped("saved"), True, 75),
        (SystemExit(75), True, 75),
        (SystemExit(0), True, 0),
        (SystemExit(), True, 0),
        (SystemExit(3), False, 3),
        (SystemExit("message"), False, 1),
        (errors.ConfigError("wrong"), False, 2),
        (errors.CommError("ranks disagree"), False, 1),
        (KeyboardInterrupt(), False, 130),
        (ValueError("bug"), False, 1),
    ],
)
def test_the_exit_code_of_an_exception_and_whether_it_is_a_clean_exit(
    error: BaseException, is_clean: bool, code: int
) -> None:
    assert is_clean_exit(error) == is_clean
    assert exit_code_of(error) == code


def test_a_hint_names_near_misses_or_else_a_few_valid_values() -> None:
    assert did_you_mean("langauge", ["language", "source"]) == " Did you mean 'language'?"
    assert did_you_mean("x", ["language", "source"]) == " Known: 'language', 'source'."
    assert did_you_mean("x", [f"value_{n}" for n in range(13)]) == ""
    assert did_you_mean("x", []) == ""


def test_a_number_and_its_noun_agree() -> None:
    assert [pluralize(n, "row") for n in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
