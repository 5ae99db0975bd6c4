"""Texts of data never control the terminal, whichever verb prints them."""

import argparse
import errno
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import VERBS, main
from mixtera_hpc.cli.safe_output import escaped_output
from mixtera_hpc.cli.verbs import status
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.report.safe_text import escape_controls

HOSTILE = "\x1b]0;owned\x07\x9b2J\u202egnp.exe"
SERVED = ["dataplane.seq_len=16", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2", "dataplane.audit=true"]


def test_controls_are_shown_as_json_shows_them() -> None:
    assert escape_controls("a\tb\n\x1b[2J\x7f\x85\u202e é") == "a\tb\n\\u001b[2J\\u007f\\u0085\\u202e é"
    assert json.loads(escape_controls(json.dumps(HOSTILE, ensure_ascii=False))) == HOSTILE


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_of_the_output_lacks_is_escaped(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
    with escaped_output():
        print(json.dumps({"domain": "ü ━ 😀"}, ensure_ascii=False), flush=True)
    printed = output.getvalue().decode(encoding)
    assert json.loads(printed) == {"domain": "ü ━ 😀"}
    assert ("ü" in printed) == (encoding == "latin-1")


@pytest.fixture(scope="module")
def hostile(collection: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], RunFolder]:
    """Return overrides of a collection whose names and texts hold escape sequences, and a run of it."""
    root = tmp_path_factory.mktemp("hostile")
    shards = root / f"data{HOSTILE}"
    shards.mkdir()
    rows = [{"text": f"{HOSTILE} text {i} " * 5, "source": f"web{HOSTILE}" if i % 2 else "books"} for i in range(64)]
    (shards / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = next(word for word in collection if word.startswith("dataplane.tokenizer="))
    words = [
        *(f"data.root={root}", f"index.path={root}/index.h5", "data.properties.source=source", tokenizer),
        *("mixture.group_by=[source]", *SERVED),
    ]
    assert main(["index", "build", *words]) == 0
    run = RunFolder(root / "runs" / "mine" / "1")
    with DataPlane.open(compose(words), Local(), folder=run) as plane:
        for _, batch in zip(range(4), plane, strict=False):
            plane.record(batch, 1.0 + batch.tokens[:, 1:] % 7)
    return words, run


COMMANDS = [
    ["index", "build", "COLLECTION", "index.path=OTHER"],
    ["index", "inspect", "COLLECTION"],
    ["index", "verify", "COLLECTION"],
    ["index", "duplicates", "COLLECTION"],
    ["query", "COLLECTION"],
    ["query", "COLLECTION", f"query.where=source == 'x{HOSTILE}'"],
    ["plan", "COLLECTION"],
    ["plan", "COLLECTION", "plan.steps=2", "--json"],
    ["mixture", "show", "RUN"],
    ["trace", "RUN", "--step", "0"],
    ["trace", "RUN", "--step", "0", "--show"],
    ["trace", "RUN", "--verify"],
    ["trace", "RUN", "--domain", f"web{HOSTILE}", "--steps", "0..1", "--json"],
    ["status", "RUN"],
    ["report", "RUN"],
    ["logs", "RUN"],
    ["resume", "RUN"],
    ["cancel", "RUN"],
    ["fork", "RUN", "--step", "2", "--set", f"RUN{HOSTILE}"],
    ["runs", f"name={HOSTILE}"],
    ["watch", "RUN", "--once"],
    ["watch", f"RUN{HOSTILE}"],
    ["completion", f"bash{HOSTILE}"],
    ["swarm", "fit", f"RUN{HOSTILE}"],
    ["migrate", "mosaic", f"RUN{HOSTILE}", "--out", "TOKENIZER"],
    ["tokenize", "COLLECTION"],
    ["check", f"experiment={HOSTILE}"],
    ["submit", "COLLECTION", "--dry-run"],
    ["sweep", "COLLECTION", "training.seed=1,2", "--dry-run"],
    ["run", "COLLECTION", "training.num_layers=0"],
    ["tokenizer", "train", "COLLECTION", "--out", "TOKENIZER", "--vocab-size", "300"],
    [f"verb{HOSTILE}"],
]


@pytest.mark.parametrize(
    "words",
    COMMANDS,
    ids=lambda words: " ".join(words[:2] + words[4:])[:30].encode("ascii", "ignore").decode(),
)
def test_no_verb_prints_a_control_character(
    hostile: tuple[list[str], RunFolder], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    collection, run = hostile
    argv: list[str] = []
    for word in words:
        if word == "COLLECTION":
            argv += collection
        else:
            word = word.replace("RUN", str(run.path)).replace("OTHER", f"{tmp_path}/other.h5")
            argv.append(word.replace("TOKENIZER", f"{tmp_path}/tokenizer.json"))
    capfd.readouterr()
    try:
        assert main(argv) in (0, 2)
    except SystemExit as error:
        assert error.code == 2
    printed = capfd.readouterr()
    output = printed.out + printed.err
    assert output
    controls = {c for c in output if unicodedata.category(c) == "Cc" or c in "\u202e"} - {"\n", "\t"}
    assert not controls, output[:500]


def test_every_verb_is_tried() -> None:
    assert {words[0] for words in COMMANDS} >= set(VERBS) - {"demo", "doctor"}, "these read no data and no names"


def test_no_page_of_a_report_holds_a_control_character(hostile: tuple[list[str], RunFolder]) -> None:
    _, run = hostile
    assert main(["report", str(run.path)]) == 0
    page = (run.report / "report.html").read_text()
    assert "\\u001b" in page
    assert not {c for c in page if unicodedata.category(c) == "Cc" or c == "\u202e"} - {"\n", "\t"}


class FullDisk(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_ends_nothing_and_an_answer_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(args: argparse.Namespace) -> int:
        print("progress", file=sys.stderr, flush=True)
        return 0

    monkeypatch.setattr(status, "run", log)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", FullDisk())
        assert main(["status"]) == 0
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", FullDisk())
        assert main(["status", "--root", str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_a_verb_works_with_closed_standard_streams(closed: str, tmp_path: Path) -> None:
    """A file that is opened must not get the number of a closed stream, and programs that are started have streams."""
    program = (
        "import os; from mixtera_hpc.cli.main import main; code = main(['status', '--root', os.environ['ROOT']]); "
        "number = os.open('/dev/null', os.O_RDONLY); code |= os.system('echo text') and 8; "
        "os._exit(code or (0 if number > 2 else 9))"
    )
    command = ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, program]
    done = subprocess.run(command, env=os.environ | {"ROOT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
