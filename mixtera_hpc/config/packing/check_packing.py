"""Checks of packing, balancing and the shuffle of sequences."""

from mixtera_hpc.config.batch_ramp import sizes_from
from mixtera_hpc.config.check_numbers import at_least
from mixtera_hpc.config.schema import DataPlaneConfig, MixtureConfig, TrainingConfig

__all__ = [
    "COST_OF_TRANSFORM",
    "balance_group",
    "cost_problems",
    "packing_problems",
    "unused_balance",
    "unused_balance_of_reference_trainer",
]

COST_OF_TRANSFORM = "transform"
"""Value of `dataplane.sample_cost` with which the function `data.transform` gives the costs."""

MAX_PACK_GROUP = 4096
"""Sequences. Packing takes 3 to 4 µs per document of the whole group before its first sequence is served."""
MAX_DEFAULT_BALANCE_GROUP = 64
"""Positions. Eight sequences for each of eight ranks balance within a few percent."""


def balance_group(plane: DataPlaneConfig, batch_size: int) -> int:
    """Return the positions of a global batch that are balanced together."""
    if plane.balance_group is not None:
        return plane.balance_group
    largest = min(batch_size, MAX_DEFAULT_BALANCE_GROUP)
    return max(group for group in range(1, largest + 1) if batch_size % group == 0)


def packing_problems(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    """Return everything wrong with the settings of packing and balancing."""
    return [*_pack(plane, mixture), *_balance(plane, mixture), *_sample_costs(plane, mixture)]


def cost_problems(plane: DataPlaneConfig, transform: str | None) -> list[str]:
    """Return everything wrong with costs that the function `transform` (`data.transform`) gives."""
    if plane.sample_cost != COST_OF_TRANSFORM:
        return []
    problems = []
    if transform is None:
        problems.append(
            "dataplane.sample_cost is transform, but data.transform is not set. Name the function that returns "
            "CostedSample(sample, cost), or set dataplane.sample_cost to a number property."
        )
    if plane.sample_budget is None:
        problems.append(
            "dataplane.sample_cost is transform, but dataplane.sample_budget is not set, so the costs would "
            "have no effect. Set it, or remove dataplane.sample_cost."
        )
    if plane.balance == "cost":
        problems.append(
            "dataplane.balance=cost orders samples before they are read, but with dataplane.sample_cost=transform "
            "their cost is known afterwards. Set dataplane.balance=none, or dataplane.sample_cost to a number property."
        )
    return problems


def unused_balance(plane: DataPlaneConfig, attention: str, cure: str) -> str | None:
    """Return the warning that balancing is of no use, because all sequences cost the same; None if nothing is balanced.

    Args:
        plane: the settings of the data plane.
        attention: says that a token of the trainer attends to other documents of its sequence, as a clause.
        cure: how to let the trainer attend to the own document only, as an imperative.
    """
    if plane.balance != "attention":
        return None
    return (
        f"dataplane.balance=attention is of no use: {attention}, and every sequence costs the same, whatever its "
        f"documents are.\n  {cure}, or set dataplane.balance=none."
    )


def unused_balance_of_reference_trainer(plane: DataPlaneConfig, training: TrainingConfig) -> str | None:
    """Return the same for the reference trainer; None if it attends to the own document only."""
    if training.attention == "document":
        return None
    attention = f"the reference trainer has training.attention={training.attention}"
    return unused_balance(plane, attention, "Set training.attention=document")


def _pack(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    problems = []
    if not 2 <= plane.pack_group <= MAX_PACK_GROUP:
        problems.append(f"dataplane.pack_group is {plane.pack_group}, expected 2 to {MAX_PACK_GROUP} sequences.")
    if plane.pack == "concat":
        return problems
    if mixture.unit != "tokens":
        problems.append(
            f"dataplane.pack is {plane.pack}, but mixture.unit is {mixture.unit}: only tokens are packed. Set "
            "mixture.unit=tokens, or dataplane.pack=concat."
        )
    if plane.shuffle == "sequence":
        problems.append(
            f"dataplane.pack={plane.pack} packs neighbouring sequences together, but dataplane.shuffle=sequence serves "
            "neighbours far apart, so each sequence would cost a whole group. Set dataplane.shuffle=window, or "
            "dataplane.pack=concat."
        )
    return problems


def _balance(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    problems = []
    group = plane.balance_group
    if group is not None:
        problems += at_least("dataplane.balance_group", group, 2)
    if plane.balance == "attention" and mixture.unit != "tokens":
        problems.append(
            f"dataplane.balance is {plane.balance}, but mixture.unit is {mixture.unit}: the attention cost is that of "
            "documents in sequences of tokens. Set mixture.unit=tokens, or dataplane.balance=cost."
        )
    if plane.balance == "cost" and plane.sample_cost is None:
        problems.append(
            "dataplane.balance is cost, but dataplane.sample_cost is not set. Name the number property that is the "
            "cost of a sample, or set dataplane.balance=none."
        )
    for key, size in sizes_from(plane).items():
        if group is not None and group >= 2 and size % group:
            problems.append(
                f"dataplane.balance_group is {group}, which does not divide {key}={size}. Use a divisor, for example a "
                "multiple of the sequences per rank."
            )
        if group is None and plane.balance != "none" and size > 1 and balance_group(plane, size) == 1:
            problems.append(
                f"{key}={size} has no divisor from 2 to {MAX_DEFAULT_BALANCE_GROUP}, so dataplane.balance="
                f"{plane.balance} would order nothing. Change the size, or set dataplane.balance_group={size}."
            )
    return problems


def _sample_costs(plane: DataPlaneConfig, mixture: MixtureConfig) -> list[str]:
    problems = []
    if plane.sample_cost is not None and mixture.unit != "samples":
        problems.append(
            f"dataplane.sample_cost is {plane.sample_cost}, but mixture.unit is {mixture.unit}: sequences of tokens "
            "have one length. Set mixture.unit=samples, or remove dataplane.sample_cost."
        )
    if plane.sample_budget is None:
        return problems
    if not plane.sample_budget > 0:
        problems.append(f"dataplane.sample_budget is {plane.sample_budget}, expected more than 0.")
    if plane.sample_cost is None:
        problems.append(
            "dataplane.sample_budget is set, but dataplane.sample_cost is not. Name the number property that is the "
            "cost of a sample."
        )
    return problems
