"""A `data.transform` that fails for samples of the second rank of two."""

from typing import Any

from mixtera_hpc.dataplane.reading.sample_transform import ServedSample


def fail_on_rank_1(row: Any, sample: ServedSample) -> Any:
    if sample.position >= 2:
        raise ValueError("broken on purpose")
    return row
