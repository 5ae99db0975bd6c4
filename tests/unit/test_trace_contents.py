"""`trace --show` and `--export`: the content of a step as the run was given it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.testing.thread_ranks import run_ranks

SETTINGS = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.chunk_steps=2", "dataplane.audit=true"]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def serve(overrides: Sequence[str], folder: Path, num_ranks: int = 2, num_steps: int = 5) -> list[list[Batch]]:
    """Serve some steps, and return the batches of every rank."""
    config = compose(overrides)

    def rank(comm: Any) -> list[Batch]:
        with DataPlane.open(config, comm=comm, folder=RunFolder(folder)) as plane:
            batches = iter(plane)
            return [next(batches) for _ in range(num_steps)]

    if num_ranks == 1:
        return [rank(Local())]
    return run_ranks(num_ranks, rank)


@pytest.fixture
def token_run(collection: list[str], tmp_path: Path) -> tuple[Path, list[list[Batch]]]:
    return tmp_path / "run", serve([*collection, *SETTINGS], tmp_path / "run")


@pytest.fixture
def sample_run(tmp_path: Path) -> tuple[Path, Path]:
    """Return the folder of a run over samples, of which some have binary fields, and its only shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    rows = [{"caption": f"c{i}", "images": [{"bytes": PNG + bytes([i]), "path": None}] * (i % 3)} for i in range(40)]
    shard = tmp_path / "data" / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), shard)
    overrides = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}", "mixture.unit=samples"]
    overrides += ["data.text=null"]
    build_index(compose(overrides))
    serve([*overrides, *SETTINGS], tmp_path / "run", num_ranks=1)
    return tmp_path / "run", shard


def test_an_export_holds_exactly_what_the_ranks_were_given(
    token_run: tuple[Path, list[list[Batch]]], tmp_path: Path
) -> None:
    folder, by_rank = token_run
    assert main(["trace", str(folder), "--steps", "1..3", "--export", str(tmp_path / "b.npz")]) == 0
    expected = [batches[step] for step in range(1, 4) for batches in by_rank]
    with np.load(tmp_path / "b.npz") as exported:
        for name in ("tokens", "loss_mask", "document_ids", "position_ids"):
            assert np.array_equal(exported[name], np.concatenate([getattr(batch, name) for batch in expected]))
        assert exported["step"].tolist() == np.repeat([1, 2, 3], 4).tolist()
        assert exported["position"].tolist() == [0, 1, 2, 3] * 3
        assert exported["domain_id"].tolist() == np.concatenate([batch.domain_ids for batch in expected]).tolist()
        assert exported["digest"].tolist() == [digest for batch in expected for digest in batch.digests or []]


def test_an_export_of_one_rank_holds_its_rows(token_run: tuple[Path, list[list[Batch]]], tmp_path: Path) -> None:
    folder, by_rank = token_run
    assert main(["trace", str(folder), "--step", "2", "--rank", "1", "--export", str(tmp_path / "b.npz")]) == 0
    with np.load(tmp_path / "b.npz") as exported:
        assert np.array_equal(exported["tokens"], by_rank[1][2].tokens)
        assert exported["position"].tolist() == [2, 3]


def test_texts_are_those_of_the_tokens(
    token_run: tuple[Path, list[list[Batch]]], collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, by_rank = token_run
    assert main(["trace", str(folder), "--step", "2", "--show", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    path = next(word.partition("=")[2] for word in collection if word.startswith("dataplane.tokenizer="))
    decoder = HfTokenizer.from_file(path)
    tokens = np.concatenate([batches[2].tokens for batches in by_rank])
    assert ["".join(record["texts"]) for record in records] == [
        decoder.decode(row, skip_special_tokens=False) for row in tokens.tolist()
    ]
    assert all(len(record["texts"]) == len(record["segments"]) for record in records)

    assert main(["trace", str(folder), "--step", "2", "--show"]) == 0
    first = records[0]["texts"][0].splitlines()[0]
    assert f"    | {first}\n" in capsys.readouterr().out


def test_images_of_samples_are_written(sample_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = sample_run
    assert main(["trace", str(folder), "--steps", "0..4", "--show", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 20
    for record in records:
        number = int(record["sample"]["caption"][1:])
        assert record["sample"]["images"] == [{"bytes": f"<{len(PNG) + 1} bytes>", "path": None}] * (number % 3)
        assert [Path(path).read_bytes() for path in record["images"]] == [PNG + bytes([number])] * (number % 3)
    assert main(["trace", str(folder), "--step", "0", "--show"]) == 0
    assert '"caption": "c' in capsys.readouterr().out


def test_samples_are_exported_without_pickle(sample_run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = sample_run
    assert main(["trace", str(folder), "--step", "1", "--export", str(tmp_path / "b.npz")]) == 0
    with np.load(tmp_path / "b.npz", allow_pickle=False) as exported:
        starts = exported["payload_offsets"].tolist()
        raw = exported["payload_bytes"].tobytes()
        samples = [msgspec.msgpack.decode(raw[a:b]) for a, b in itertools.pairwise(starts)]
        assert len(samples) == 4 and all(sample["caption"].startswith("c") for sample in samples)


def test_content_that_changed_since_is_named(sample_run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, shard = sample_run
    table = pq.read_table(shard)
    pq.write_table(table.set_column(0, "caption", pa.array([f"x{i}" for i in range(len(table))])), shard)
    assert main(["trace", str(folder), "--step", "1", "--show"]) == 2
    assert "now has other content than the audit log recorded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--export", "b.npz", "--rank", "0"], "--export needs --step S or --steps A..B"),
        (["--step", "1", "--export", "b.csv"], "--export is 'b.csv', but must end in .npz"),
        (["--step", "1", "--export", "b.npz", "--show"], "--export and --show are both set"),
        (["--verify", "--show"], "remove --verify"),
        (["--step", "9", "--show"], "Step 9 has not been served"),
        (["--step", "1", "--export", "no/folder/b.npz"], "cannot be written: No such file"),
    ],
)
def test_wrong_options_are_refused(
    options: list[str], message: str, token_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(token_run[0]), *options]) == 2
    assert message in capsys.readouterr().err
