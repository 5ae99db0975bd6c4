"""The tables of `python -m bench mixing`: mean and spread over seeds of each domain's held-out loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench._mixing.corpora import Corpus
from bench._mixing.runs import Runs
from bench._peers.page import aligned

__all__ = ["Row", "lines", "summary"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """The runs of one mixture."""

    mixture: str
    loss: NDArray[np.float64]
    """Final held-out losses, nats; shape (num_seeds, num_domains)."""
    weights: NDArray[np.float64]
    """Shares of the sequences that were served; shape (num_seeds, num_domains)."""
    gain: NDArray[np.float64]
    """Mean loss of the natural mixture minus that of this one, with the same seed; shape (num_seeds,)."""

    def as_dict(self, corpus: Corpus) -> dict[str, Any]:
        """Return the numbers for a JSON file."""
        return {
            "mixture": self.mixture,
            "domains": corpus.domains,
            "loss": self.loss.tolist(),
            "weights": self.weights.tolist(),
            "gain": self.gain.tolist(),
        }


def summary(runs: Runs, corpus: Corpus, mixtures: Sequence[str], num_seeds: int) -> list[Row]:
    """Return a row for each mixture that was trained with all seeds."""
    by_mixture = {}
    for mixture in mixtures:
        results = [runs.result(corpus, mixture, seed) for seed in range(1, num_seeds + 1)]
        finished = [result for result in results if result is not None]
        if len(finished) == num_seeds:
            by_mixture[mixture] = finished
    if mixtures[0] not in by_mixture:
        return []
    # Mixtures are compared seed by seed, because seeds differ by more than many mixtures do.
    reference = np.array([result.loss.mean() for result in by_mixture[mixtures[0]]])
    return [
        Row(
            mixture=mixture,
            loss=np.stack([result.loss for result in results]),
            weights=np.stack([result.weights for result in results]),
            gain=reference - np.array([result.loss.mean() for result in results]),
        )
        for mixture, results in by_mixture.items()
    ]


def lines(corpus: Corpus, rows: Sequence[Row]) -> list[str]:
    """Return two Markdown tables: held-out losses, and the shares that were served."""
    losses = [["mixture", *corpus.domains, "mean", "gain over natural", "in natural shares"]]
    if corpus.entropy is not None:
        known = [corpus.entropy[kind] for kind in corpus.domains]
        losses.append(["(entropy)", *(f"{value:.3f}" for value in known), f"{np.mean(known):.3f}", "", ""])
    shares = [["mixture", *corpus.domains]]
    # The first row is the natural mixture.
    natural = rows[0].weights.mean(axis=0) if rows else np.zeros(len(corpus.domains))
    natural_loss = rows[0].loss @ natural if rows else np.zeros(0)
    for row in rows:
        mean = row.loss.mean(axis=1)
        gains = [_spread(row.gain, "+.3f"), _spread(natural_loss - row.loss @ natural, "+.3f")]
        losses.append([row.mixture, *map(_spread, row.loss.T), _spread(mean), *gains])
        shares.append([row.mixture, *(f"{100 * value:.1f} %" for value in row.weights.mean(axis=0))])
    return [*aligned(losses, markdown=True).splitlines(), "", *aligned(shares, markdown=True).splitlines()]


def _spread(values: NDArray[np.float64], style: str = ".3f") -> str:
    """Return the mean over seeds and, in brackets, half of the distance between the extremes."""
    return f"{values.mean():{style}} ({np.ptp(values) / 2:.3f})"
