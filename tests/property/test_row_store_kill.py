"""After a kill at any call, the same command finishes the row store, and the same samples are served."""

import itertools
import shutil
from pathlib import Path

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.row_store.row_files import RowStoreFiles
from mixtera_hpc.index.row_store.row_job import write_rows
from mixtera_hpc.testing.writers import write_compressed
from tests.property.killed_jobs import Killed, killed_before

ROWS_PER_SHARD = 10


def write_shards(data: Path, numbers: range) -> None:
    for number in numbers:
        folder = data / f"{number}"
        folder.mkdir(parents=True)
        rows = [{"text": f"shard {number} row {row}", "c": "abc"[row % 3]} for row in range(ROWS_PER_SHARD)]
        write_compressed(folder, rows, ending="gz")


def write_store(config: Config) -> None:
    write_rows(config, Local(), lambda plan: None, None)


def served(config: Config, num_batches: int) -> list[list[str] | None]:
    with DataPlane.open(config, Local()) as plane:
        return [batch.digests for batch in itertools.islice(plane, num_batches)]


@pytest.mark.parametrize("before", ["nothing", "an earlier generation"])
def test_a_job_that_is_killed_at_any_call_is_continued(before: str, tmp_path: Path) -> None:
    words = [f"data.root={tmp_path / 'data'}", f"index.path={tmp_path / 'i.h5'}", "data.properties.c=c"]
    words += ["mixture.unit=samples", f"dataplane.global_batch_size={ROWS_PER_SHARD}", "dataplane.audit=true"]
    words += ["dataplane.workers=0"]
    with_store = compose(words)
    config = compose([*words, "data.materialize=never"])
    files = RowStoreFiles.of_index(tmp_path / "i.h5")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    write_shards(tmp_path / "data", range(2))
    build_index(config)
    if before != "nothing":
        write_store(config)
        write_shards(tmp_path / "data", range(2, 4))
        refresh_index(config)
        shutil.copytree(files.folder, earlier, dirs_exist_ok=True)
        shutil.rmtree(files.folder)
    num_shards = len(list((tmp_path / "data").iterdir()))
    expected = served(with_store, num_shards)

    is_complete = False
    for call in itertools.count():
        shutil.copytree(earlier, files.folder)
        try:
            with killed_before(call):
                write_store(config)
                is_complete = True
        except Killed:
            pass
        write_store(config)
        assert served(with_store, num_shards) == expected, call
        header = files.read_header()
        assert header is not None and header.complete
        others = {path.name for path in files.folder.iterdir() if not path.match("rows-*.zst")}
        assert others == {"lock", "store.json", header.places}, call
        shutil.rmtree(files.folder)
        if is_complete:
            break
    assert call > 4 * 2
