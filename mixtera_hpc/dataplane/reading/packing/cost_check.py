"""The check that every sample has a cost, and that a micro-batch can hold it."""

from mixtera_hpc.config.packing.check_packing import COST_OF_TRANSFORM
from mixtera_hpc.config.schema import Config
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.dataplane.reading.shared_index import select_subset
from mixtera_hpc.dataplane.sample_subset import SampleSubset
from mixtera_hpc.errors import ConfigError, did_you_mean
from mixtera_hpc.index.layout import SIZE_NUMBERS
from mixtera_hpc.index.read.open import PropertyIndex

__all__ = ["check_sample_costs"]


def check_sample_costs(config: Config, index: PropertyIndex, subset: SampleSubset) -> None:
    """Refuse samples without a cost, and samples that no micro-batch can hold. Rank 0 only.

    Raises:
        ConfigError: the index has no such number, or a selected sample costs nothing known, less than 0, or more than
            the budget.
    """
    plane = config.dataplane
    name = plane.sample_cost
    # The costs that data.transform gives are checked when they are known.
    if name is None or name == COST_OF_TRANSFORM:
        return
    numbers = [n for n, prop in index.tables.properties.items() if prop.kind is Kind.NUMBER]
    sizes = [size for size in SIZE_NUMBERS if size != "tokens" or index.tables.has_tokens]
    if name not in (*numbers, *sizes):
        count = ", or count tokens: index build with dataplane.tokenizer" if name == "tokens" else ""
        raise ConfigError(
            f"dataplane.sample_cost is {name!r}, which is not a number property of {index.path}."
            f"{did_you_mean(name, [*numbers, *sizes])}\n"
            f"  Compute one with a function of yours: mixtera-hpc index derive{count}."
        )
    budget = plane.sample_budget
    wrong = f"{name} is None or {name} < 0" + ("" if budget is None else f" or {name} > {budget!r}")
    restricted = SampleSubset(split=subset.split, drop=(*subset.drop, f"not ({wrong})"))
    # Samples outside of all domains of the run, or beyond the fraction of their domain, are not served.
    rows, _ = select_subset(config, index, restricted).selection.table.totals()
    if not rows.sum():
        return
    above = "" if budget is None else f" or {name} above dataplane.sample_budget={budget:g}"
    cure = f"{name} >= 0" + ("" if budget is None else f" and {name} <= {budget:g}")
    raise ConfigError(
        f"{int(rows.sum()):,} of the samples that the run serves have no {name}, {name} below 0{above}.\n"
        f'  Leave them out with query.where="{cure}"' + ("." if budget is None else ", or raise the budget.")
    )
