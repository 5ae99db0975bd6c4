"""Say what packing and balancing do to the data of a plan or a run, next to the other settings."""

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.packing.check_packing import unused_balance_of_reference_trainer
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.resume.run_identity import data_of_run
from mixtera_hpc.errors import UserError
from mixtera_hpc.report.run_metrics import RunMetrics
from mixtera_hpc.trace.packing_forecast import forecast_balance, forecast_packing

__all__ = ["packing_rows", "packing_rows_of_run", "unused_balance_of_job"]


def packing_rows(source: Source, num_groups: int) -> list[tuple[str, str]]:
    """Return label and text of what packing cuts, and of what balancing changes for `num_groups` data-parallel ranks.

    Empty for samples. Price: see `forecast_packing`.
    """
    plane = source.config.dataplane
    rows = []
    packing = forecast_packing(source)
    if packing is not None:
        text = (
            f"{packing.concat:.1%} with dataplane.pack=concat, {packing.best_fit:.1%} with best_fit "
            f"({packing.documents_per_sequence:.1f} documents per sequence). Configured: {plane.pack}."
        )
        rows.append(("Documents cut by sequences", text))

    balance = forecast_balance(source, num_groups)
    if balance is not None:
        text = (
            f"largest over mean of {balance.num_ranks} data-parallel ranks: {balance.planned:.3f} with "
            f"dataplane.balance=none, {balance.balanced:.3f} with attention. Configured: {plane.balance}."
        )
        rows.append(("Attention cost of ranks", text))
    if (warning := unused_balance_of_job(source.config)) is not None:
        rows.append(("Warning", warning))
    return rows


def unused_balance_of_job(config: Config) -> str | None:
    """Return the warning that `dataplane.balance` is of no use to the job; None for a program that is not known."""
    if config.job.command:
        return None
    return unused_balance_of_reference_trainer(config.dataplane, config.training)


def packing_rows_of_run(metrics: RunMetrics) -> list[tuple[str, str]]:
    """Return the same for the first steps of a run that packs or balances; empty if its index cannot be opened."""
    plane = metrics.config.get("dataplane", {})
    if plane.get("pack", "concat") == "concat" and plane.get("balance", "none") == "none":
        return []
    try:
        config, subset = data_of_run(metrics.run)
        source = open_source(config, Local(), subset=subset, check=False)
    except UserError:
        # The index may be on another machine: the rest of a report needs only what the run recorded.
        return []
    return packing_rows(source, int(metrics.steps.num_ranks[-1]) // config.dataplane.model_parallel_size)
