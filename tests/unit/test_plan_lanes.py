"""`plan` proposes more lanes for a job in which many ranks share each of them."""

import pytest

from mixtera_hpc.cli.main import main

LARGE_BATCH = ["dataplane.global_batch_size=512", "dataplane.seq_len=16", "plan.steps=1", "job.ranks_per_node=4"]


@pytest.mark.parametrize(
    ("more", "proposed"),
    [
        # 256 ranks, 16 lanes
        ("job.nodes=64", "dataplane.lanes=64"),
        ("job.nodes=32", None),
        ("job.nodes=64 dataplane.lanes=64", None),
        ("job.nodes=64 dataplane.shuffle=sequence", None),
        # Never more lanes than sequences of a step.
        ("job.nodes=1024 dataplane.global_batch_size=4096", "dataplane.lanes=1024"),
        ("job.nodes=64 job.ranks_per_node=1 dataplane.global_batch_size=64 dataplane.lanes=4", "dataplane.lanes=64"),
    ],
)
def test_nodes_that_share_lanes_are_told_a_number_without_it(
    more: str, proposed: str | None, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *collection, *LARGE_BATCH, *more.split()]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("ranks share" in printed) == (proposed is not None)
    assert proposed is None or f"With {proposed}, set before the run begins" in printed
