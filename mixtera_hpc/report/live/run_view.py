"""The present state of a run, computed from its events: mixture, loss of every domain, speed, slowest ranks, time left.

A pure accumulation: events in, a snapshot out. Price: the last `WINDOW` lines of `steps.jsonl` in memory.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixtera_hpc.report.timing.stalls import host_of

__all__ = ["DomainView", "RunView", "SlowStage", "Snapshot"]

WINDOW = 20
"""Lines of `steps.jsonl` over which speed, waits and the slowest ranks are computed."""

Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainView:
    """One domain at present."""

    name: str
    weight: float | None
    """Requested weight of the newest chunk."""
    served: float | None
    """Share in all sequences served before that chunk."""
    loss: float | None
    """Mean over the window, weighted by tokens; nats."""
    loss_before: float | None
    """Mean over the window before, weighted by tokens; nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowStage:
    """The rank that took longest in one stage, summed over the window."""

    stage: str
    rank: int
    host: str
    """Empty if it was not recorded."""
    seconds: float
    """Per step, mean over the lines in which this rank was the slowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The present state of a run. None stands for a number that was not recorded."""

    steps_done: int = 0
    num_steps: int = 0
    """0 if it is not known."""
    attempt: int | None = None
    num_ranks: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    wait_share: float | None = None
    """Share of the time of a step in which the trainer waited for data."""
    remaining_s: float | None = None
    chunk: int | None = None
    domains: Sequence[DomainView] = ()
    slowest: Sequence[SlowStage] = ()


@dataclass(slots=True, kw_only=True)
class RunView:
    """Accumulates the events of a run, and computes its present state from them."""

    _steps: deque[Event] = field(default_factory=lambda: deque(maxlen=2 * WINDOW))
    _chunk: Event = field(default_factory=dict)
    _attempt: Event = field(default_factory=dict)
    _validation: Event = field(default_factory=dict)
    _hosts: list[Event] = field(default_factory=list)

    def add(self, stream: str, events: Sequence[Event]) -> None:
        """Take the next events of a stream."""
        if stream == "steps":
            self._steps.extend(events)
        elif stream == "hosts":
            self._hosts.extend(events)
        elif events and stream == "mixture":
            self._chunk = events[-1]
        elif events and stream == "attempts":
            self._attempt = events[-1]
        elif events and stream == "validation":
            self._validation = events[-1]

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        window = list(self._steps)[-WINDOW:]
        num_steps = int(self._attempt.get("num_steps") or 0)
        if not window:
            return Snapshot(num_steps=num_steps, attempt=self._attempt.get("attempt"))
        last = window[-1]
        done = int(last["step"]) + 1
        step_s = _median([event.get("step_s") for event in window])
        wait_s = _median([event.get("data_wait_s") for event in window])
        wait_share = wait_s / step_s if step_s and wait_s is not None else None
        remaining_s = max(num_steps - done, 0) * step_s if num_steps and step_s is not None else None
        return Snapshot(
            steps_done=done,
            num_steps=num_steps,
            attempt=last.get("attempt"),
            num_ranks=last.get("num_ranks"),
            loss=last.get("loss"),
            held_out_loss=self._validation.get("loss"),
            tokens_per_s=_median([event.get("tokens_per_s") for event in window]),
            step_s=step_s,
            wait_share=wait_share,
            remaining_s=remaining_s,
            chunk=self._chunk.get("chunk"),
            domains=self._domains(),
            slowest=self._slowest(window),
        )

    def _domains(self) -> list[DomainView]:
        lines = list(self._steps)
        losses = _domain_losses(lines[-WINDOW:])
        before = _domain_losses(lines[:-WINDOW])
        names = self._chunk.get("domains") or self._attempt.get("domains") or ()
        weights = self._chunk.get("weights") or ()
        served = self._chunk.get("served") or ()
        return [
            DomainView(
                name=str(name),
                weight=_item_or_none(weights, i),
                served=_item_or_none(served, i),
                loss=_item_or_none(losses, i),
                loss_before=_item_or_none(before, i),
            )
            for i, name in enumerate(names)
        ]

    def _slowest(self, window: Sequence[Event]) -> list[SlowStage]:
        """Return the slowest rank of every stage, the longest stage first."""
        seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for event in window:
            ranks = event.get("stage_rank", {})
            for stage, stage_s in event.get("stage_s", {}).items():
                if stage in ranks:
                    seconds[stage][int(ranks[stage])].append(float(stage_s))
        stages = []
        for stage, by_rank in seconds.items():
            rank, times = max(by_rank.items(), key=lambda item: sum(item[1]))
            host = host_of(rank, window[-1].get("attempt"), self._hosts)
            stages.append(SlowStage(stage=stage, rank=rank, host=host, seconds=sum(times) / len(times)))
        return sorted(stages, key=lambda slow: -slow.seconds)


def _median(values: Sequence[Any]) -> float | None:
    numbers = [value for value in values if isinstance(value, int | float)]
    return float(np.median(numbers)) if numbers else None


def _domain_losses(events: Sequence[Event]) -> list[float | None]:
    """Return the mean loss of every domain over `events`, weighted by tokens; None for a domain without tokens."""
    widths = {len(event.get("domain_loss", ())) for event in events}
    if len(widths) != 1:
        return []  # No steps, or a mixture with another number of domains took over.
    losses = np.array([event["domain_loss"] for event in events], np.float64)
    tokens = np.array([event["domain_tokens"] for event in events], np.float64)
    has_loss = np.isfinite(losses) & (tokens > 0)
    sums = np.where(has_loss, losses * tokens, 0).sum(axis=0)
    counts = np.where(has_loss, tokens, 0).sum(axis=0)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def _item_or_none(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None
