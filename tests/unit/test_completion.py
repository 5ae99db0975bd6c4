"""Completion of command lines, and the code that shells run for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.cli.answers.completion_answer import completions
from mixtera_hpc.cli.main import main
from mixtera_hpc.cli.verbs.completion import SCRIPTS


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mixtera-hpc wat", ["watch"]),
        ("mixtera-hpc submit cluster=cl", ["cluster=clariden"]),
        ("mixtera-hpc submit job.no", ["job.nodes="]),
        ("mixtera-hpc submit mixture.unit=", ["mixture.unit=tokens", "mixture.unit=samples"]),
        ("mixtera-hpc submit --dr", ["--dry-run"]),
        ("mixtera-hpc index build --ag", ["--again"]),
        ("mixtera-hpc index ref", ["refresh"]),
        ("mixtera-hpc runs --state COM", ["COMPLETED"]),
        ("mixtera-hpc nothing x", []),
    ],
)
def test_the_last_word_is_completed(line: str, expected: list[str]) -> None:
    assert completions(line) == expected


def test_runs_are_completed_by_name_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "trial" / "20261129-101112-abcd"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    monkeypatch.setenv("MIXTERA_RUNS", str(tmp_path))

    assert completions("mixtera-hpc watch ") == ["trial", "20261129-101112-abcd"]
    assert completions("mixtera-hpc logs tr") == ["trial"]


CALLS = {
    "bash": 'COMP_LINE="mixtera-hpc submit cluster=cl" COMP_POINT=29; _mixtera_hpc 2>/dev/null; echo "${COMPREPLY[@]}"',
    "zsh": "words=(mixtera-hpc submit cluster=cl); CURRENT=3; _mixtera_hpc",
    "fish": 'complete -C "mixtera-hpc submit cluster=cl"',
}
BEFORE = {"bash": "", "zsh": 'compdef() { : }\ncompadd() { print -r -- "${@[-1]}" }\n', "fish": ""}


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_the_code_completes_in_its_shell(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = tmp_path / "mixtera-hpc"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mixtera_hpc "$@"\n')
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    done = subprocess.run(
        [shell, "-c", BEFORE[shell] + SCRIPTS[shell] + CALLS[shell]],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path)},
    )

    # bash replaces only what follows the =.
    assert done.stdout.split()[-1] == ("clariden" if shell == "bash" else "cluster=clariden"), done.stderr


def test_installing_writes_where_the_shell_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    (tmp_path / ".zshrc").write_text("alias ll='ls -l'  ")
    assert main(["completion", "--install"]) == 0
    assert main(["completion", "fish", "--install"]) == 0
    assert main(["completion", "zsh", "--install"]) == main(["completion", "zsh", "--install"]) == 0

    assert (tmp_path / ".local/share/bash-completion/completions/mixtera-hpc").read_text() == SCRIPTS["bash"]
    assert (tmp_path / ".config/fish/completions/mixtera-hpc.fish").read_text() == SCRIPTS["fish"]
    assert (tmp_path / ".zshrc").read_text().count("mixtera-hpc completion zsh") == 1
    assert (tmp_path / ".zshrc").read_text().startswith("alias ll='ls -l'  \n"), "what was there stays as it is"
    assert str(tmp_path) in capsys.readouterr().out


def test_an_unknown_shell_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")

    assert main(["completion"]) == 2
    assert "bash, fish, zsh" in capsys.readouterr().err
