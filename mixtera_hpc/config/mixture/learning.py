"""The parts of a mixture that learn: their kind of losses, and warnings for users before a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from mixtera_hpc.config.schema import Config, MixtureConfig, StageConfig
from mixtera_hpc.core.mixing.algorithm import MixingAlgorithm, learns_from, make_algorithm
from mixtera_hpc.core.mixing.exponentiated_gradient import NO_REFERENCES, ExponentiatedGradient
from mixtera_hpc.core.mixing.named_parameters import FROM_RUN, NAMED_PARAMETERS, named_form
from mixtera_hpc.errors import ConfigError, pluralize

__all__ = ["checked_algorithm", "learning_parts", "learning_warnings", "needs_held_out"]


def learning_parts(mixture: MixtureConfig) -> Iterator[MixtureConfig | StageConfig]:
    """Yield the mixture, or the stages of its schedule, as far as they learn."""
    parts: list[MixtureConfig | StageConfig] = [mixture]
    if mixture.kind == "schedule":
        parts = [*mixture.schedule.stages]
    yield from (part for part in parts if part.kind == "dynamic")


def checked_algorithm(written: Mapping[str, Any]) -> MixingAlgorithm[Any]:
    """Build the algorithm that `mixture.algorithm` describes, without the values that files or runs hold.

    Raises:
        ConfigError: the name or a parameter is wrong, or reference losses are missing.
    """
    parameters = dict(written)
    name = str(parameters.pop("name", "ado"))
    if named_form(parameters):
        # Domains have names only when the index is open. Without them, the form is checked.
        named = {k for k in NAMED_PARAMETERS if isinstance(parameters.get(k), str | Mapping)}
        parameters = {k: v for k, v in parameters.items() if k not in named}
        if name == ExponentiatedGradient.name:
            parameters.pop(FROM_RUN, None)
    elif name == ExponentiatedGradient.name and not parameters.get("reference_losses"):
        make_algorithm(name, parameters)
        raise ConfigError(NO_REFERENCES)
    return make_algorithm(name, parameters)


def needs_held_out(mixture: MixtureConfig) -> bool:
    """Return True if the mixture learns from held-out losses."""
    return any(learns_from(checked_algorithm(part.algorithm)) == "heldout" for part in learning_parts(mixture))


def learning_warnings(config: Config) -> list[str]:
    """Return what keeps the mixture of a run from learning, one or two sentences each."""
    warnings = []
    num_steps = config.training.num_steps
    for part in learning_parts(config.mixture):
        algorithm = checked_algorithm(part.algorithm)
        warmup = getattr(getattr(algorithm, "config", None), "warmup", 0)
        if warmup >= num_steps:
            example = max(num_steps // 4, min(num_steps - 1, 1))
            warnings.append(
                f"mixture.algorithm.warmup is {warmup}, and the run has {pluralize(num_steps, 'step')}: the mixture "
                f"never changes. Set mixture.algorithm.warmup below {num_steps}, for example {example}."
            )
        if learns_from(algorithm) == "heldout" and not config.training.validate_every:
            warnings.append(
                "The mixture learns from held-out losses, and training.validate_every is 0: the reference trainer "
                "never validates. Set training.validate_every. An own loop calls DataPlane.held_out."
            )
    return warnings
