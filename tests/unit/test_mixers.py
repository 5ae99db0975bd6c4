"""Weights of chunks, for every kind of mixture."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.domain_keys import parse_domain_key
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.configured_weights import max_epochs_per_domain
from mixtera_hpc.dataplane.mixing.context import ChunkTimeline, DomainSizes, MixtureContext
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.mixers import Mixer
from mixtera_hpc.errors import MixtureError

CHUNK_STEPS = 4
LAG = 2
CONTEXT = MixtureContext(
    domain_sizes=DomainSizes(
        keys=tuple(parse_domain_key({"source": s}) for s in "abc"), sizes=np.array([600, 300, 100]), budget=10_000
    ),
    names=("source=a", "source=b", "source=c"),
    has_samples=np.ones(3, np.bool_),
    timeline=ChunkTimeline(chunk_steps=CHUNK_STEPS, batch_schedule=BatchSchedule.constant(1), items_per_sequence=100),
    feedback_lag=LAG,
)
NATURAL = [0.6, 0.3, 0.1]
LEARN = {"name": "exponentiated-gradient", "reference_losses": [0, 0, 0]}


def mixer(learn: bool = True, context: MixtureContext = CONTEXT, **plain: Any) -> Mixer:
    return make_mixer(from_plain(MixtureConfig, plain, "mixture"), context, learn=learn)


def schedule(*stages: dict[str, Any], shape: str = "stepwise", unit: str = "steps", **plain: Any) -> dict[str, Any]:
    return {"kind": "schedule", "schedule": {"stages": list(stages), "shape": shape, "unit": unit}, **plain}


def static(start: float, *weights: float) -> dict[str, Any]:
    return {
        "start": start,
        "domains": [{"key": {"source": s}, "weight": w} for s, w in zip("abc", weights, strict=True)],
    }


def weights(made: Mixer, chunk: int) -> list[float]:
    result = made.weights_of(chunk)
    assert result is not None
    return result.tolist()


def statistics(step: int, *losses: float) -> DomainStatistics:
    tokens = np.array([600, 300, 100])
    return DomainStatistics(
        step=step,
        loss_sum=np.array(losses) * tokens,
        num_tokens=tokens,
        num_sequences=tokens // 10,
        num_nonfinite=np.zeros(3, np.int64),
    )


def train(made: Mixer, steps: range) -> None:
    for step in steps:
        made.feed(statistics(step, 3.0, 2.0 + step / 10, 1.0))
    made.arrays()  # Waits for the thread.


def test_a_fixed_mixture_never_changes_its_weights() -> None:
    made = mixer()
    assert weights(made, 0) == weights(made, 1000) == NATURAL


def test_a_stage_begins_at_the_first_chunk_that_starts_after_it() -> None:
    made = mixer(**schedule({"start": 0, "kind": "natural"}, static(5, 0.2, 0.2, 0.6)))
    assert weights(made, 1) == NATURAL, "step 4 is before 5, and weights do not change inside a chunk"
    assert weights(made, 2) == pytest.approx([0.2, 0.2, 0.6])


def test_starts_can_be_given_in_tokens() -> None:
    made = mixer(**schedule(static(0, 1, 0, 0), static(800, 0, 1, 0), unit="tokens"))
    assert [weights(made, c)[1] for c in range(4)] == [0, 0, 1, 1]


def test_a_linear_schedule_interpolates_between_two_starts() -> None:
    made = mixer(**schedule(static(0, 1, 0, 0), static(16, 0, 1, 0), static(24, 0, 0, 1), shape="linear"))
    assert [weights(made, c) for c in (0, 1, 2, 4)] == [[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0, 1, 0]]
    assert weights(made, 5) == [0, 0.5, 0.5]
    assert weights(made, 6) == weights(made, 99) == [0, 0, 1]


def test_a_cosine_schedule_changes_slowly_at_both_ends() -> None:
    made = mixer(**schedule(static(0, 1, 0, 0), static(16, 0, 1, 0), shape="cosine"))
    second_weight = [weights(made, c)[1] for c in range(5)]
    assert second_weight == pytest.approx([0, (1 - np.sqrt(0.5)) / 2, 0.5, (1 + np.sqrt(0.5)) / 2, 1])


def test_a_dynamic_stage_learns_from_the_losses_of_earlier_stages() -> None:
    learned = mixer(kind="dynamic", algorithm=LEARN)
    staged = mixer(**schedule(static(0, 0.2, 0.2, 0.6), {"start": 16, "kind": "dynamic", "algorithm": LEARN}))
    for made in (learned, staged):
        train(made, range(16))
    assert weights(staged, 3) == pytest.approx([0.2, 0.2, 0.6])
    assert weights(staged, 4) == weights(learned, 4) != NATURAL
    learned.close()
    staged.close()


def test_weights_are_unknown_until_their_statistics_have_arrived() -> None:
    made = mixer(kind="dynamic", algorithm=LEARN)
    assert weights(made, LAG - 1) == NATURAL
    train(made, range(CHUNK_STEPS - 1))
    assert made.weights_of(LAG) is None
    train(made, range(CHUNK_STEPS - 1, CHUNK_STEPS))
    assert made.weights_of(LAG) is not None
    made.close()


def test_a_later_dynamic_stage_does_not_delay_earlier_chunks() -> None:
    made = mixer(**schedule({"start": 0, "kind": "natural"}, {"start": 400, "kind": "dynamic", "algorithm": LEARN}))
    assert weights(made, 50) == NATURAL
    assert made.weights_of(100) is None
    made.close()


def test_without_learning_a_dynamic_mixture_keeps_its_initial_weights() -> None:
    made = mixer(learn=False, **schedule(static(0, 1, 0, 0), {"start": 400, "kind": "dynamic", "algorithm": LEARN}))
    assert weights(made, 100) == NATURAL


@pytest.mark.parametrize(
    "plain",
    [
        {"kind": "dynamic", "algorithm": LEARN},
        schedule({"start": 0, "kind": "dynamic", "algorithm": LEARN}, {"start": 20, "kind": "dynamic"}, shape="linear"),
        schedule(static(0, 0.1, 0.1, 0.8), {"start": 16, "kind": "dynamic", "algorithm": LEARN}, floor=0.15),
    ],
    ids=["dynamic", "two in a row", "bounded"],
)
def test_a_restored_mixer_continues_as_if_it_had_not_stopped(plain: dict[str, Any]) -> None:
    made = mixer(**plain)
    restored = mixer(**plain)
    train(made, range(13))
    restored.load({name: array.copy() for name, array in made.arrays().items()})
    for each in (made, restored):
        train(each, range(13, 24))
    for chunk in (5, 6, 7):
        assert weights(made, chunk) == weights(restored, chunk)
    made.close()
    restored.close()


def test_the_state_of_a_dynamic_mixer_does_not_grow_with_the_run() -> None:
    made = mixer(kind="dynamic", algorithm=LEARN)
    train(made, range(4 * CHUNK_STEPS))
    before = {name: array.nbytes for name, array in made.arrays().items()}
    train(made, range(4 * CHUNK_STEPS, 40 * CHUNK_STEPS))
    assert {name: array.nbytes for name, array in made.arrays().items()} == before
    made.close()


def test_a_skipped_step_does_not_update_the_algorithm() -> None:
    made = mixer(kind="dynamic", algorithm=LEARN)
    train(made, range(5))
    before = {name: array.tolist() for name, array in made.arrays().items()}
    nothing = np.zeros(3, np.int64)
    made.feed(
        DomainStatistics(step=5, loss_sum=np.zeros(3), num_tokens=nothing, num_sequences=nothing, num_nonfinite=nothing)
    )
    assert {name: array.tolist() for name, array in made.arrays().items()} == before
    made.close()


def test_bounds_hold_for_every_chunk_and_keep_the_ratio_of_the_others() -> None:
    made = mixer(floor=0.2, **schedule(static(0, 0.8, 0.2, 0), static(8, 0.5, 0.4, 0.1)))
    assert weights(made, 0) == pytest.approx([0.6, 0.2, 0.2])
    assert weights(made, 2) == pytest.approx([0.8 * 5 / 9, 0.8 * 4 / 9, 0.2])


def test_bounds_apply_to_a_dynamic_mixture() -> None:
    made = mixer(kind="dynamic", algorithm=LEARN, cap=0.5)
    train(made, range(40))
    assert max(weights(made, 11)) <= 0.5
    made.close()


def test_an_empty_domain_gets_nothing_from_a_floor_or_a_cap() -> None:
    domain_sizes = DomainSizes(keys=CONTEXT.domain_sizes.keys, sizes=np.array([900, 100, 0]), budget=1)
    context = replace(CONTEXT, domain_sizes=domain_sizes)
    assert weights(mixer(context=context, floor=0.2, cap=0.6), 0) == pytest.approx([0.6, 0.4, 0])


def test_a_mixture_of_dropped_domains_only_is_refused() -> None:
    context = replace(CONTEXT, has_samples=np.array([False, True, True]))
    with pytest.raises(MixtureError, match="have been dropped: source=a"):
        mixer(context=context, kind="static", domains=[{"key": {"source": "a"}, "weight": 1.0}])
    assert weights(mixer(context=context), 0) == NATURAL


def test_a_stage_of_dropped_domains_is_accepted_if_another_stage_has_samples() -> None:
    context = replace(CONTEXT, has_samples=np.array([False, True, True]))
    assert weights(mixer(context=context, **schedule(static(0, 1, 0, 0), static(40, 0, 1, 0))), 10) == [0, 1, 0]


def test_a_requested_mixture_may_name_some_of_the_domains() -> None:
    """As `mixture set` does in a running job."""
    domains = [{"key": {"source": "c"}, "weight": 0.9}, {"key": {"source": ["a"]}, "weight": 0.1}]
    assert weights(mixer(kind="static", domains=domains), 7) == pytest.approx([0.1, 0, 0.9])


def test_an_unknown_domain_is_refused_with_near_misses() -> None:
    with pytest.raises(MixtureError, match=r"source=aa is not a domain of this run.*Did you mean 'source=a'"):
        mixer(kind="static", domains=[{"key": {"source": "aa"}, "weight": 1.0}])


def test_a_timeline_can_begin_at_any_step() -> None:
    timeline = ChunkTimeline(
        chunk_steps=3, batch_schedule=BatchSchedule.constant(5), items_per_sequence=10, step=40, items=4000
    )
    assert (timeline.step_of(2), timeline.items_before(2)) == (46, 4300)


def test_the_epoch_limit_of_a_domain_overrides_that_of_the_mixture() -> None:
    plain = {"max_epochs": 2.0, "domains": [{"key": {"source": "a"}, "max_epochs": 0.5}, {"key": {"source": "b"}}]}
    assert max_epochs_per_domain(from_plain(MixtureConfig, plain, ""), 2).tolist() == [0.5, 2.0]
    assert max_epochs_per_domain(MixtureConfig(), 2).tolist() == [np.inf, np.inf]
    assert max_epochs_per_domain(MixtureConfig(on_exhausted="stop"), 2).tolist() == [1.0, 1.0]
