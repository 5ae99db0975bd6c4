"""The table of the laws or scores of a mixing algorithm, and warnings about values that are not determined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.mixing.laws.law_objective import BOUND_NAMES
from mixtera_hpc.errors import list_names, pluralize
from mixtera_hpc.report.mixing.domain_names import common_property, shorten_names
from mixtera_hpc.report.number_format import MISSING

__all__ = ["LEARNED_FIELDS", "LearnedMixture", "learned_notices", "learned_rows", "learned_section", "read_learned"]

LEARNED_FIELDS = {
    "speed": "speed per M sequences",
    "credit": "credit",
    "epsilon": "epsilon",
    "beta": "beta",
    "alpha": "alpha",
    "best_beta": "beta, best fit",
    "best_alpha": "alpha, best fit",
    "residual": "residual",
    "law_bounds": "law",
    "reward": "reward",
    "score": "excess loss",
    "reference_loss": "reference",
    "average_weight": "mean weight",
    "last_loss": "last loss",
    "summed_loss": "summed loss",
    "influence": "influence",
    "base_weight": "weight outside bursts",
}
"""Field of `mixture.jsonl` → heading of its column."""

LARGE_RESIDUAL = 0.05
"""Root mean square of log residuals above which speeds are called uncertain: 5 % of the loss."""

MAX_NAMES = 5
MAX_ROWS = 50
"""Domains in the table of the page, largest weight first."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedMixture:
    """The newest values of every field that an algorithm recorded."""

    names: Sequence[str]
    fields: Mapping[str, Floats]
    """Shape (K,) each; NaN for domains of weight 0."""
    law_status: Floats | None
    num_failed_updates: int
    problem: str | None
    """Newest exception of an update."""
    never_changed: bool
    """True if all chunks have the same weights."""
    warmup: int | None
    """Steps before the mixture begins to change, if the algorithm has a warm-up."""


def read_learned(
    events: Sequence[Mapping[str, Any]], names: Sequence[str], config: Mapping[str, Any]
) -> LearnedMixture:
    """Return the newest values of the fields of `mixture.jsonl`.

    Args:
        events: of the run, in order.
        names: of the domains.
        config: content of `config.yaml`.
    """
    newest: dict[str, Floats] = {}
    for event in events:
        for name in (*LEARNED_FIELDS, "law_status"):
            values = event.get(name)
            if isinstance(values, list) and len(values) == len(names):
                newest[name] = np.array(values, np.float64)
    last = events[-1] if events else {}
    mixture = config.get("mixture", {})
    algorithm = mixture.get("algorithm", {}) if mixture.get("kind") == "dynamic" else {}
    is_ado = bool(algorithm) and algorithm.get("name", "ado") == "ado"
    return LearnedMixture(
        names=names,
        fields={name: newest[name] for name in LEARNED_FIELDS if name in newest},
        law_status=newest.get("law_status"),
        num_failed_updates=int(last.get("num_failed_updates", 0)),
        problem=last.get("problem"),
        never_changed=bool(algorithm) and len({tuple(event["weights"]) for event in events}) == 1,
        warmup=int(algorithm.get("warmup", 1000)) if is_ado else None,
    )


def learned_notices(learned: LearnedMixture, num_steps: int) -> list[str]:
    """Return what a reader must not miss, as plain text.

    Args:
        num_steps: configured number of steps; 0 if it is not known.
    """
    notices = []
    if learned.problem:
        failed = pluralize(learned.num_failed_updates, "update")
        notices.append(f"{failed} of the mixing algorithm failed, and the weights before stayed: {learned.problem}")
    if learned.warmup is not None and 0 < num_steps <= learned.warmup:
        notices.append(
            f"mixture.algorithm.warmup is {learned.warmup}, and the run has {num_steps} steps: the mixture never "
            "changes."
        )
    if "law_bounds" in learned.fields:
        at_bound = [n for n, bits in zip(learned.names, learned.fields["law_bounds"], strict=True) if bits > 0]
        if at_bound:
            notices.append(
                f"The laws of {list_names(at_bound, MAX_NAMES)} lie on a bound: the losses do not determine them, and "
                "their speeds and weights may be artefacts. A longer mixture.algorithm.warmup gives the fit more "
                "losses."
            )
        wide = [n for n, r in zip(learned.names, learned.fields["residual"], strict=True) if r > LARGE_RESIDUAL]
        if wide:
            notices.append(
                f"The losses of {list_names(wide, MAX_NAMES)} scatter by more than {LARGE_RESIDUAL:.0%} around their "
                "laws: their speeds are uncertain."
            )
    return notices


def learned_rows(learned: LearnedMixture) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table, in the order of the domains; empty without fields."""
    headings = [common_property(learned.names) or "domain", *(LEARNED_FIELDS[name] for name in learned.fields)]
    rows = []
    for d, name in enumerate(shorten_names(learned.names)):
        rows.append([name, *(_cell(learned, field, d) for field in learned.fields)])
    return headings, rows if learned.fields else []


def learned_section(learned: LearnedMixture, order: Sequence[int]) -> str:
    """Return the table as a section of the page, domains in this order; empty without fields."""
    headings, rows = learned_rows(learned)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in rows[domain])}</tr>" for domain in list(order)[:MAX_ROWS]
    )
    text = "What the mixing algorithm had learned when it decided the newest weights."
    if "alpha" in learned.fields:
        text += (
            " Laws: loss = epsilon + beta · n^-alpha with n in sequences of all domains; residual: root mean square of "
            "the relative error of the fit. A law on a bound is not determined by the losses."
        )
    if "best_alpha" in learned.fields:
        text += (
            " Speeds use epsilon, beta and alpha, where alpha is averaged with all exponents that fit the losses. "
            "The residual and the last column describe the best fit."
        )
    return (
        f"<section><h2>Learned by the mixture</h2><p>{text}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _cell(learned: LearnedMixture, field: str, domain: int) -> str:
    value = float(learned.fields[field][domain])
    if field == "law_bounds":
        return _law(learned, domain, value)
    if not np.isfinite(value):
        return MISSING
    if field == "speed":
        return f"{1e6 * value:.3g}"
    return f"{value:.2%}" if field == "residual" else f"{value:.3g}"


def _law(learned: LearnedMixture, domain: int, bounds: float) -> str:
    """Return how far the law of a domain can be trusted."""
    status = learned.law_status[domain] if learned.law_status is not None else np.nan
    if not np.isfinite(bounds) or status == 0:
        return "none"
    reached = [name for bit, name in enumerate(BOUND_NAMES) if int(bounds) >> bit & 1]
    text = ", ".join(reached) if reached else "fitted"
    return f"{text} (older)" if status == 2 else text
