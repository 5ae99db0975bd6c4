"""Settings of the group `query`: which samples take part."""

from dataclasses import dataclass, field

__all__ = ["HoldoutConfig", "QueryConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldoutConfig:
    """Samples that training never sees. A hash of the shard path and the row number of a sample decides."""

    fraction: float = 0.0
    """Share of all samples that is held out, at least 0 and less than 1. With 0 nothing is held out."""
    seed: int = 0
    """Another seed holds out other samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryConfig:
    """Selection of the samples that take part in a run."""

    where: str | None = None
    """Boolean expression over properties, for example `language in ['en', 'de'] and quality >= 0.7 and 'python' in
    tags` (docs/query.md). Null selects every sample."""
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    """Samples that are held out for validation."""
