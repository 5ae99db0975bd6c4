"""Reading in worker processes: the same batches, the same errors, and no process left over."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import ChunkPlan, PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice, BatchSource, with_samples
from mixtera_hpc.dataplane.reading.processes import workers as workers_module
from mixtera_hpc.dataplane.reading.processes.block_memory import BlockMemory
from mixtera_hpc.dataplane.reading.processes.process_choice import may_use_processes
from mixtera_hpc.dataplane.reading.processes.workers import Workers, default_workers
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.steps.digests import sequence_digest
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.index.build.build import build_index

pytestmark = pytest.mark.slow
"""Every test starts processes that import the data plane."""

SHARE = BatchSlice()
WORDS = ["dataplane.seq_len=32", "dataplane.global_batch_size=4", "dataplane.chunk_steps=7", "dataplane.audit=true"]


def opened(collection: list[str]) -> tuple[Source, ChunkPlan]:
    source = open_source(compose([*collection, *WORDS]), Local())
    return source, source.planner.plan(PlannerState.start(source.num_domains), source.weights)[0]


@pytest.mark.parametrize(
    ("number", "cure"), [(signal.SIGKILL, "too little memory"), (signal.SIGBUS, "was truncated while it was read")]
)
def test_a_killed_worker_is_reported_with_its_signal(number: int, cure: str, collection: list[str]) -> None:
    source, plan = opened(collection)
    workers = Workers(source, SHARE, 2)
    assert len(list(workers.batches(plan, 0))) == 7
    workers._workers[1].process.send_signal(number)
    with pytest.raises(DataError, match=rf"Reading process 1 of 2 was ended by signal {number:d}[^$]*{cure}"):
        list(workers.batches(plan, 0))
    workers.close()


def test_a_worker_that_cannot_open_shared_memory_leaves_a_message(
    collection: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    source, plan = opened(collection)
    # A socket cannot be opened by its descriptor.
    with socket.socket() as closed:
        memory = replace(source.memory, windows=BlockMemory(closed.detach()))
        workers = Workers(replace(source, memory=memory), SHARE, 1)
    with pytest.raises(DataError, match=r"ended with exit code 1[^$]*dataplane.workers=0"):
        list(workers.batches(plan, 0))
    workers.close()
    assert "No such device" in capfd.readouterr().err


def test_a_worker_that_refuses_its_source_says_so(own_collection: list[str]) -> None:
    source, plan = opened(own_collection)
    Path(str(source.config.dataplane.tokenizer)).unlink()
    workers = Workers(source, SHARE, 2)
    with pytest.raises(ConfigError, match=r"dataplane.tokenizer is .* cannot be read"):
        list(workers.batches(plan, 0))
    workers.close()


def test_a_worker_without_room_for_its_batches_is_refused(collection: list[str]) -> None:
    source, _ = opened(collection)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"process 0 of 2 cannot be started: File too large[^$]*workers=0"):
            Workers(source, SHARE, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_every_worker_gets_a_request_of_the_last_chunk(collection: list[str]) -> None:
    """Each compares the files that it has read once more."""
    source, plan = opened(collection)
    workers = Workers(source, SHARE, 3)
    assert len(list(workers.batches(replace(plan, last=True), 5))) == 2
    assert [len(steps) for steps, _ in workers._requests] == [0, 1, 1]
    assert len(list(workers.batches(plan, 6))) == 1
    assert [len(steps) for steps, _ in workers._requests] == [1]
    workers.close()


def test_a_request_has_few_batches_in_shared_memory(collection: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of stored tokens may be larger."""
    monkeypatch.setattr(workers_module, "MAX_TOKENS_PER_REQUEST", 2 * 4 * 33)
    source, plan = opened(collection)
    workers = Workers(source, SHARE, 1)
    assert [len(steps) for steps in workers._step_ranges(plan, 0)] == [2, 2, 2, 1]
    assert [batch.step for batch in workers.batches(plan, 0)] == list(range(7))
    workers.close()


