"""The mixtures that `python -m bench mixing` compares, as overrides of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench._mixing.corpora import Corpus

__all__ = ["MIXTURES", "Mixture", "proposed"]

WARMUP_SHARE = 8
"""ADO begins to move the mixture after this part of a run, and refits as often again: 1/8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """One row of the table."""

    name: str
    overrides: Callable[[Corpus], tuple[str, ...]]
    needs_reference: bool = False
    """The run learns from the final held-out losses of the uniform run with the same seed."""


def _uniform(corpus: Corpus) -> tuple[str, ...]:
    return _static(dict.fromkeys(corpus.domains, 1 / len(corpus.domains)))


def _static(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the overrides of a fixed mixture."""
    domains = ",".join(f"{{key: {{kind: {kind}}}, weight: {weight:.6f}}}" for kind, weight in weights.items())
    return ("mixture=static", f"mixture.domains=[{domains}]", "mixture.normalize=true")


def _learned(name: str, **parameters: object) -> tuple[str, ...]:
    """Return the overrides of an algorithm that starts from the natural mixture."""
    listed = "".join(f", {key}: {value}" for key, value in parameters.items())
    # The group of another preset must not leave parameters behind, so the whole mapping is replaced.
    return ("mixture=ado", f"+mixture.algorithm={{name: {name}{listed}}}")


def _ado(corpus: Corpus, *, warmup_share: int = WARMUP_SHARE, **parameters: object) -> tuple[str, ...]:
    interval = corpus.num_steps // WARMUP_SHARE
    warmup = corpus.num_steps // warmup_share
    return _learned("ado", warmup=warmup, refit_interval=interval, first_fitted_step=interval // 4, **parameters)


def proposed(path: Path) -> Mixture:
    """Return the mixture of a `mixture.yaml`, such as `swarm` proposes.

    Raises:
        SystemExit: the file cannot be read.
    """
    try:
        mixture = yaml.safe_load(path.read_text(encoding="utf-8"))
        mixture = mixture.get("mixture", mixture)
        weights = {str(domain["key"]["kind"]): float(domain["weight"]) for domain in mixture["domains"]}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} holds no domains with a `kind` and a weight: {error}") from None
    return Mixture(name="swarm", overrides=lambda corpus: _static(weights))


MIXTURES = (
    Mixture(name="natural", overrides=lambda corpus: ("mixture=natural",)),
    Mixture(name="uniform", overrides=_uniform),
    Mixture(name="hand-set", overrides=lambda corpus: _static(corpus.hand_set)),
    Mixture(
        name="unimax",
        overrides=lambda corpus: ("mixture=unimax", f"mixture.unimax_epochs={corpus.unimax_epochs}"),
    ),
    Mixture(name="ado", overrides=_ado),
    Mixture(name="odm", overrides=lambda corpus: _learned("odm")),
    Mixture(name="odm, released", overrides=lambda corpus: _learned("odm", variant="released")),
    Mixture(
        name="exponentiated gradient", overrides=lambda corpus: _learned("exponentiated-gradient"), needs_reference=True
    ),
    Mixture(
        name="exponentiated gradient, eta 0.1",
        overrides=lambda corpus: _learned("exponentiated-gradient", eta=0.1),
        needs_reference=True,
    ),
    Mixture(name="ado, long warm-up", overrides=lambda corpus: _ado(corpus, warmup_share=2)),
    Mixture(
        name="ado, floor",
        overrides=lambda corpus: (*_ado(corpus), f"mixture.floor={0.5 / len(corpus.domains):.6f}"),
    ),
)
