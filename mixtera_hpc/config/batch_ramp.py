"""The batch ramp of a configuration: the sizes of the global batches, and the checks of `dataplane.batch_schedule`."""

from mixtera_hpc.config.check_numbers import at_least
from mixtera_hpc.config.schema import DataPlaneConfig
from mixtera_hpc.core.slots.batch_schedule import BatchSchedule

__all__ = ["batch_schedule_of", "batch_stages", "ramp_problems", "sizes_from"]


def batch_schedule_of(plane: DataPlaneConfig) -> BatchSchedule:
    """Return the size of the global batch of every data step."""
    return BatchSchedule.ramp(plane.global_batch_size, [(stage.start, stage.size) for stage in plane.batch_schedule])


def batch_stages(plane: DataPlaneConfig) -> list[list[int]]:
    """Return `[start, size]` of every stage of the ramp, fit for JSON; empty without a ramp."""
    return [[stage.start, stage.size] for stage in plane.batch_schedule]


def sizes_from(plane: DataPlaneConfig, first_step: int = 0) -> dict[str, int]:
    """Return the size of every stage that has steps from data step `first_step` on, by its key, in order."""
    stages = range(len(plane.batch_schedule))
    keys = ["dataplane.global_batch_size", *(f"dataplane.batch_schedule[{number}].size" for number in stages)]
    sizes = batch_schedule_of(plane).stages_from(first_step)
    return dict(zip(keys[len(keys) - len(sizes) :], sizes, strict=True))


def ramp_problems(plane: DataPlaneConfig) -> list[str]:
    """Return everything wrong with `dataplane.batch_schedule`."""
    problems = []
    before = 0
    for number, stage in enumerate(plane.batch_schedule):
        path = f"dataplane.batch_schedule[{number}]"
        problems += at_least(f"{path}.size", stage.size, 1)
        if stage.start <= before:
            rule = "above 0: dataplane.global_batch_size is the size from step 0 on"
            if number:
                rule = f"above {before}, the start of the stage before it"
            problems.append(f"{path}.start is {stage.start}, expected {rule}.")
        before = max(before, stage.start)
    return problems
