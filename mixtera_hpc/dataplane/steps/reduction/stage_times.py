"""The times of the stages of a step, on every rank: one byte per stage, in the reduction of the step.

A sum over ranks has no maximum. So each rank adds to an integer of its own, whose eight bytes are logarithms of its
eight times, 8 % apart. Every rank's times arrive, and who was slowest is exact; how slow is known to 4 %.
Price: 8 bytes per rank and step.
"""

import math
import sys
from bisect import bisect
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.core.statistics import STAGES, StageMaxima

__all__ = ["maxima_of", "pack_times", "times_alone"]

MIN_S = 1e-5
"""Shorter times count as none."""
RATIO = 1.08
"""Between neighbouring codes; the largest code stands for 51 minutes or more."""
MAX_CODE = 255
LOG_RATIO = math.log(RATIO)
_SECONDS = [0.0, *(MIN_S * math.exp(LOG_RATIO * (code - 1)) for code in range(1, MAX_CODE + 1))]
"""Code → seconds."""
_BORDERS = [MIN_S, *(MIN_S * math.exp(LOG_RATIO * (code - 0.5)) for code in range(1, MAX_CODE))]
"""The shortest time of every code but 0."""
_BYTE_OF = {stage: number for number, stage in enumerate(STAGES)}


def pack_times(seconds: Mapping[str, float]) -> int:
    """Return the times of this rank as one int64; a missing stage took no time."""
    codes = bytearray(len(STAGES))
    for stage, stage_s in seconds.items():
        codes[_BYTE_OF[stage]] = bisect(_BORDERS, stage_s)
    return int.from_bytes(codes, sys.byteorder, signed=True)


def maxima_of(packed: NDArray[np.int64]) -> StageMaxima:
    """Return the slowest rank of each stage, given the integer of every rank; shape (ranks,)."""
    codes = packed.view(np.uint8).reshape(-1, len(STAGES))
    ranks = codes.argmax(axis=0).tolist()
    slowest = codes.max(axis=0).tolist()
    named = {stage: rank for stage, rank, code in zip(STAGES, ranks, slowest, strict=True) if code}
    seconds = {stage: _SECONDS[code] for stage, code in zip(STAGES, slowest, strict=True) if code}
    return StageMaxima(seconds=seconds, ranks=named)


def times_alone(seconds: Mapping[str, float]) -> StageMaxima:
    """Return the times of the only rank, which needs no reduction to know them."""
    counted = {stage: stage_s for stage, stage_s in seconds.items() if stage_s >= MIN_S}
    return StageMaxima(seconds=counted, ranks=dict.fromkeys(counted, 0))
