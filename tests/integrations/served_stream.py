"""The sequences that a run must serve, and those that the ranks of an example say they trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtera_hpc import DataPlane, compose
from mixtera_hpc.dataplane.steps.digests import sequence_digest

__all__ = ["Place", "Recorded", "ServedStream", "read_records"]

Place = tuple[int, int]
"""A step and a position in its global batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedStream:
    """The first steps of the bare data plane in one process."""

    digests: dict[Place, str]
    num_tokens: dict[Place, int]
    """Number of predicted tokens of the sequence that count."""
    domain_names: list[str]

    @classmethod
    def of(cls, overrides: Sequence[str], num_steps: int) -> "ServedStream":
        digests: dict[Place, str] = {}
        num_tokens: dict[Place, int] = {}
        with DataPlane.open(compose(list(overrides))) as plane:
            for batch in plane:
                for row, position in enumerate(batch.positions.tolist()):
                    place = (batch.step, position)
                    digests[place] = sequence_digest(batch.tokens[row])
                    num_tokens[place] = int(batch.loss_mask[row].sum())
                if batch.step + 1 == num_steps:
                    break
            return cls(digests=digests, num_tokens=num_tokens, domain_names=plane.domain_names)

    def between(self, first: int, end: int) -> dict[Place, str]:
        """Return the digests of the steps from `first` up to `end`, without `end`."""
        return {place: digest for place, digest in self.digests.items() if first <= place[0] < end}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One line of `OUT/rank_R.jsonl`: an optimizer step of one rank."""

    rank: int
    step: int
    digests: dict[Place, str]
    loss: float


def read_records(out: Path) -> list[Recorded]:
    """Return the lines of all ranks, by rank and then in the order in which they were written."""
    records: list[Recorded] = []
    for path in sorted(out.glob("rank_*.jsonl")):
        rank = int(path.stem.removeprefix("rank_"))
        for text in path.read_text().splitlines():
            line = json.loads(text)
            step = line["step"]
            assert len(line["positions"]) == len(line["digests"]), line
            places = [(step, position) for position in line["positions"]]
            assert len(set(places)) == len(places), f"rank {rank} trained twice on a sequence of step {step}"
            digests = dict(zip(places, line["digests"], strict=True))
            records.append(Recorded(rank=rank, step=step, digests=digests, loss=line["loss"]))
    return records


def trained_digests(records: Sequence[Recorded]) -> dict[Place, str]:
    """Return the digests of all ranks together; ranks that trained on the same sequence must have the same digest."""
    digests: dict[Place, str] = {}
    for record in records:
        for place, digest in record.digests.items():
            assert digests.setdefault(place, digest) == digest, f"two digests of (step, position) {place}"
    return digests


def mean_losses(records: Sequence[Recorded], stream: ServedStream) -> list[float]:
    """Return the mean loss of the counted tokens of every step, over all ranks."""
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    for record in records:
        num_tokens = sum(stream.num_tokens[place] for place in record.digests)
        sums[record.step] = sums.get(record.step, 0.0) + record.loss * num_tokens
        counts[record.step] = counts.get(record.step, 0) + num_tokens
    return [sums[step] / counts[step] for step in sorted(sums)]
