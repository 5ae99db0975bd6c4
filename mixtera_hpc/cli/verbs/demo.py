"""`mixtera-hpc demo`: train, stop, resume, verify and report on real text, with nothing to configure.

Every step is a command that a user would type. The demo prints each command before it runs it.
"""

import itertools
import os
import shlex
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mixtera_hpc.cli import main as command_line
from mixtera_hpc.cli.demo_corpus import collect, write_corpus
from mixtera_hpc.cli.safe_output import terminal
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.launch.sweep.local_points import find_mpiexec
from mixtera_hpc.tokens.bpe_training import train_bpe
from mixtera_hpc.tokens.tokenizer import GigatokenTokenizer, HuggingFaceTokenizer, check_same_encoding

__all__ = ["arguments", "run"]

VOCAB_SIZE = 4096
TRAINING_STRIDE = 8
"""The tokenizer is trained on every eighth document."""
COMPARISON_STRIDE = 100
"""Every hundredth document is encoded by both tokenizer libraries and compared."""

RANKS = (4, 2)
"""Number of ranks before and after the checkpoint, where there is an mpiexec."""
EXIT_SAVED = 75

DATA_STEPS = (
    ("Index: the properties and the place of every sample", ["index", "build"]),
    ("Query: the size of every domain", ["query"]),
    ("Forecast: what the mixture will serve", ["plan"]),
)


def arguments(parser: ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="Hydra overrides of experiment=demo, e.g. training.num_steps=40",
    )
    parser.epilog = """\
Corpus and tokenizer are written to ./demo ($MIXTERA_DEMO), the run to ./runs ($MIXTERA_RUNS)."""


def run(args: Namespace) -> int:
    """Run every step; stop at the first one that fails."""
    demo = Path(os.environ.get("MIXTERA_DEMO", "demo"))
    overrides = ["experiment=demo", *args.overrides]
    _write_corpus(demo)
    _train_tokenizer(demo)
    for number, (title, verb) in enumerate(DATA_STEPS, start=3):
        _print_title(number, title)
        if code := _run_verb([*verb, *overrides]):
            return code
    return _train_and_report(overrides)


def _write_corpus(demo: Path) -> None:
    _print_title(1, "Real text: this machine's own Python installation")
    if (demo / "corpus").is_dir():
        _print_line(f"already in {demo / 'corpus'}")
        return
    _print_line("collecting source files, tests, stubs, headers, licences and documentation …")
    write_corpus(demo / "corpus", _print_line)


def _train_tokenizer(demo: Path) -> None:
    _print_title(2, "Tokenizer: a byte-level BPE trained on that text")
    path = demo / "tokenizer.json"
    if path.is_file():
        _print_line(f"already in {path}")
        return

    _print_line(f"training {VOCAB_SIZE} tokens …")
    train_bpe((document.text for document in itertools.islice(collect(), 0, None, TRAINING_STRIDE)), VOCAB_SIZE, path)
    texts = [document.text for document in itertools.islice(collect(), 1, None, COMPARISON_STRIDE)]
    definition = path.read_bytes()
    check_same_encoding(GigatokenTokenizer(definition), HuggingFaceTokenizer(definition), texts)
    _print_line(f"gigatoken and tokenizers agree on {len(texts)} documents")


def _train_and_report(overrides: Sequence[str]) -> int:
    config = compose(overrides)
    num_steps = config.training.num_steps
    run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-demo")
    folder = RunFolder(Path(config.run.root) / config.run.name / run_id)
    first, second = RANKS if find_mpiexec() else (1, 1)

    _print_title(6, f"Train: {first} ranks, until half of {num_steps} steps")
    stop_after = max(num_steps // 2, 1)
    code = _run_ranks(first, ["run", *overrides, f"run.id={run_id}", f"training.stop_after={stop_after}"])
    if code != EXIT_SAVED:
        return code or 1

    _print_title(7, f"Resume: the same run with {second} ranks")
    if code := _run_ranks(second, ["resume", str(folder.path), "training.stop_after=null"]):
        return code
    _print_title(8, "Verify: every planned sequence was consumed exactly once")
    if code := _run_verb(["trace", str(folder.path), "--verify"]):
        return code
    _print_title(9, "Report")
    return _run_verb(["report", str(folder.path)])


def _run_verb(words: list[str]) -> int:
    _print_line(f"$ mixtera-hpc {shlex.join(words)}")
    return command_line.main(words)


def _run_ranks(num_ranks: int, words: list[str]) -> int:
    """Run a verb on every rank and return the launcher's exit code."""
    mpiexec = find_mpiexec()
    prefix = [mpiexec, "-n", str(num_ranks)] if mpiexec is not None and num_ranks > 1 else []
    shown = [Path(word).name if word == mpiexec else word for word in prefix]
    _print_line(f"$ {shlex.join([*shown, 'mixtera-hpc', *words])}")
    command = [*prefix, sys.executable, "-u", "-m", "mixtera_hpc", *words]
    return subprocess.run(command, check=False).returncode


def _print_title(number: int, text: str) -> None:
    title = f"{number}. {text}"
    is_bold = sys.stdout.isatty()
    print(f"\n\033[1m{title}\033[0m" if is_bold else f"\n{title}", flush=True, file=terminal(sys.stdout))


def _print_line(text: str) -> None:
    print(f"   {text}", flush=True)
