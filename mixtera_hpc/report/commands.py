"""What to type next."""

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.report.summary import RunSummary

__all__ = ["next_commands"]


def next_commands(run: RunFolder, summary: RunSummary) -> list[tuple[str, str]]:
    """Commands that make sense now, each with a word on what for."""
    last = max(summary.steps - 1, 0)
    commands = [
        (f"mixtera-hpc trace {run.run_id} --step {last}", "which samples the last step consisted of"),
        (f"mixtera-hpc report --scaling {run.run_id} OTHER_RUN", "compare throughput with other runs"),
        (f"mixtera-hpc report {run.run_id} --json", "these numbers for a program"),
    ]
    if summary.steps < summary.num_steps:
        rest = summary.num_steps - summary.steps
        commands.insert(0, (f"mixtera-hpc resume {run.run_id}", f"train the remaining {rest} steps"))
    return commands
