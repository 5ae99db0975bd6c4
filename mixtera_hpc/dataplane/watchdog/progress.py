"""Progress of a rank: the stage of its trainer's thread, and the place of each thread or process that reads for it.

The threads write, the watchdog reads; no locks. Price: two microseconds per stage, and half a microsecond per shard
that is read.
"""

import mmap
import os
import struct
import time
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["AGREE", "IDLE", "PACK", "READ", "TOKENIZE", "TRAINER", "WAIT", "Place", "RankProgress", "ReadPlace"]

TRAINER = "trainer"
"""Stage of a rank whose trainer's thread is outside the data plane."""
WAIT = "wait"
"""Stage of a rank whose trainer waits for a batch; its reading thread tells more."""
AGREE = "agree"
"""Stage of a rank that holds its batch and waits until every rank does."""

IDLE, READ, TOKENIZE, PACK = range(4)
"""Activities of a reading thread. It is idle while it waits for a plan, or for room for its batches."""
STAGE_NAMES = ("idle", "read", "tokenize", "pack")
"""Opening, reading and decoding a shard is one stage; the stacks tell them apart. `pack` includes `data.transform`."""

_PLACE = struct.Struct("<7q")


class Place(NamedTuple):
    """The content of a `ReadPlace`."""

    ticks: int = 0
    """Grows whenever the place changes."""
    pid: int = 0
    """Process that reads."""
    stage: int = IDLE
    step: int = -1
    shard: int = -1
    """Number of the shard; -1 if it does not read one."""
    first_row: int = -1
    last_row: int = -1

    @property
    def stage_name(self) -> str:
        """Name of the stage."""
        return STAGE_NAMES[self.stage]


class ReadPlace:
    """The place of one reading thread, or of one reading process in memory that its rank shares."""

    def __init__(self, buffer: bytearray | mmap.mmap | None = None) -> None:
        """Use `buffer`; None: memory of this process."""
        self._buffer = buffer if buffer is not None else bytearray(_PLACE.size)
        self._pid = os.getpid()
        self._ticks = 0
        self._step = -1
        self._stage = IDLE
        self._since = 0.0
        self._cpu_since = 0.0
        self._waited_s = 0.0
        """Seconds of `READ` without the processor, since `take_times`."""
        self._busy_s = [0.0] * len(STAGE_NAMES)
        """Seconds in each stage, those of `READ` without `_waited_s`."""

    @staticmethod
    def create() -> int:
        """Return the descriptor of new memory for one place, without a name."""
        fd = os.memfd_create("mixtera-place")
        os.ftruncate(fd, _PLACE.size)
        return fd

    @classmethod
    def of_memory(cls, fd: int) -> "ReadPlace":
        """Return the place in the memory behind a descriptor, which may be closed afterwards."""
        return cls(mmap.mmap(fd, _PLACE.size))

    def begin(self, step: int) -> None:
        """Record that the batch of `step` is made."""
        self._pid = os.getpid()
        self._step = step
        self.enter(PACK)

    def enter(self, stage: int, shard: int = -1, first_row: int = -1, last_row: int = -1) -> None:
        """Record another stage, or other rows of a shard."""
        # A read may touch thousands of shards. Clocks take longer than everything else here.
        if stage != self._stage:
            self._enter_stage(stage)
        self._ticks += 1
        _PLACE.pack_into(self._buffer, 0, self._ticks, self._pid, stage, self._step, shard, first_row, last_row)

    def _enter_stage(self, stage: int) -> None:
        """Count the time of the stage that ends."""
        now = time.perf_counter()
        cpu = time.thread_time()
        elapsed = now - self._since
        if self._stage == READ:
            # What is read is decoded at once. The processor's time tells the two apart.
            busy = min(cpu - self._cpu_since, elapsed)
            self._waited_s += elapsed - busy
            elapsed = busy
        self._busy_s[self._stage] += elapsed
        self._stage = stage
        self._since = now
        self._cpu_since = cpu

    def take_times(self) -> dict[str, float]:
        """Return the seconds that each stage has taken since the last call, by name."""
        times = {
            "read": self._waited_s,
            "decode": self._busy_s[READ],
            "tokenize": self._busy_s[TOKENIZE],
            "pack": self._busy_s[PACK],
        }
        self._waited_s = 0.0
        self._busy_s = [0.0] * len(STAGE_NAMES)
        return times

    def now(self) -> Place:
        """Return the place."""
        return Place(*_PLACE.unpack_from(self._buffer))


class RankProgress:
    """The stage of the trainer's thread."""

    def __init__(self, places: Sequence[ReadPlace]) -> None:
        """Begin in the trainer's code, with the places of what reads for this rank."""
        self.places = places
        self.stage = TRAINER
        self.step = -1
        """Step of the last batch that was handed out."""
        self.changes = 0
        """Grows with every sign of life."""

    def in_stage(self, stage: str) -> "_StageScope":
        """Return a context in which the data plane is at work; the trainer is, afterwards."""
        return _StageScope(self, stage)

    def enter_stage(self, stage: str) -> None:
        """Record another stage."""
        self.changes += 1
        self.stage = stage

    def key(self) -> tuple[int, ...]:
        """Return what stays the same only while nothing gets on."""
        return (self.changes, *(place.now().ticks for place in self.places))


class _StageScope:
    """The context of `RankProgress.in_stage`; a generator would cost four times as much."""

    __slots__ = ("_progress", "_stage")

    def __init__(self, progress: RankProgress, stage: str) -> None:
        self._progress = progress
        self._stage = stage

    def __enter__(self) -> None:
        self._progress.enter_stage(self._stage)

    def __exit__(self, *error: object) -> None:
        self._progress.enter_stage(TRAINER)
