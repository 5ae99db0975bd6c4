"""Describe token stores: their size before they are written, and the result."""

import sys

from mixtera_hpc.index.build.stores.store_maker import StoreEstimate
from mixtera_hpc.index.row_store.row_job import RowPlan, RowReport
from mixtera_hpc.index.token_store.store_job import StoreReport
from mixtera_hpc.index.token_store.store_state import StorePlan

__all__ = ["announce_store", "row_store_line", "store_line"]


def announce_store(plan: StoreEstimate | StorePlan | RowPlan) -> None:
    """Print the size before anything is written."""
    sys.stderr.write(f"{_announcement(plan)}\n")
    sys.stderr.flush()


def row_store_line(report: RowReport) -> str:
    """Describe the result."""
    if not report.units_written:
        return f"{report.folder} is complete."
    return (
        f"Wrote {report.folder}: {report.num_bytes / 1e9:,.3g} GB of rows in {report.seconds:,.1f} s. Runs over this "
        "index use it."
    )


def _announcement(plan: StoreEstimate | StorePlan | RowPlan) -> str:
    if isinstance(plan, RowPlan):
        return (
            f"Rows are written to {plan.folder} (data.materialize): about {plan.num_bytes / 1e9:,.2g} GB, "
            f"{plan.free_bytes / 1e9:,.3g} GB free"
        )
    return _estimate_line(plan) if isinstance(plan, StoreEstimate) else _plan_line(plan)


def store_line(report: StoreReport) -> str:
    """Describe the result."""
    if not report.units_written:
        return f"{report.folder} is complete: {report.tokens:,} tokens."
    earlier = f", {report.kept_tokens:,} of them from before" if report.kept_tokens else ""
    return (
        f"Wrote {report.folder}: {report.tokens:,} tokens{earlier}, {report.num_bytes / 1e9:,.3g} GB, in "
        f"{report.seconds:,.1f} s. Runs over this index use it (data.tokens=auto)."
    )


def _estimate_line(estimate: StoreEstimate) -> str:
    return (
        f"Token ids are written to {estimate.folder} (data.materialize): about {estimate.num_bytes / 1e9:,.2g} GB, and "
        f"as much again until the index is complete; {estimate.free_bytes / 1e9:,.3g} GB free"
    )


def _plan_line(plan: StorePlan) -> str:
    width = int(plan.dtype[-1])
    there = plan.num_units - plan.missing_units
    done = f", {there} of {plan.num_units} units are there" if plan.missing_units and there else ""
    earlier = f", {plan.kept_tokens:,} of them from before" if plan.kept_tokens else ""
    return (
        f"{plan.tokens:,} tokens of {width} bytes{earlier}: {plan.num_bytes / 1e9:,.3g} GB in {plan.folder}, "
        f"{plan.free_bytes / 1e9:,.3g} GB free{done}"
    )
