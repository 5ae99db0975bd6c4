"""A run whose index was refreshed continues with the generation that it began with, sample for sample."""

import json
from pathlib import Path

import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.dataplane.plane_state import check_identity
from mixtera_hpc.dataplane.reading.source import open_source
from mixtera_hpc.errors import ConfigError
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.testing.small_collection import make_collection
from mixtera_hpc.trace.list import planned_sequences


def test_a_run_continues_after_shards_were_added(tmp_path: Path) -> None:
    words = [*make_collection(tmp_path), "dataplane.seq_len=32", "dataplane.global_batch_size=8"]
    before = open_source(compose(words), Local())
    expected = list(planned_sequences(before, 0, 12))

    rows = [{"text": f"more {i} " * 30, "meta": {"source": "ast", "tags": ["new"], "size": 7}} for i in range(60)]
    (tmp_path / "data" / "0-new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = refresh_index(compose(words))
    assert list(report.generations) == before.index.fingerprints

    newest = open_source(compose(words), Local())
    assert newest.layout.epoch_items().sum() > before.layout.epoch_items().sum()
    with pytest.raises(ConfigError, match=rf"index\.generations=\[{before.index.fingerprints[0]}\]"):
        check_identity(before.identity(), newest.identity())

    again = open_source(compose([*words, f"index.generations=[{before.index.fingerprints[0][:12]}]"]), Local())
    assert check_identity(before.identity(), again.identity()) == []
    assert list(planned_sequences(again, 0, 12)) == expected
