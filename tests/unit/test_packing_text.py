"""`plan` and `report` say what packing cuts and what balancing changes."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.cli.verbs.submit import check_data
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import dump_yaml, load_yaml
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.launch.prepare import prepare_run
from mixtera_hpc.testing.thread_ranks import ThreadCommunicator, run_ranks

PACKED = [
    *("dataplane.pack=best_fit", "dataplane.balance=attention", "dataplane.balance_group=8"),
    *("dataplane.seq_len=128", "dataplane.global_batch_size=8", "dataplane.chunk_steps=2", "job.ranks_per_node=2"),
]
NUMBERS = re.compile(
    r"documents cut by sequences:? +(\S+)% with dataplane.pack=concat, (\S+)% with best_fit \((\S+) documents per "
    r"sequence\)\. Configured: best_fit\. +attention cost of ranks:? +largest over mean of 2 data-parallel ranks: "
    r"(\S+) with dataplane.balance=none, (\S+) with attention\. Configured: attention\."
)


def numbers_in(printed: str) -> tuple[float, ...]:
    found = NUMBERS.search(
        " ".join(printed.split()).replace("Documents", "documents").replace("Attention", "attention")
    )
    assert found is not None, printed
    return tuple(map(float, found.groups()))


def test_a_report_of_a_packed_run_says_what_its_plan_says(
    collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*collection, *PACKED, f"run.root={tmp_path}", "training.num_steps=4"]
    config = compose(words)
    folder = prepare_run(config, words, datetime.now(UTC))

    def train(comm: ThreadCommunicator) -> None:
        with DataPlane.open(config, comm=comm, folder=folder) as plane:
            for batch in plane:
                plane.record(batch, np.ones(batch.loss_mask.shape))
                if batch.step == 3:
                    break

    run_ranks(2, train)
    assert main(["plan", str(folder.path)]) == 0
    printed = capsys.readouterr().out
    assert "at most 4× for formats that read single rows" in printed
    planned = numbers_in(printed)
    concat, best_fit, documents, before, after = planned
    assert 0 <= best_fit < concat <= 100 and documents > 0
    assert 1 <= after < before

    assert main(["report", str(folder.path)]) == 0
    assert numbers_in(capsys.readouterr().out) == planned
    page = (folder.report / "report.html").read_text()
    assert numbers_in(re.sub(r"<[^>]*>", " ", page)) == planned

    settings = load_yaml(folder.config)
    settings["index"]["path"] = str(tmp_path / "gone.h5")
    folder.config.write_text(dump_yaml(settings))
    assert main(["report", str(folder.path)]) == 0
    assert "documents cut" not in capsys.readouterr().out


def test_a_report_without_packing_opens_no_index(
    make_run: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(make_run(["en"], [(0, 4)]).path)]) == 0
    assert "documents cut" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "is_warned"), [([], True), (["training.attention=document"], False), (["job.command=[mine]"], False)]
)
def test_plan_and_submit_say_where_balancing_is_of_no_use(
    collection: list[str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    words: list[str],
    is_warned: bool,
) -> None:
    text = "dataplane.balance=attention is of no use: the reference trainer has training.attention=sequence"
    assert main(["plan", *collection, *PACKED, *words]) == 0
    assert (text in " ".join(capsys.readouterr().out.split())) == is_warned
    check_data(compose([*collection, *PACKED, *words]))
    assert (text in caplog.text) == is_warned
