"""`sys.exit()` in a function or module of the user's: refused like any exception, never an end with exit code 0."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.errors import ConfigError, UserError, exit_code_of

MODULES = {
    "exiting": "import sys\ndef leaves(*arguments): sys.exit(0)\n",
    "script": "import sys\ndef function(*arguments): return 1\nsys.exit(0)\n",
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "parser": {"parser": "exiting.leaves"},
    "parser of a script": {"parser": "script.function"},
    "text": {"text": "function:exiting.leaves"},
    "text of a script": {"text": "function:script.function"},
    "property": {"properties": {"p": {"function": "exiting.leaves"}}},
    "property over rows": {"properties": {"p": {"function": "exiting.leaves", "over": "rows"}}},
    "property of a script": {"properties": {"p": {"function": "script.function"}}},
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(3)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_build_names_the_function(name: str, answers: Callable[..., dict[str, str]]) -> None:
    refused = answers(**FUNCTIONS[name])["build"]
    assert refused.startswith(("ConfigError", "DataError", "UserFunctionError")) and "SystemExit: 0" in refused
    assert ("script" if "script" in name else "exiting.leaves") in refused


def test_a_mixing_algorithm_in_a_script_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"script cannot be imported: SystemExit: 0") as raised:
        make_algorithm("script.Algorithm", {})
    assert exit_code_of(raised.value) == 2


def test_a_transform_in_a_script_is_refused() -> None:
    from mixtera_hpc.dataplane.reading.sample_transform import load_transform

    config = compose(["data.root=/data", "mixture.unit=samples", "data.transform=script.function"])
    with pytest.raises(UserError, match=r"data\.transform is 'script\.function', but script cannot be imported"):
        load_transform(config.data.transform)
