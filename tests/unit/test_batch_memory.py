"""The memory of batches of tokens in the reading process itself."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from mixtera_hpc.dataplane.reading.processes.batch_memory import TokenArrays, keep_freed_memory

{prepare}
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    batches = [TokenArrays.new(64, 2049) for _ in range(4)]
    for arrays in batches:
        for array in arrays:
            array.fill(1)
    del array, arrays, batches
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are not changed")
def test_memory_of_freed_batches_is_used_again() -> None:
    faults = []
    for prepare in ("", "keep_freed_memory()"):
        program = [sys.executable, "-c", PROGRAM.format(prepare=prepare)]
        faults.append(int(subprocess.run(program, check=True, capture_output=True, text=True).stdout))
    # A page has at least 4 KiB in general: four batches have 1,700 pages of that size.
    assert faults[1] < 100 < faults[0]
