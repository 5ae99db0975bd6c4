"""The losses of a run as a trace, and the difference between its recorded weights and those of a replay.

Metrics hold means; a mean and a count determine the sum, which is a multiple of 2^-24 nats. So a replay from metrics of
every step sees exactly what the run saw. With `training.log_every` above 1 a line covers several steps. A replay then
treats the line as that many equal steps, and differs.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.mixing.replay.loss_trace import LossTrace
from mixtera_hpc.core.statistics import DomainStatistics
from mixtera_hpc.dataplane.mixing.configured_weights import config_weights
from mixtera_hpc.dataplane.mixing.requests import read_decisions
from mixtera_hpc.dataplane.mixing.sequence import MixtureSequence
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.run_identity import data_of_run
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.track.event_reader import read_events

__all__ = ["RecordedRun", "WeightDifference", "read_recorded_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDifference:
    """The distance between a replay and the recorded weights."""

    largest: float
    num_chunks: int
    """Chunks that were compared: those whose weights depend on losses."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedRun:
    """The recorded losses and mixture of a run."""

    config: Config
    trace: LossTrace
    data_steps: NDArray[np.int64]
    """Data step of every step of the trace; shape (T,)."""
    chunk_weights: dict[int, NDArray[np.float64]]
    """Chunk → recorded weights."""
    steps_per_line: int
    """Largest number of steps that a line of the metrics covers."""
    source: Source
    folder: RunFolder

    def compare(self) -> WeightDifference:
        """Replay the run through the mixer that served it, and compare the weights of every chunk."""
        plane = self.config.dataplane
        mixtures = MixtureSequence(self.config.mixture, self.source.mixture_context)
        mixtures.restore(read_decisions(self.folder.decisions))
        held_out = {s.step: s for s in self.trace.validations()}
        steps = dict(zip(self.data_steps.tolist(), self.trace.steps(), strict=True))
        largest = 0.0
        compared = 0
        for data_step in range(int(self.data_steps[-1]) + 1):
            statistics = steps.get(data_step)
            if statistics is not None and statistics.step in held_out:
                mixtures.feed_held_out(replace(held_out[statistics.step], step=data_step))
            mixtures.feed(replace(statistics or self._empty_statistics(), step=data_step))
            chunk, step_in_chunk = divmod(data_step, plane.chunk_steps)
            decided = chunk + plane.feedback_lag
            if step_in_chunk == plane.chunk_steps - 1 and decided in self.chunk_weights:
                mixtures.arrays()  # Waits for the algorithm.
                weights = mixtures.weights_of(decided)
                if weights is not None:
                    served = self.source.without_dropped_domains(weights)
                    served = served / (served.sum() or 1.0)
                    largest = max(largest, float(np.abs(served - self.chunk_weights[decided]).max()))
                    compared += 1
        mixtures.close()
        return WeightDifference(largest=largest, num_chunks=compared)

    def _empty_statistics(self) -> DomainStatistics:
        """Return the statistics of a step that was skipped."""
        zero = np.zeros(len(self.trace.names), np.int64)
        return DomainStatistics(
            step=0, loss_sum=zero.astype(np.float64), num_tokens=zero, num_sequences=zero, num_nonfinite=zero
        )


def read_recorded_run(folder: RunFolder) -> RecordedRun:
    """Read the metrics of a run, and open its index for the initial mixture. Price: one open of the index.

    Raises:
        DataError: the run has not recorded any step.
        ConfigError: the steps that it recorded have gaps.
    """
    steps = read_events(folder.metric("steps"))
    if not steps:
        raise DataError(f"{folder.path} has not recorded any step, so there are no losses to replay.")
    config, subset = data_of_run(folder)
    source = open_source(config, Local(), subset=subset, check=False)
    chunks = read_events(folder.metric("mixture"))
    data_steps, in_force = _served_steps(chunks, config.dataplane.chunk_steps, int(steps[-1]["step"]) + 1)
    expanded = _expand(steps)
    if len(expanded["loss"]) != len(data_steps):
        raise ConfigError(
            f"{folder.path} has recorded {len(expanded['loss'])} of {len(data_steps)} steps; a replay needs all."
        )
    validations = read_events(folder.metric("validation"))
    num_domains = source.num_domains
    trace = LossTrace(
        names=tuple(source.names),
        prior=config_weights(config.mixture, config.mixture, source.mixture_context.domain_sizes),
        num_sequences=expanded["sequences"],
        num_tokens=expanded["tokens"],
        loss_mean=expanded["loss"],
        global_batch_size=config.dataplane.global_batch_size,
        seq_len=config.dataplane.seq_len,
        weights=in_force,
        held_out_step=np.array([v["step"] for v in validations], np.int64),
        held_out_loss=np.array([v["domain_loss"] for v in validations], np.float64).reshape(-1, num_domains),
        held_out_tokens=np.array([v["domain_tokens"] for v in validations], np.int64).reshape(-1, num_domains),
    )
    return RecordedRun(
        config=config,
        trace=trace,
        data_steps=data_steps,
        chunk_weights={int(c["chunk"]): np.array(c["weights"], np.float64) for c in chunks},
        steps_per_line=max(int(event.get("num_steps", 1)) for event in steps),
        source=source,
        folder=folder,
    )


def _served_steps(
    chunks: list[dict[str, Any]], chunk_steps: int, num_steps: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the data step of every training step, shape (T,), and its recorded weights, shape (T, K)."""
    starts = np.array([chunk["step"] for chunk in chunks], np.int64)
    weights = np.array([chunk["weights"] for chunk in chunks], np.float64)
    first_data_steps = np.array([chunk["chunk"] for chunk in chunks], np.int64) * chunk_steps
    steps = np.arange(num_steps)
    # The newest chunk that began at or before each step.
    chunk_of = np.maximum(np.searchsorted(starts, steps, side="right") - 1, 0)
    return first_data_steps[chunk_of] + steps - starts[chunk_of], weights[chunk_of]


def _expand(events: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """Return losses, tokens and sequences of every step; a line over several steps becomes that many equal ones."""
    loss: list[NDArray[np.float64]] = []
    tokens: list[NDArray[np.int64]] = []
    sequences: list[NDArray[np.int64]] = []
    for event in events:
        num_steps = int(event.get("num_steps", 1))
        for column, name in ((tokens, "domain_tokens"), (sequences, "domain_sequences")):
            # Differences of the rounded prefix sums: whole numbers with the right total.
            prefix = np.array(event[name], np.int64)[None] * np.arange(num_steps + 1)[:, None] // num_steps
            column.extend(np.diff(prefix, axis=0))
        loss.extend([np.array(event["domain_loss"], np.float64)] * num_steps)
    return {
        "loss": np.array(loss, np.float64),
        "tokens": np.array(tokens, np.int64),
        "sequences": np.array(sequences, np.int64),
    }
