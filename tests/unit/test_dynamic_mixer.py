"""A mixture that learns: domains of weight 0, algorithms that fail, held-out losses, and the weights in force."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtera_hpc.config.convert import from_plain
from mixtera_hpc.config.mixture.check_mixture import mixture_problems
from mixtera_hpc.config.schema import MixtureConfig
from mixtera_hpc.core.domain_keys import parse_domain_key
from mixtera_hpc.core.mixing.algorithm import make_algorithm
from mixtera_hpc.core.mixing.simple_algorithm import ArrayState, SimpleAlgorithm, Values
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.context import ChunkTimeline, DomainSizes, MixtureContext
from mixtera_hpc.dataplane.mixing.dynamic_mixer import DynamicMixer
from mixtera_hpc.dataplane.mixing.from_config import make_mixer
from mixtera_hpc.dataplane.mixing.mixers import Mixer
from mixtera_hpc.errors import ConfigError

CHUNK_STEPS = 2
LAG = 2
NAMES = ("source=a", "source=b", "source=c")
CONTEXT = MixtureContext(
    domain_sizes=DomainSizes(
        keys=tuple(parse_domain_key({"source": s}) for s in "abc"), sizes=np.array([600, 300, 100]), budget=10_000
    ),
    names=NAMES,
    has_samples=np.ones(3, np.bool_),
    timeline=ChunkTimeline(chunk_steps=CHUNK_STEPS, batch_schedule=BatchSchedule.constant(1), items_per_sequence=100),
    feedback_lag=LAG,
)
WITHOUT_B = [{"key": {"source": s}, "weight": w} for s, w in zip("abc", (0.5, 0.0, 0.5), strict=True)]


def mixer(**plain: Any) -> Mixer:
    mixture = from_plain(MixtureConfig, {"kind": "dynamic", **plain}, "mixture")
    assert mixture_problems(mixture) == []
    return make_mixer(mixture, CONTEXT)


def statistics(step: int, losses: tuple[float, ...] = (3.0, 2.0, 1.0), **fields: Any) -> DomainStatistics:
    tokens = np.full(len(losses), 100)
    return DomainStatistics(
        step=step,
        loss_sum=np.array(losses) * tokens,
        num_tokens=tokens,
        num_sequences=tokens // 10,
        num_nonfinite=tokens * 0,
        **fields,
    )


def weights(made: Mixer | DynamicMixer, chunk: int) -> np.ndarray:
    made.arrays()  # Waits for the thread.
    result = made.weights_of(chunk)
    assert result is not None
    return result


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "ado", "warmup": 4, "refit_interval": 4},
        {"name": "odm"},
        {"name": "odm", "variant": "released"},
        {"name": "loss-proportional"},
        {"name": "exponentiated-gradient", "reference_losses": {"a": 1, "b": 1, "c": 1}},
        {"name": "exponentiated-gradient", "reference_losses": [1, 1, 1]},
        {"name": "skill-it", "statistics": "train", "graph": {"a": {"c": 0.5}}},
        {"name": "aioli", "statistics": "train"},
    ],
    ids=lambda algorithm: algorithm["name"],
)
@pytest.mark.parametrize("floor", [None, 0.1])
def test_a_domain_written_with_weight_0_is_never_served(algorithm: dict[str, Any], floor: float | None) -> None:
    made = mixer(domains=WITHOUT_B, algorithm=algorithm, floor=floor)
    for step in range(12):
        made.feed(statistics(step))
    for chunk in range(5, 8):
        served = weights(made, chunk)
        assert served[1] == 0.0
        assert served.sum() == pytest.approx(1.0)
        assert served[[0, 2]].min() > 0.0
    made.close()


def test_a_stage_of_a_schedule_that_learns_keeps_its_zeros_too() -> None:
    stages = [
        {"start": 0, "kind": "natural"},
        {"start": 4, "kind": "dynamic", "algorithm": {"name": "odm"}, "domains": WITHOUT_B},
    ]
    made = mixer(kind="schedule", schedule={"stages": stages}, floor=0.2)
    for step in range(12):
        made.feed(statistics(step))
    assert weights(made, 0).min() == pytest.approx(0.2)
    assert weights(made, 5)[1] == 0.0
    made.close()


class Fragile(SimpleAlgorithm):
    """Fails, or returns nonsense, at chosen steps."""

    name = "fragile"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        raises_at: int = -1
        nonsense_at: int = -1

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, np.ndarray]:
        if statistics.step == self.config.raises_at:
            raise ZeroDivisionError("a bug of the user's")
        raised = np.array([1.0, 1.0, 1.0 + statistics.step])
        return {}, raised / raised.sum()

    def update(self, state: ArrayState, statistics: DomainStatistics) -> tuple[ArrayState, np.ndarray]:
        state, weights = super().update(state, statistics)
        return state, weights * (np.nan if statistics.step == self.config.nonsense_at else 1.0)


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (Fragile.Config(raises_at=3), "ZeroDivisionError: a bug of the user's"),
        (Fragile.Config(nonsense_at=3), "MixtureError: The algorithm returned weights .* nan"),
    ],
)
def test_an_update_that_fails_keeps_the_weights_before_and_training_goes_on(
    failing: Fragile.Config, message: str
) -> None:
    made = DynamicMixer(Fragile(failing), np.full(3, 1 / 3), CHUNK_STEPS, LAG)
    for step in range(4):
        made.feed(statistics(step))
    # Step 2 was learned from, step 3 failed.
    assert weights(made, 3) == pytest.approx(np.array([1, 1, 3]) / 5)
    problem = made.problem
    assert problem is not None
    assert (problem.step, problem.count) == (3, 1)
    assert re.match(message, problem.message)
    for step in range(4, 6):
        made.feed(statistics(step))
    assert weights(made, 4) == pytest.approx(np.array([1, 1, 6]) / 8)
    assert made.problem == problem
    made.close()


class Recorder(SimpleAlgorithm):
    """Remembers what it was given; learns from held-out losses."""

    name = "recorder"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        statistics: str = "heldout"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.seen: list[tuple[int, Any]] = []

    def learn(self, state: ArrayState, statistics: DomainStatistics) -> tuple[Values, np.ndarray]:
        self.seen.append((statistics.step, None if statistics.weights is None else statistics.weights.tolist()))
        return {}, state.prior


def test_held_out_losses_come_after_the_steps_before_them() -> None:
    """They carry the mean of the mixtures that were in force since the last validation."""
    algorithm = Recorder(Recorder.Config())
    made = DynamicMixer(algorithm, np.full(2, 0.5), CHUNK_STEPS, LAG)
    in_force = [np.array([w, 1 - w]) for w in (0.2, 0.4, 0.6, 0.8)]
    # Validations after 2 and 3 steps; the losses of earlier training steps arrive later.
    made.feed(statistics(0, (1.0, 1.0), weights=in_force[0]))
    made.feed_held_out(statistics(2, (1.0, 1.0)))
    made.feed(statistics(1, (1.0, 1.0), weights=in_force[1]))
    made.feed_held_out(statistics(3, (1.0, 1.0)))
    for step in (2, 3):
        made.feed(statistics(step, (1.0, 1.0), weights=in_force[step]))
    made.arrays()
    assert algorithm.seen == [(2, [pytest.approx(0.3), pytest.approx(0.7)]), (3, [0.6, 0.4])]
    made.close()


def test_held_out_losses_that_were_not_learned_from_are_part_of_the_state() -> None:
    algorithms = [Recorder(Recorder.Config()) for _ in range(2)]
    made, restored = (DynamicMixer(a, np.full(2, 0.5), CHUNK_STEPS, LAG) for a in algorithms)
    made.feed(statistics(0, (1.0, 1.0), weights=np.array([0.3, 0.7])))
    made.feed_held_out(statistics(1, (2.0, 1.0)))
    restored.load(made.arrays())
    restored.feed(statistics(1, (1.0, 1.0), weights=np.array([0.3, 0.7])))
    restored.arrays()
    assert algorithms[1].seen == [(1, [0.3, 0.7])]
    made.close()
    restored.close()


def test_the_description_of_a_chunk_is_that_of_the_step_that_decided_it() -> None:
    made = mixer(domains=WITHOUT_B, algorithm={"name": "loss-proportional"})
    for step in range(4):
        made.feed(statistics(step, (1.0 + step, 2.0, 1.23456789)))
    made.arrays()
    assert made.description_of(0) == {}
    described = made.description_of(LAG)["last_loss"]
    assert described[[0, 2]].tolist() == [2.0, 1.23457]
    assert np.isnan(described[1])
    assert made.description_of(LAG + 1)["last_loss"][0] == 4.0
    made.close()


def test_references_come_from_a_file_by_name_or_by_value(tmp_path: Path) -> None:
    by_list = mixer(algorithm={"name": "exponentiated-gradient", "reference_losses": [2.5, 1.5, 0.5]})
    file = tmp_path / "references.json"
    file.write_text(json.dumps({"source=a": 2.5, "b": 1.5, "source=c": 0.5, "source=other": 9}))
    made = [
        by_list,
        mixer(algorithm={"name": "exponentiated-gradient", "reference_losses": str(file)}),
        mixer(algorithm={"name": "exponentiated-gradient", "reference_losses": {"c": 0.5, "a": 2.5, "source=b": 1.5}}),
    ]
    for each in made:
        for step in range(CHUNK_STEPS):
            each.feed(statistics(step))
        assert weights(each, LAG) == pytest.approx(weights(by_list, LAG), abs=0)
        each.close()
    assert weights(by_list, LAG)[0] != 0.6


def test_a_run_keeps_the_references_that_it_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "references.json"
    algorithm = {"name": "exponentiated-gradient", "reference_losses": str(file)}
    file.write_text(json.dumps({"a": 2.5, "b": 1.5, "c": 0.5}))
    whole = mixer(algorithm=algorithm)
    for step in range(CHUNK_STEPS):
        whole.feed(statistics(step))
    state = whole.arrays()

    file.write_text(json.dumps({"a": 0.5, "b": 1.5, "c": 2.5}))
    resumed = mixer(algorithm=algorithm)
    resumed.load(state)
    for each in (whole, resumed):
        for step in range(CHUNK_STEPS, 2 * CHUNK_STEPS):
            each.feed(statistics(step))
    assert weights(resumed, LAG + 1).tolist() == weights(whole, LAG + 1).tolist()
    assert resumed.arrays()["mixer/reference_losses"].tolist() == [2.5, 1.5, 0.5]
    assert "The run goes on with those that it began with: 2.5, 1.5, 0.5" in caplog.text
    whole.close()
    resumed.close()


def test_a_graph_that_has_changed_between_attempts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    algorithm = {"name": "skill-it", "graph": str(file)}
    file.write_text(json.dumps({"a": {"b": 0.5}}))
    made = [mixer(algorithm=algorithm), mixer(algorithm=algorithm)]
    state = made[0].arrays()
    made[1].load(state)
    file.write_text(json.dumps({"a": {"b": 0.75}}))
    made.append(mixer(algorithm=algorithm))
    with pytest.raises(ConfigError, match=r"mixture\.algorithm\.graph names has changed since the run began"):
        made[2].load(state)
    for each in made:
        each.close()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"reference_losses": {"a": 1, "b": 2}}, "reference_losses has no value for domain 'source=c'"),
        ({"reference_losses": {"a": 1, "b": 2, "d": 3}}, "names 'd', which is not a domain"),
        ({"reference_losses": "missing.json"}, "reference_losses is 'missing.json', which cannot be read"),
        ({"from_run": "no/such/run"}, "from_run is 'no/such/run'"),
    ],
)
def test_wrong_references_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixer(algorithm={"name": "exponentiated-gradient", **parameters})


def test_a_mixture_without_references_is_refused_before_an_index_is_open() -> None:
    def problems(**parameters: Any) -> list[str]:
        plain = {"kind": "dynamic", "algorithm": {"name": "exponentiated-gradient", **parameters}}
        return mixture_problems(from_plain(MixtureConfig, plain, "mixture"))

    (problem,) = problems()
    assert "from_run=RUN" in problem
    (problem,) = problems(from_run="x", reference_losses=[1.0])
    assert "both from_run and reference_losses" in problem
    assert problems(from_run="x") == problems(reference_losses="file.json") == []
    (problem,) = problems(from_run="x", etaa=1.0)
    assert "etaa is not a parameter" in problem


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.Algorithm", "no_such_module cannot be imported: ModuleNotFoundError(.|\n)*PYTHONPATH"),
        ("json.Algorithm", "json has no Algorithm"),
        ("json.JSONDecoder", "has no Config, describe"),
    ],
)
def test_an_import_path_that_names_no_algorithm_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_algorithm(name, {})


def test_a_restored_mixer_with_zeros_continues_as_if_it_had_not_stopped() -> None:
    plain = {"domains": WITHOUT_B, "algorithm": {"name": "odm"}}
    made, restored = mixer(**plain), mixer(**plain)
    steps = [replace(statistics(s), weights=np.array([0.6, 0.0, 0.4])) for s in range(12)]
    for step in steps[:7]:
        made.feed(step)
    restored.load(made.arrays())
    for each in (made, restored):
        for step in steps[7:]:
            each.feed(step)
    assert weights(made, 6).tolist() == weights(restored, 6).tolist()
    made.close()
    restored.close()
