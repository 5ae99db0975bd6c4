"""The ranks at fault are those that the others wait for."""

import pytest

from mixtera_hpc.dataplane.watchdog.rank_states import RankState, culprits_of


def state(rank: int, stage: str, stalled_s: float) -> RankState:
    return RankState(rank=rank, host="node", pid=1, stage=stage, stalled_s=stalled_s)


@pytest.mark.parametrize(
    ("states", "silent", "expected"),
    [
        pytest.param([("agree", 6), ("read", 6), ("agree", 6)], [], [1], id="a read"),
        pytest.param([("agree", 6), ("read", 4), ("agree", 6)], [], [1], id="a read that began later"),
        pytest.param([("reduce", 6), ("trainer", 6), ("wait", 6)], [], [1], id="the trainer's code"),
        pytest.param([("agree", 6), ("read", 1), ("trainer", 6)], [], [2], id="the trainer's code, beside a read"),
        pytest.param([("agree", 6), ("read", 6), ("trainer", 6)], [2], [1, 2], id="a silent rank and a read"),
        pytest.param([("agree", 6), ("ended", 0), ("reduce", 6)], [], [0, 2], id="all wait for each other"),
    ],
)
def test_the_ranks_that_others_wait_for_are_named(
    states: list[tuple[str, float]], silent: list[int], expected: list[int]
) -> None:
    by_rank = {rank: state(rank, stage, stalled_s) for rank, (stage, stalled_s) in enumerate(states)}
    assert [culprit.rank for culprit in culprits_of(by_rank, silent, limit_s=5)] == expected
