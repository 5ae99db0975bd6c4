"""`resume --drop-documents`: single documents leave a run, and resume, trace, verify and query know it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.cli.documents_file import read_documents
from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.resume.edit_checks import check_and_record_edit
from mixtera_hpc.errors import ConfigError, LaunchError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.document_filter import documents_expression
from mixtera_hpc.index.read.selection import select_domains
from mixtera_hpc.testing.thread_ranks import run_ranks
from mixtera_hpc.trace.list import SequenceFilter, list_sequences
from mixtera_hpc.trace.locate import locate_row
from mixtera_hpc.trace.served_run import ServedRun
from mixtera_hpc.trace.verify import verify_run

EPOCH = ["mixture.on_exhausted=redistribute", "mixture.max_epochs=1", "dataplane.last_batch=pad"]
WORDS = ["dataplane.global_batch_size=6", "dataplane.chunk_steps=2", "dataplane.audit=true"]
LOSSES = "dataplane.record_losses=true"
STOP = 7
"""Step of the edit; not at the end of a chunk."""


def serve(config: Config, folder: Path, attempt: int, num_ranks: int, until: int = 10**6, state: Any = None) -> Any:
    """Serve up to step `until` or the end of the data, and return the state."""

    def rank(comm: Any) -> Any:
        with DataPlane.open(config, comm, RunFolder(folder), attempt) as plane:
            if state is not None:
                plane.load_state_dict(state if comm.rank == 0 else None)
            batches = iter(plane)
            while plane.next_step < until and (batch := next(batches, None)) is not None:
                if batch.payloads is not None:
                    plane.record(batch, np.array([payload is not None for payload in batch.payloads]) * 1.0)
                else:
                    plane.record(batch, 1 + (batch.tokens[:, 1:] % 97) / 5)
            return plane.state_dict()

    return rank(Local()) if num_ranks == 1 else run_ranks(num_ranks, rank)[0]


def served(config: Config, folder: Path, steps: range | None = None) -> list[dict[str, Any]]:
    run = RunFolder(folder)
    recorded = ServedRun(run, config)
    steps = steps and range(steps.start, min(steps.stop, recorded.history.end))
    records = list_sequences(recorded, SequenceFilter(steps=steps))
    return [record for record, _ in records]


def documents_of(records: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(shard, row) for record in records for shard, row, _, _ in record["segments"]]


def drop_and_continue(config: Config, folder: Path, state: Any, dropped: Path, num_ranks: int) -> None:
    path = RunFolder(folder).checkpoint_plane_state(STOP)
    path.parent.mkdir(parents=True)
    path.write_bytes(state["plane"].tobytes())
    config = replace(config, training=replace(config.training, num_steps=10**6))
    check_and_record_edit(RunFolder(folder), config, config, drop=[read_documents(dropped)])
    serve(config, folder, 2, num_ranks, state=state)


def verified(config: Config, folder: Path) -> int:
    run = RunFolder(folder)
    return verify_run(ServedRun(run, config)).num_sequences


def num_selected(name: str, capsys: pytest.CaptureFixture[str]) -> int:
    capsys.readouterr()
    assert main(["query", name, "--json"]) == 0
    return int(json.loads(capsys.readouterr().out)["selected"]["samples"])


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["mixture.unit=samples"], id="samples", marks=pytest.mark.full),
        pytest.param(["mixture.unit=samples", "query.holdout.fraction=0.2"], id="holdout"),
        pytest.param(["dataplane.seq_len=32"], id="tokens"),
    ],
)
def test_the_rest_of_the_epoch_is_served_without_the_worst_documents(
    words: list[str], collection: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([*collection, *EPOCH, *WORDS, *words, LOSSES])
    listed = []
    for num_ranks in (1, 3):
        folder = tmp_path / f"run{num_ranks}"
        state = serve(config, folder, 1, num_ranks, until=STOP)
        before = num_selected(str(folder), capsys)
        file = tmp_path / "worst.jsonl"
        assert main(["trace", str(folder), "--worst", "9", "--write", str(file)]) == 0
        bad = documents_of(served(config, folder))[:5]
        # A whole block, documents that were served before and some that were not.
        everything = serve_all(config, tmp_path / f"all{num_ranks}")
        block = [d for d in everything if d[0] == bad[0][0] and d[1] < 16]
        lines = [json.dumps({"shard": shard, "row": row}) + "\n" for shard, row in block + everything[-40::4]]
        file.write_text(file.read_text() + "".join(lines))
        dropped = {(line["shard"], line["row"]) for line in map(json.loads, file.read_text().splitlines())}

        drop_and_continue(config, folder, state, file, num_ranks)
        first = documents_of(served(config, folder, range(STOP)))
        later = documents_of(served(config, folder, range(STOP, 10**6)))
        assert dropped & set(first) and not dropped & set(later)
        assert set(first) | set(later) == set(everything) - (dropped - set(first))
        if "mixture.unit=samples" in words:
            assert len(first + later) == len(set(first + later))
            assert before - num_selected(str(folder), capsys) == len(dropped)
        assert verified(config, folder) == len(served(config, folder))

        # The last document was dropped before it was served, the first one after.
        run = RunFolder(folder)
        for shard, row in (everything[-40], next(d for d in first if d in dropped)):
            found = list(locate_row(ServedRun(run, config), shard, row, None))
            assert len(found) >= ((shard, row) in first) and all(hit["step"] < STOP for hit in found)
        listed.append([{k: v for k, v in r.items() if k not in ("rank", "attempt")} for r in served(config, folder)])
    assert listed[0] == listed[1]


def serve_all(config: Config, folder: Path) -> list[tuple[str, int]]:
    """Return all documents that a run without drops serves, in order."""
    serve(config, folder, 1, 1)
    return list(dict.fromkeys(documents_of(served(config, folder))))


def test_documents_of_several_indexes_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for name in ("prose", "code"):
        (tmp_path / name).mkdir()
        rows = [json.dumps({"text": f"{name} {i}"}) for i in range(40)]
        (tmp_path / name / "a.jsonl").write_text("\n".join(rows))
        words = [f"data.root={tmp_path / name}", f"index.path={tmp_path / name}.h5", "index.block_rows=16"]
        build_index(compose([*words, "mixture.unit=samples"]))
        paths.append(f"{tmp_path / name}.h5")
    words = [f"index.paths=[{','.join(paths)}]", "mixture.unit=samples", "mixture.group_by=[dataset]"]
    config = compose([*words, *WORDS, *EPOCH])
    dropped = {(f"{tmp_path}/code/a.jsonl", row) for row in (0, 15, 16, 39)}
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"shard": shard, "row": row}) + "\n\n" for shard, row in dropped))
    state = serve(config, tmp_path / "run", 1, 1, until=0)
    drop_and_continue(config, tmp_path / "run", state, file, 1)
    later = documents_of(served(config, tmp_path / "run"))
    assert len(later) == 76 and not dropped & set(later)
    assert {row for shard, row in later if shard.endswith("prose/a.jsonl")} == set(range(40))


def test_only_blocks_with_named_documents_are_read(collection: list[str]) -> None:
    config = compose(collection)
    with open_configured(config) as index:
        blocks = index.tables.blocks
        paths = index.shard_paths()
        part, whole, last = 0, 1, len(blocks) - 1

        def rows(block: int, chosen: slice) -> list[tuple[str, int]]:
            first = int(blocks.first_row[block])
            return [(paths[blocks.shard[block]], first + row) for row in range(int(blocks.rows[block]))[chosen]]

        # Named twice, and in any order.
        documents = rows(part, slice(3, 5)) + rows(whole, slice(None))[::-1] + rows(last, slice(-1, None))
        query = replace(config.query, where=documents_expression(documents * 2))
        chosen = select_domains(replace(config, query=query), index).selection
        assert chosen.selected[0] == len(set(documents))
        assert chosen.pruning.scanned_blocks == 2
        inverse = replace(config.query, where=f"not {query.where}")
        others = select_domains(replace(config, query=inverse), index).selection
        assert others.selected[0] == int(blocks.rows.sum()) - len(set(documents))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which cannot be read: No such file"),
        ("\n", "which names no document.\n  Write the file with mixtera-hpc trace RUN --worst N --write FILE"),
        ('{"shard": "a.jsonl", "row": 1}\n{"shard": "a.jsonl"}', "line 2 is not a document: Object missing required"),
        ("a.jsonl 17", 'line 1 is not a document: .*\n  Write {"shard": "train/a.jsonl", "row": 17}'),
        ('{"shard": "a.jsonl", "row": "1"}', "Expected `int`"),
        ('{"shard": "a.jsonl", "row": 1, "why": ""}', "unknown field `why`"),
        ('{"shard": "a.jsonl", "row": -1}', "line 1 names row -1, but rows are counted from 0"),
    ],
)
def test_files_that_name_no_documents_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / "d.jsonl")


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([("b.jsonl", 1)], "--drop: documents.. names 'b.jsonl', which is not a shard of the index.*Did you mean"),
        ([("a.jsonl", 0), ("a.jsonl", 10**6)], "names row 1000000 of a.jsonl, which has rows 0 to"),
    ],
)
def test_documents_that_the_index_does_not_have_are_refused(
    documents: list[tuple[str, int]], message: str, collection: list[str], tmp_path: Path
) -> None:
    config = compose([*collection, *WORDS, "dataplane.seq_len=64"])
    state = serve(config, tmp_path / "run", 1, 1, until=STOP)
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"shard": shard, "row": row}) + "\n" for shard, row in documents))
    with pytest.raises(ConfigError, match=message):
        drop_and_continue(config, tmp_path / "run", state, file, 1)
    assert not RunFolder(tmp_path / "run").decisions.exists()


def test_documents_that_were_dropped_before_change_nothing(collection: list[str], tmp_path: Path) -> None:
    config = compose([*collection, *WORDS, "dataplane.seq_len=64"])
    serve(config, tmp_path / "run", 1, 1, until=1)
    expression = documents_expression([("a.jsonl", row) for row in range(90)])
    check_and_record_edit(RunFolder(tmp_path / "run"), config, config, drop=[expression])
    with pytest.raises(LaunchError, match=r"documents\(.*\[\.\.\.\] matches none of the samples that the run serves"):
        check_and_record_edit(RunFolder(tmp_path / "run"), config, config, drop=[expression])


@pytest.mark.parametrize(
    "argument", ["", "'a.jsonl'", "{'a.jsonl': 1}", "{'a.jsonl': [True]}", "{1: [1]}", "{'a': [x]}"]
)
def test_other_arguments_of_documents_are_refused(argument: str, collection: list[str]) -> None:
    config = compose([*collection])
    query = replace(config.query, where=f"documents({argument})")
    with open_configured(config) as index, pytest.raises(ConfigError, match="a list of rows for every shard"):
        select_domains(replace(config, query=query), index)
