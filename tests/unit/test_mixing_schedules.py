"""The stage of a schedule at a position, and the transition from one stage to the next."""

import pytest

from mixtera_hpc.core.mixing.schedules import ScheduleShape, blend_at

STARTS = [0.0, 100.0, 300.0]
SHAPES: tuple[ScheduleShape, ...] = ("stepwise", "linear", "cosine")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("position", "stage"), [(-5, 0), (0, 0), (99, 0), (100, 1), (299, 1), (300, 2), (1e9, 2)])
def test_a_stage_holds_from_its_start_to_the_next(shape: ScheduleShape, position: float, stage: int) -> None:
    assert blend_at(STARTS, shape, position).stage == stage


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_stage_is_not_blended(shape: ScheduleShape) -> None:
    assert blend_at(STARTS, shape, 500.0).share_of_next == 0.0


@pytest.mark.parametrize(
    ("shape", "shares"), [("stepwise", [0, 0, 0]), ("linear", [0, 0.25, 0.5]), ("cosine", [0, 0.146447, 0.5])]
)
def test_the_share_of_the_next_stage_grows_with_the_position(shape: ScheduleShape, shares: list[float]) -> None:
    blends = [blend_at(STARTS, shape, position) for position in (100.0, 150.0, 200.0)]
    assert [blend.share_of_next for blend in blends] == pytest.approx(shares, abs=1e-6)
