"""Any text that a user configures reaches the batch script as itself, or is refused before."""

import itertools
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtera_hpc.config.check_script import script_problems
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.launch.sbatch_script import SbatchJob, render_script

from .examples import FIXTURES_TOO

HOSTILE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40),
    st.lists(
        st.sampled_from(
            ["$(id)", "`id`", "'", '"', "\n", "\\", ";", "#SBATCH", "$HOME", " ", "a", "END_OF_MIXTERA_FILE"]
        ),
        min_size=1,
        max_size=6,
    ).map("".join),
)


@pytest.fixture(scope="module")
def base() -> Config:
    return compose(["data.root=/data", "mixture.unit=samples", "cluster=dev", "run.name=trial", "run.root=/runs"])


def configured(base: Config, place: str, text: str) -> Config:
    """Return `base` with `text` at one place."""
    job = base.job
    cluster = base.cluster
    changes: dict[str, Callable[[], Config]] = {
        "name": lambda: replace(base, job=replace(job, name=text)),
        "comment": lambda: replace(base, job=replace(job, comment=text)),
        "command": lambda: replace(base, job=replace(job, command=["train", text])),
        "srun_args": lambda: replace(base, job=replace(job, srun_args=[text])),
        "env": lambda: replace(base, cluster=replace(cluster, env={"NAME": text})),
        "wrapper": lambda: replace(base, cluster=replace(cluster, wrapper=[text])),
        "sbatch": lambda: replace(base, cluster=replace(cluster, sbatch={"licenses": text})),
    }
    return changes[place]()


def sbatch_parameters(script: str) -> list[str]:
    """Return the parameters that sbatch reads: it stops at the first line that is neither a comment nor empty."""
    head = itertools.takewhile(lambda line: not line.strip() or line.startswith("#"), script.split("\n"))
    return [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("place", ["name", "comment", "command", "srun_args", "env", "wrapper", "sbatch"])
@settings(max_examples=15, deadline=None, suppress_health_check=FIXTURES_TOO)
@given(text=HOSTILE)
@example(text="x\ntouch /tmp/owned")
@example(text="x'\n#SBATCH --nodes=9")
def test_a_configured_text_stays_one_word_or_is_refused(base: Config, place: str, text: str) -> None:
    config = configured(base, place, text)
    if script_problems(config):
        return
    script = render_script(SbatchJob(config=config, folder=Path("/runs/trial/1")))
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=600)
    assert checked.returncode == 0, checked.stderr
    # The script is read as sbatch and the shell read it: the text is a part of exactly one word.
    parameters = sbatch_parameters(script)
    if place in ("name", "comment", "sbatch"):
        assert any(text in word for line in parameters for word in shlex.split(line))
    else:
        assert any(text in word for word in shlex.split(script, comments=True))
    plain = render_script(SbatchJob(config=configured(base, place, "plain"), folder=Path("/runs/trial/1")))
    assert len(parameters) == len(sbatch_parameters(plain))


@settings(max_examples=25, deadline=None)
@given(words=st.lists(HOSTILE, max_size=3))
@example(words=["a", "END_OF_MIXTERA_FILE", "touch owned"])
def test_recorded_overrides_end_where_they_should(base: Config, words: list[str]) -> None:
    script = render_script(SbatchJob(config=base, overrides=words))
    start = script.index('cat >"$folder/overrides.txt" <<\'')
    end = script[start:].split("'")[1]
    body = script[start:].partition("\n")[2]
    recorded = ("\n" + body).partition(f"\n{end}\n")[0]
    assert recorded == "".join(f"\n{word}" for word in words)
