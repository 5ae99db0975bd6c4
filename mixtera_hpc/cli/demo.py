"""`mixtera-hpc demo`: the main job, end to end, on real text, with nothing to configure.

Every step is one that a user would type; the demo prints the command before it runs it.
"""

import argparse
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["arguments", "run"]

VOCAB_SIZE = 4096
RANKS = (4, 2)
"""Before and after the checkpoint."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of experiment=demo, e.g. training.num_steps=40")


def run(args: argparse.Namespace) -> int:
    demo = Path(os.environ.get("MIXTERA_DEMO", "demo"))
    overrides = ["experiment=demo", *args.overrides]
    _collect(demo)
    _tokenizer(demo)
    for number, (title, verb) in enumerate(_LOOKS, start=3):
        _title(number, title)
        if code := _verb([*verb, *overrides]):
            return code
    return _train_and_report(overrides)


_LOOKS = (
    ("Index: what every sample is and where it lies", ["index", "build"]),
    ("Query: how much there is of every domain", ["query"]),
    ("Forecast: what the mixture will serve", ["plan"]),
)


def _collect(demo: Path) -> None:
    _title(1, "Real text: this machine's own Python installation")
    if (demo / "corpus").is_dir():
        _say(f"already in {demo / 'corpus'}")
        return
    from mixtera_hpc.cli.demo_corpus import write_corpus

    _say("collecting source files, tests, stubs, headers, licences and documentation …")
    write_corpus(demo / "corpus", _say)


def _tokenizer(demo: Path) -> None:
    _title(2, "Tokenizer: a byte-level BPE trained on it")
    path = demo / "tokenizer.json"
    if path.is_file():
        _say(f"already in {path}")
        return
    from mixtera_hpc.cli.demo_corpus import collect
    from mixtera_hpc.tokens.bpe_training import train_bpe
    from mixtera_hpc.tokens.tokenizer import GigatokenTokenizer, HuggingFaceTokenizer, check_same_encoding

    _say(f"training {VOCAB_SIZE} tokens …")
    train_bpe((d.text for d in itertools.islice(collect(), 0, None, 8)), VOCAB_SIZE, path)
    sample = [d.text for d in itertools.islice(collect(), 1, None, 100)]
    definition = path.read_bytes()
    check_same_encoding(GigatokenTokenizer(definition), HuggingFaceTokenizer(definition), sample)
    _say(f"gigatoken and tokenizers agree on {len(sample)} documents")


def _train_and_report(overrides: Sequence[str]) -> int:
    from datetime import UTC, datetime

    from mixtera_hpc.config.compose import compose
    from mixtera_hpc.config.run_folder import RunFolder

    config = compose(overrides)
    steps = config.training.num_steps
    folder = RunFolder(Path(config.run.root) / config.run.name / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-demo"))
    first, second = RANKS if _mpiexec() else (1, 1)
    _title(6, f"Train: {first} ranks, until half of {steps} steps")
    begin = ["run", *overrides, f"run.id={folder.run_id}", f"training.stop_after={max(steps // 2, 1)}"]
    code = _launch(first, begin)
    if code != 75:
        return code or 1
    _title(7, f"Resume: the same run with {second} ranks")
    if code := _launch(second, ["resume", str(folder.path), "training.stop_after=null"]):
        return code
    _title(8, "Verify: every planned sequence was consumed exactly once")
    if code := _verb(["trace", str(folder.path), "--verify"]):
        return code
    _title(9, "Report")
    return _verb(["report", str(folder.path)])


def _verb(words: list[str]) -> int:
    from mixtera_hpc.cli.main import main

    _say(f"$ mixtera-hpc {shlex.join(words)}")
    return main(words)


def _launch(num_ranks: int, words: list[str]) -> int:
    """Run a verb on every rank; returns the launcher's exit code."""
    prefix = [_mpiexec() or "", "-n", str(num_ranks)] if num_ranks > 1 else []
    shown = [Path(prefix[0]).name, *prefix[1:], "mixtera-hpc", *words] if prefix else ["mixtera-hpc", *words]
    _say(f"$ {shlex.join(shown)}")
    return subprocess.run([*prefix, sys.executable, "-u", "-m", "mixtera_hpc", *words], check=False).returncode


def _mpiexec() -> str | None:
    """The launcher of this environment's MPI, if it has one."""
    own = Path(sys.executable).with_name("mpiexec")
    return str(own) if own.exists() else shutil.which("mpiexec")


def _title(number: int, text: str) -> None:
    print(f"\n\033[1m{number}. {text}\033[0m" if sys.stdout.isatty() else f"\n{number}. {text}", flush=True)


def _say(text: str) -> None:
    print(f"   {text}", flush=True)
