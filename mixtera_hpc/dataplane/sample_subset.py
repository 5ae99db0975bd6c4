"""Subset of the samples of a query that is served: one side of the holdout, without dropped samples.

Neither is part of the configuration. The side is chosen by who opens the data; drops are recorded in the run.
"""

from dataclasses import dataclass

from mixtera_hpc.core.holdout import Split

__all__ = ["TRAINING_SAMPLES", "SampleSubset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSubset:
    """The samples of a query's selection that are served."""

    split: Split = "train"
    """Side of the holdout; without `query.holdout` all samples are on the side `train`."""
    drop: tuple[str, ...] = ()
    """Expressions of `resume --drop`, oldest first. Samples that match one of them are skipped."""

    def restrict(self, where: str | None) -> str:
        """Return the query `where` without the dropped samples."""
        where = (where or "").strip()
        terms = [f"({where})"] if where else []
        terms += [f"not ({expression})" for expression in self.drop]
        return " and ".join(terms)


TRAINING_SAMPLES = SampleSubset()
"""The subset of a new run."""
