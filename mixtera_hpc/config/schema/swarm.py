"""Settings of the group `swarm`: the mixtures of proxy runs, and the regression that proposes a mixture."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["SwarmConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """The mixtures that `mixtera-hpc swarm` samples for proxy runs, and the regression that proposes a mixture."""

    num_proxies: int | None = None
    """Number of proxy runs. Null means three per domain and phase, and at least 8."""
    seed: int = 0
    """Seed of the sampled mixtures. Proxy i has the same mixture for every `swarm.num_proxies`."""
    temperature: float = 2.0
    """The mixtures are sampled around weight^(1/temperature), where `weight` is that of the configured mixture:
    natural proportions, if none are written. 1 keeps the weights, larger values make the domains more equal. Above
    0."""
    concentration: float = 1.0
    """Parameter of the Dirichlet distribution for each domain of an equal share. Smaller values give more extreme
    mixtures, larger ones stay close to the middle. Above 0."""
    min_share: float = 0.0
    """Sampled shares below this become 0, if the floor of the domain allows it. Between 0 and 1."""
    phases: list[float] = field(default_factory=lambda: [1.0])
    """Shares of the run, such as [0.8, 0.2]. Every phase has a mixture of its own: each proxy samples one per phase,
    and the proposal is a schedule. Above 0, of sum 1."""
    target_tokens: int | None = None
    """Tokens (or samples) of the run that the mixture is for. With `mixture.max_epochs`, or that of a domain, the share
    of a domain is limited to what it has. Null: only the proxies themselves are limited."""
    regression: Literal["auto", "log-linear", "exponential", "power"] = "auto"
    """The law of a loss in the shares (docs/swarm.md). `auto` takes for every metric the one with the smallest
    cross-validated error."""
    objective: dict[str, float] = field(default_factory=dict)
    """Metric → its weight in the mean that is minimised. Without any, all metrics count equally."""
    penalty: float = 0.0
    """Nats of loss that one nat of relative entropy from the middle of the sampled mixtures costs. Larger values keep
    the proposal closer to it. At least 0."""