def test_workers_ignore_the_signals_of_the_job(collection: list[str]) -> None:
    source, plan = opened(collection)
    workers = Workers(source, SHARE, 1)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
        os.kill(workers._workers[0].process.pid, number)  # Still starting.
    expected = [batch.digests for batch in BatchMaker(source, SHARE, audit=True).batches(plan, 2)]
    assert [batch.digests for batch in workers.batches(plan, 2)] == expected
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT):
        os.kill(workers._workers[0].process.pid, number)
    assert [batch.digests for batch in workers.batches(plan, 0)][2:] == expected
    workers.close()


READS_DURING_SIGNALS = """
import ctypes, os, signal, threading, time
from mixtera_hpc.dataplane.reading.processes.worker_program import _ignore_signals
_ignore_signals()
read_end, write_end = os.pipe()

def send() -> None:
    for _ in range(20):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    os.write(write_end, b"!")

threading.Thread(target=send).start()
print(ctypes.CDLL(None).read(read_end, ctypes.create_string_buffer(1), 1))
"""


def test_an_ignored_signal_does_not_interrupt_a_read_of_a_library() -> None:
    done = subprocess.run([sys.executable, "-c", READS_DURING_SIGNALS], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "1", done.stderr


def test_large_plans_and_large_batches_do_not_deadlock(tmp_path: Path) -> None:
    rows = [{"blob": "x" * 8000, "domain": str(number)} for number in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.root={tmp_path}", "data.text=null", "data.properties.domain=domain", "mixture.unit=samples"]
    config = compose(
        [*data, "mixture.group_by=[domain]", "dataplane.global_batch_size=128", "dataplane.chunk_steps=16"]
    )
    build_index(config)
    source = open_source(config, Local())
    plan = source.planner.plan(PlannerState.start(source.num_domains), source.weights)[0]
    workers = Workers(source, BatchSlice(), 1)
    with socket.socket(fileno=os.dup(workers._workers[0].pipe.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    steps: list[int] = []
    reader = threading.Thread(target=lambda: steps.extend(b.step for b in workers.batches(plan, 0)), daemon=True)
    reader.start()
    reader.join(timeout=600)
    workers.close()
    assert steps == list(range(16)), "both ends of the pipe wait for each other"


def test_batches_that_the_trainer_holds_keep_their_content(collection: list[str]) -> None:
    source, plan = opened(collection)
    workers = Workers(source, SHARE, 1)
    memory = workers._workers[0].memory
    assert memory is not None
    num_slots = len(memory._free)
    held = []
    for _ in range(num_slots // 7 + 2):
        for batch in workers.batches(plan, 0):
            # A view of a single row must keep the whole slot from being used again.
            held.append((batch.tokens[1], batch.digests))
    assert len(held) > num_slots
    assert not memory._free, "the memory was not used up"
    assert all(sequence_digest(row) == digests[1] for row, digests in held)
    held.clear()
    del batch
    assert len(memory._free) == num_slots
    workers.close()


@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_processes_serve_what_the_thread_serves(collection: list[str], unit: str) -> None:
    source = open_source(compose([*collection, *WORDS, f"mixture.unit={unit}"]), Local())
    plan = source.planner.plan(PlannerState.start(source.num_domains), source.weights)[0]
    workers = Workers(source, SHARE, 2)
    for own, other in zip(
        BatchMaker(source, SHARE, audit=True).batches(plan, 0), workers.batches(plan, 0), strict=True
    ):
        loaded = with_samples(other)
        for field in fields(own):
            np.testing.assert_equal(getattr(loaded, field.name), getattr(own, field.name))
    workers.close()


def test_a_rank_with_one_core_reads_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    num_cores = len(os.sched_getaffinity(0))
    assert default_workers(num_cores) == 0
    assert default_workers(1) == (num_cores >= 2)
    # Slurm has bound the rank to cores of its own, however many ranks the node has.
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert default_workers(num_cores) == 1


@pytest.mark.parametrize(
    ("words", "may"),
    [
        (["dataplane.vocab_size=9"], True),
        (["dataplane.vocab_size=9", "dataplane.workers=0"], False),
        (["mixture.unit=samples"], False),
        (["mixture.unit=samples", "dataplane.workers=1"], True),
    ],
)
def test_processes_read_tokens_by_default(words: list[str], may: bool) -> None:
    assert may_use_processes(compose(["index.path=i.h5", *words])) == may


def test_a_process_does_not_import_torch() -> None:
    program = "import sys, mixtera_hpc.dataplane.reading.processes.worker_program; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_data_error_is_raised_at_its_step(own_collection: list[str]) -> None:
    # One lane of this seed begins in the first half of the shard.
    source, _ = opened([*own_collection, "dataplane.lanes=1", "dataplane.window_bytes=1", "dataplane.seed=2"])
    shard = Path(source.index.data_root) / source.index.shard_paths[0]
    damage_second_half(shard)
    by_thread = served_until_error(source, BatchMaker(source, SHARE, audit=True))
    assert by_thread[0]
    assert served_until_error(source, Workers(source, SHARE, 2)) == by_thread


def damage_second_half(shard: Path) -> None:
    """Damage a shard in a way that only its rows show: with the size and the modification time that it had."""
    status = shard.stat()
    content = shard.read_bytes()
    half = len(content) // 2
    shard.write_bytes(content[:half] + b"?" * (len(content) - half))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def served_until_error(source: Source, maker: BatchSource) -> tuple[list[list[str]], str]:
    """Return the digests of the batches before the error, and its message."""
    digests: list[list[str]] = []
    state = PlannerState.start(source.num_domains)
    with pytest.raises(DataError) as caught:
        while True:
            plan, state = source.planner.plan(state, source.weights)
            for batch in maker.batches(plan, 0):
                digests.append(batch.digests)
    maker.close()
    return digests, str(caught.value)


KILLED_RANK = """
import glob, os, sys, threading, time
from mixtera_hpc import DataPlane, compose
config = compose(sys.argv[2:])
plane = DataPlane.open(config)
if sys.argv[1] == "hung":
    for shard in glob.glob(config.data.root + "/**/*.jsonl", recursive=True):
        os.remove(shard)
        os.mkfifo(shard)
reading = threading.Thread(target=lambda: next(iter(plane)), daemon=True)
reading.start()
reading.join(5)
print(*(open(f).read() for f in glob.glob("/proc/self/task/*/children")), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("read", ["finished", "hung"])
def test_workers_end_with_a_killed_rank(own_collection: list[str], read: str) -> None:
    words = [*own_collection, *WORDS, "dataplane.workers=2", "dataplane.comm=local"]
    command = [sys.executable, "-c", KILLED_RANK, read, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 600
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their rank"
        time.sleep(0.05)


@pytest.mark.parametrize("wrong", ["mixtera_hpc/__init__.py", "random.py"])
def test_workers_import_modules_from_where_the_rank_does(collection: list[str], tmp_path: Path, wrong: str) -> None:
    (tmp_path / "here" / wrong).parent.mkdir(parents=True)
    (tmp_path / "here" / wrong).write_text("raise ImportError('imported from the current folder')\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path[1:] = {sys.path!r}\n"
        "from mixtera_hpc import DataPlane, compose\n"
        "with DataPlane.open(compose(sys.argv[1:])) as plane:\n"
        "    next(iter(plane))\n"
    )
    command = [sys.executable, program, *collection, *WORDS, "dataplane.workers=1", "dataplane.comm=local"]
    done = subprocess.run(command, cwd=tmp_path / "here", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def is_running(pid: int) -> bool:
    try:
        return "worker_program" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def test_closing_a_plane_ends_its_workers(collection: list[str]) -> None:
    with DataPlane.open(compose([*collection, *WORDS, "dataplane.workers=2"]), Local()) as plane:
        next(iter(plane))
        processes = [worker.process for worker in plane._session._feed._workers._workers]  # type: ignore[attr-defined]
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_a_negative_number_of_workers_is_refused(collection: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"dataplane.workers is -1"):
        DataPlane.open(compose([*collection, "dataplane.workers=-1"]), Local())


def test_far_more_workers_than_cores_are_refused(collection: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    cores = len(os.sched_getaffinity(0))
    message = rf"dataplane.workers is {4 * cores + 1}, more than 4 × the {cores} cores"
    config = compose([*collection, f"dataplane.workers={4 * cores + 1}"])
    with DataPlane.open(config, Local()) as plane, pytest.raises(ConfigError, match=message):
        next(iter(plane))
