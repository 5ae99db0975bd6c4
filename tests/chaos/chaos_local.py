"""Damage a run again and again, on this machine and without Slurm, and prove that it lost and doubled nothing.

    python tests/chaos/chaos_local.py --rounds 30 --seed 0 [--ranks 2] [--only KIND] [--folder DIR]

Every round is one attempt of the same run of the reference trainer, and does one of these to it:

    kill_rank, kill_launcher, kill_group    SIGKILL
    stopped_rank                            SIGSTOP, then a request to stop
    hung_read                               pipes in place of shards, then a request to save or to stop
    full_disk                               no space in the run folder for a second (needs the right to mount)
    damaged_checkpoint                      a damaged byte in the newest checkpoint, before the attempt

A round fails if the run does not end or save in time, if the rank at fault is not named, or if the next attempt does
not continue. At the end `trace --verify` reads everything again. The seed determines the faults, not their moments.
Prints one line of JSON per round, and a summary.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_job import COMMAND, REQUEST_S, Failed, Job, Site, check, num_steps, send_signal

from mixtera_hpc.config.run_folder import RunFolder

STEPS_BEFORE_FAULT = range(4, 40)
"""Steps of an attempt before its fault."""


def kill_rank(job: Job, chance: random.Random) -> dict[str, Any]:
    rank = chance.randrange(job.site.ranks)
    os.kill(job.rank_pid(rank), signal.SIGKILL)
    end_s = job.wait_for_end()
    check(job.process.returncode not in (0, 75), "a killed rank must not look like success")
    check(f"rank {rank} on " in job.log().lower(), f"rank {rank} is not named:\n{job.log()}")
    return {"rank": rank, "end_s": end_s}


def kill_launcher(job: Job, chance: random.Random) -> dict[str, Any]:
    os.kill(job.process.pid, signal.SIGKILL)
    return {"end_s": job.wait_for_end()}


def kill_group(job: Job, chance: random.Random) -> dict[str, Any]:
    send_signal(job.processes(), signal.SIGKILL)
    return {"end_s": job.wait_for_end()}


def stopped_rank(job: Job, chance: random.Random) -> dict[str, Any]:
    rank = chance.randrange(job.site.ranks)
    os.kill(job.rank_pid(rank), signal.SIGSTOP)
    verdict, named_s = job.wait_until_named()
    named = [state["rank"] for state in verdict["ranks"]]
    check(named == [rank], f"rank {rank} was stopped, but {named} are named")
    job.site.run.stop_request.parent.mkdir(exist_ok=True)
    job.site.run.stop_request.touch()
    end_s = job.wait(lambda: job.process.poll() is not None, REQUEST_S, "the end after a request to stop")
    check("The last checkpoint is" in job.log() and "a stop was requested" in job.log(), job.log())
    job.kill()
    job.site.run.stop_request.unlink(missing_ok=True)
    return {"rank": rank, "named_s": named_s, "end_s": end_s}


def hung_read(job: Job, chance: random.Random) -> dict[str, Any]:
    request = chance.choice(["file", "SIGTERM", "SIGUSR2"])
    saves_first = chance.random() < 0.5
    run = job.site.run
    with _pipes_for_shards(job):
        verdict, named_s = job.wait_until_named()
        stages = {state["stage"] for state in verdict["ranks"]}
        check(stages == {"read"}, f"a read hangs, but {verdict['message']}")
        finished = num_steps(run)
        times = {"named_s": named_s}
        run.stop_request.parent.mkdir(exist_ok=True)
        if saves_first:
            run.save_request.touch()
            times["save_s"] = job.wait(lambda: _is_saved(run, finished), REQUEST_S, "the save")
        if request == "file":
            run.stop_request.touch()
        else:
            for rank in range(job.site.ranks):
                os.kill(job.rank_pid(rank), signal.Signals[request])
        times["end_s"] = job.wait(lambda: job.process.poll() is not None, REQUEST_S, "the save and the end")
        check(job.process.returncode == 75, f"exit code {job.process.returncode}\n{job.log()[-3000:]}")
        newest = max(run.checkpoint_steps())
        check(newest >= finished, f"{finished} steps were finished, but the newest checkpoint is of step {newest}")
        job.wait_for_end()
    return {"request": request, **times}


def full_disk(job: Job, chance: random.Random) -> dict[str, Any]:
    filler = job.site.runs / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    time.sleep(1)
    filler.unlink()
    # The run has either not noticed, or ended with a message.
    time.sleep(2)
    survived = job.process.poll() is None
    if survived:
        os.kill(job.rank_pid(0), signal.SIGTERM)
    job.wait_for_end()
    allowed = (75,) if survived else (2,)
    check(job.process.returncode in allowed, f"exit code {job.process.returncode}\n{job.log()[-3000:]}")
    check("Traceback" not in job.log(), job.log())
    return {"survived": survived}


def damaged_checkpoint(job: Job, chance: random.Random) -> dict[str, Any]:
    check("is skipped" in job.log(), f"the damaged checkpoint is not reported:\n{job.log()}")
    return kill_group(job, chance)


FAULTS = {
    fault.__name__: fault
    for fault in (kill_rank, kill_launcher, kill_group, stopped_rank, hung_read, full_disk, damaged_checkpoint)
}


def damage_newest_checkpoint(run: RunFolder, chance: random.Random) -> None:
    """Change one byte of one file, or cut it."""
    path = chance.choice(sorted(run.checkpoint(run.checkpoint_steps()[-1]).iterdir()))
    content = bytearray(path.read_bytes())
    position = chance.randrange(len(content))
    if chance.random() < 0.3:
        content = content[:position]
    else:
        content[position] ^= 0xFF
    path.write_bytes(content)


def play(site: Site, number: int, kind: str, chance: random.Random) -> dict[str, Any]:
    """Run one attempt with one fault; return what happened."""
    if kind == "damaged_checkpoint" and len(site.run.checkpoint_steps()) < 2:
        kind = "kill_group"
    if kind == "damaged_checkpoint":
        damage_newest_checkpoint(site.run, chance)
    job = Job(site, number)
    try:
        job.wait_until_it_trains(chance.choice(STEPS_BEFORE_FAULT))
        return {"kind": kind, **FAULTS[kind](job, chance)}
    finally:
        job.kill()


def finish(site: Site, number: int) -> str:
    """Let the run save and stop in order, and prove what it served; return the proof."""
    job = Job(site, number)
    try:
        job.wait_until_it_trains(STEPS_BEFORE_FAULT[0])
        os.kill(job.rank_pid(0), signal.SIGTERM)
        job.wait_for_end()
        check(job.process.returncode == 75, job.log()[-3000:])
    finally:
        job.kill()
    command = [*COMMAND, "trace", str(site.run.path), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    check(done.returncode == 0, done.stdout + done.stderr)
    return done.stdout.strip().splitlines()[-1]


def schedule(rounds: int, chance: random.Random, kinds: list[str]) -> list[str]:
    """Return the kinds of all rounds: each equally often, in random order. A checkpoint must exist before damage."""
    order = [kinds[i % len(kinds)] for i in range(rounds)]
    chance.shuffle(order)
    return sorted(order[:3], key=lambda kind: kind == "damaged_checkpoint") + order[3:] if rounds > 3 else order


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=list(FAULTS), help="a single kind of fault")
    parser.add_argument("--folder", type=Path, help="keeps the logs; default: a temporary folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    site = Site(folder, arguments.ranks)
    chance = random.Random(arguments.seed)
    kinds = [arguments.only] if arguments.only else list(FAULTS)
    if not site.can_fill_disk and "full_disk" in kinds:
        print("full_disk is left out: this user may not mount a file system", file=sys.stderr)
        kinds.remove("full_disk")
    num_failed = 0
    try:
        for number, kind in enumerate(schedule(arguments.rounds, chance, kinds), 1):
            began = time.monotonic()
            try:
                result = play(site, number, kind, random.Random(f"{arguments.seed} {number}"))
            except Failed as error:
                num_failed += 1
                result = {"failed": str(error)}
            facts = {"round": number, "kind": kind, **result, "round_s": round(time.monotonic() - began, 1)}
            print(json.dumps(facts), flush=True)
        proof = finish(site, arguments.rounds + 1)
    finally:
        site.close()
    print(f"{arguments.rounds} rounds, {num_failed} failed. {proof}")
    if arguments.folder is None:
        shutil.rmtree(folder)
    return int(num_failed > 0)


@contextlib.contextmanager
def _pipes_for_shards(job: Job) -> Iterator[None]:
    """Replace shards that no rank has open by pipes that nobody writes to; restore them afterwards."""
    pids = list(job.processes())
    # A shard that a rank opens in between would be found to have changed.
    send_signal(pids, signal.SIGSTOP)
    held = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                held.add(str(link.readlink()))
    closed = [shard for shard in job.site.shards if str(shard) not in held]
    for shard in closed:
        shard.rename(shard.with_suffix(".aside"))
        os.mkfifo(shard)
    send_signal(pids, signal.SIGCONT)
    try:
        yield
    finally:
        for shard in closed:
            shard.unlink()
            shard.with_suffix(".aside").rename(shard)


def _is_saved(run: RunFolder, step: int) -> bool:
    return any(saved >= step for saved in run.checkpoint_steps())


if __name__ == "__main__":
    sys.exit(main())
