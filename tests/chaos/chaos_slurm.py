"""Damage a run on a real Slurm cluster again and again, without a person, and prove that it lost and doubled nothing.

    python tests/chaos/chaos_slurm.py --rounds 20 --seed 0 [--only KIND] [--folder DIR]
    python tests/chaos/chaos_slurm.py --compare [--folder DIR]

It needs a cluster whose nodes have their own network and processes: call it by `slurm/dev-cluster/own-cluster.sh`.
One run trains on 2 nodes × 2 ranks. Every round waits until an attempt trains, and does one of these to it:

    kill_rank, kill_srun, kill_batch_shell     SIGKILL
    kill_node, kill_batch_host                 power off; the node boots again afterwards
    cut_network                                the node's network is gone; it heals afterwards
    preempt                                    a job of a higher priority takes the nodes
    kill_during_save                           SIGKILL of rank 0 while it writes a checkpoint
    kill_during_resume                         SIGKILL of a rank of the next attempt before its first step

A round fails if no further attempt trains, or if `failure.json` does not name the cause. At the end the run is stopped
and `trace --verify` reads everything again. The seed determines the faults, not their moments. Prints one line of JSON
per round, and a summary.

With `--compare`, the run is preempted twice, then loses a rank and its batch host, and trains to its end. Its losses
must equal those of a run that nobody disturbed, bit for bit.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chaos_job import first_started

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.testing.small_collection import make_collection
from mixtera_hpc.track.event_reader import read_events

LAB = Path(os.environ.get("LAB", ""))
SLURM_NODE = Path(__file__).parents[2] / "slurm/dev-cluster/slurm-node.sh"
COMMAND = [str(LAB / "in-head"), sys.executable, "-m", "mixtera_hpc"]
REPORTED_S = 15
"""Longest time until a failure is reported; a cut network takes three heartbeats and Slurm's own timeout more."""
NEXT_S = 240
"""Longest time until the next attempt trains: queue, start of Python and torch on a busy machine."""
STEPS_BEFORE_FAULT = range(6, 30)
COMPARED_FAULTS = ("preempt", "preempt", "kill_rank", "kill_batch_host")
COMPARED_STEPS = 1500
COMPARED_END_S = 600
SETTINGS = [
    "mixture.max_epochs=null",
    "dataplane.seq_len=32",
    "dataplane.global_batch_size=8",
    "dataplane.chunk_steps=4",
    "dataplane.audit=true",
    "training.num_layers=1",
    "training.num_heads=2",
    "training.embedding_dim=64",
    "training.log_every=1",
    "checkpoint.every_steps=5",
    "checkpoint.keep=3",
    "run.name=chaos",
    "cluster=dev",
    "job.nodes=2",
    'job.time="02:00:00"',
    "job.max_attempts=200",
]


class Failed(AssertionError):
    """A promise that was not kept."""


class Site:
    """The data and the run, in one folder."""

    def __init__(self, folder: Path, run_id: str = "slurm", num_steps: int = 1_000_000) -> None:
        self.folder = folder
        words = make_collection(folder / f"data_{run_id}", num_rows=4800)
        self.run = RunFolder(folder / "runs" / "chaos" / run_id)
        own = [f"run.root={folder / 'runs'}", f"run.id={run_id}", f"training.num_steps={num_steps}"]
        self.words = [*words, *SETTINGS, *own]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, cwd=self.folder)

    def status(self) -> dict[str, Any]:
        done = self.call("status", str(self.run.path), "--json")
        _check(done.returncode == 0, done.stdout + done.stderr)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def attempt(self) -> int:
        return max(self.run.attempts(), default=0)

    def logs(self) -> str:
        return "\n".join(
            f"{path}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.run.logs(self.attempt()).glob("*.*"))
        )

    def wait(self, condition: Callable[[], Any], limit_s: float, what: str) -> float:
        """Return the seconds until `condition` holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > limit_s:
                raise Failed(f"{what}: not within {limit_s:g} s; {self.status()}\n{self.logs()}")
            time.sleep(0.2)
        return round(time.monotonic() - began, 2)

    def wait_until_trains(self, after: int, num_steps: int) -> float:
        """Wait until an attempt later than `after` has finished `num_steps` steps; return the seconds."""
        return self.wait(lambda: self.attempt() > after and self.num_lines() >= num_steps, NEXT_S, "the next attempt")

    def num_lines(self) -> int:
        """Return for how many steps the newest attempt has written metrics."""
        path = self.run.metric("steps")
        return path.read_bytes().count(f'"attempt":{self.attempt()},'.encode()) if path.exists() else 0

    def job_id(self) -> str:
        return str(json.loads(self.run.job_record(self.attempt()).read_text())["job_id"])

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environment of every process of the newest attempt's job."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                entries = (
                    entry.partition("=") for entry in (folder / "environ").read_text(errors="replace").split("\0")
                )
                environment = {name: value for name, _, value in entries}
                if environment.get("SLURM_JOB_ID") == self.job_id():
                    found[int(folder.name)] = environment
        return found

    def rank_pid(self, rank: int) -> int:
        """Return the process id of a rank: the first process of its task."""
        return first_started(pid for pid, facts in self.processes().items() if facts.get("PMI_RANK") == str(rank))

    def rank_host(self, rank: int) -> str:
        return self.processes()[self.rank_pid(rank)]["SLURMD_NODENAME"]

    def failure(self, attempt: int) -> dict[str, Any]:
        return dict(json.loads(self.run.failure(attempt).read_text()))


def kill_rank(site: Site, chance: random.Random) -> dict[str, Any]:
    rank = chance.randrange(4)
    attempt = site.attempt()
    os.kill(site.rank_pid(rank), signal.SIGKILL)
    reported_s = site.wait(site.run.failure(attempt).exists, REPORTED_S, "failure.json")
    named = site.failure(attempt)["rank"]
    _check(named == rank, f"rank {rank} was killed, but rank {named} is named")
    return {"rank": rank, "reported_s": reported_s}


def kill_during_save(site: Site, chance: random.Random) -> dict[str, Any]:
    attempt = site.attempt()
    pid = site.rank_pid(0)
    # A checkpoint is written below a hidden name first.
    site.wait(lambda: any(site.run.checkpoints.glob(".*")), 60, "a checkpoint that is being written")
    os.kill(pid, signal.SIGKILL)
    return {"reported_s": site.wait(site.run.failure(attempt).exists, REPORTED_S, "failure.json")}


def kill_during_resume(site: Site, chance: random.Random) -> dict[str, Any]:
    """End the attempt by a kill, and kill a rank of the next one as soon as there is one."""
    first = kill_rank(site, chance)
    attempt = site.attempt()
    site.wait(lambda: site.attempt() > attempt and _has_ranks(site), NEXT_S, "the next attempt's ranks")
    _check(site.num_lines() == 0, "the next attempt has trained before it could be killed")
    os.kill(site.rank_pid(chance.randrange(4)), signal.SIGKILL)
    return {**first, "killed": site.attempt()}


def kill_srun(site: Site, chance: random.Random) -> dict[str, Any]:
    attempt = site.attempt()
    _kill_matching(site, lambda words: words[:1] == ["srun"])
    return {"end_s": site.wait(lambda: site.run.exit_record(attempt).exists(), REPORTED_S, "exit.json")}


def kill_batch_shell(site: Site, chance: random.Random) -> dict[str, Any]:
    _kill_matching(site, lambda words: any(word.endswith("/slurm_script") for word in words))
    return {}


def kill_node(site: Site, chance: random.Random) -> dict[str, Any]:
    return _lose_node(site, site.rank_host(3), "kill", "start")


def kill_batch_host(site: Site, chance: random.Random) -> dict[str, Any]:
    return _lose_node(site, site.rank_host(0), "kill", "start")


def cut_network(site: Site, chance: random.Random) -> dict[str, Any]:
    return _lose_node(site, site.rank_host(3), "cut", "heal")


def preempt(site: Site, chance: random.Random) -> dict[str, Any]:
    attempt = site.attempt()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--time=1", "--wrap=sleep 5"]
    subprocess.run([str(LAB / "in-head"), *urgent], check=True, capture_output=True, cwd=site.folder)
    return {"end_s": site.wait(lambda: _has_left(site, attempt), 60, "the end of the preempted job")}


FAULTS = {
    fault.__name__: fault
    for fault in (
        *(kill_rank, kill_srun, kill_batch_shell, kill_node),
        *(kill_batch_host, cut_network, preempt, kill_during_save, kill_during_resume),
    )
}


def _has_ranks(site: Site) -> bool:
    return len({facts["PMI_RANK"] for facts in site.processes().values() if "PMI_RANK" in facts}) == 4


def _lose_node(site: Site, node: str, fault: str, cure: str) -> dict[str, Any]:
    attempt = site.attempt()
    subprocess.run([SLURM_NODE, fault, node], check=True, capture_output=True)
    times = {}
    try:
        limit_s = REPORTED_S if fault == "kill" else REPORTED_S + 10
        times["reported_s"] = site.wait(
            site.run.failure(attempt).exists, limit_s, f"failure.json after {node} was lost"
        )
        end_s = site.wait(lambda: _has_left(site, attempt), 60, f"the end of the job without {node}")
        named = site.failure(attempt)["reason"]
        _check(f"node {node}" in named, f"{node} was lost, but the failure is {named}")
    finally:
        subprocess.run([SLURM_NODE, cure, node], check=True, capture_output=True)
    return {"node": node, "end_s": end_s, **times}


def _has_left(site: Site, attempt: int) -> bool:
    status = site.status()
    return bool(status["attempt"] > attempt or status["state"] not in ("RUNNING",))


def _kill_matching(site: Site, matches: Callable[[list[str]], bool]) -> None:
    killed = 0
    for pid in site.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if matches(words):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    _check(killed > 0, "no process matches")


def play(site: Site, kind: str, chance: random.Random) -> dict[str, Any]:
    """Damage the newest attempt once, and wait until another one trains; return what happened."""
    site.wait_until_trains(site.attempt() - 1, chance.choice(STEPS_BEFORE_FAULT))
    attempt = site.attempt()
    result = FAULTS[kind](site, chance)
    return {**result, "attempt": attempt, "next_s": site.wait_until_trains(attempt, 1)}


def compare(folder: Path) -> str:
    """Disturb one of two runs and compare their losses; return the proof."""
    chance = random.Random(0)
    calm = Site(folder, "calm", COMPARED_STEPS)
    with _submitted(calm):
        calm.wait(lambda: calm.status()["state"] == "COMPLETED", COMPARED_END_S, "the end of the undisturbed run")
    site = Site(folder, "disturbed", COMPARED_STEPS)
    with _submitted(site):
        for kind in COMPARED_FAULTS:
            print(json.dumps({"kind": kind, **play(site, kind, chance)}), flush=True)
        site.wait(lambda: site.status()["state"] == "COMPLETED", COMPARED_END_S, "the end of the disturbed run")

    losses = _losses(site.run)
    expected = _losses(calm.run)
    different = [step for step in range(COMPARED_STEPS) if losses.get(step) != expected.get(step)]
    _check(not different, f"{len(different)} of {COMPARED_STEPS} losses differ, the first in step {different[:1]}")
    return f"{COMPARED_STEPS} losses are equal bit for bit. {_verified(site)}"


def _losses(run: RunFolder) -> dict[int, Any]:
    """Return the loss and the losses of the domains of every step, as the last attempt has recorded it."""
    return {event["step"]: (event["loss"], event["domain_loss"]) for event in read_events(run.metric("steps"))}


def finish(site: Site) -> str:
    """Let the run save and stop in order, and prove what it served; return the proof."""
    site.wait_until_trains(site.attempt() - 1, STEPS_BEFORE_FAULT[0])
    done = site.call("cancel", str(site.run.path), "--after-save")
    _check(done.returncode == 0, done.stdout + done.stderr)
    site.wait(lambda: site.status()["state"] == "SAVED", 60, "the end")
    return _verified(site)


def _verified(site: Site) -> str:
    done = site.call("trace", str(site.run.path), "--verify")
    _check(done.returncode == 0, done.stdout + done.stderr)
    return done.stdout.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(FAULTS), help="a single kind of fault")
    parser.add_argument("--compare", action="store_true", help="compare a disturbed run with an undisturbed one")
    parser.add_argument("--folder", type=Path, help="keeps the run; default: a temporary folder")
    arguments = parser.parse_args()
    if not (LAB / "run/node-node1.pid").exists():
        print("The cluster is not up. Call this script by slurm/dev-cluster/own-cluster.sh", file=sys.stderr)
        return 2
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    if arguments.compare:
        print(compare(folder))
    else:
        _play_rounds(folder, arguments)
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


def _play_rounds(folder: Path, arguments: argparse.Namespace) -> None:
    """Submit one run, damage it in every round, and print what each round measured."""
    site = Site(folder)
    with _submitted(site):
        chance = random.Random(arguments.seed)
        kinds = [arguments.only] if arguments.only else list(FAULTS)
        order: list[str] = []
        while len(order) < arguments.rounds:
            order += chance.sample(kinds, len(kinds))
        for number, kind in enumerate(order[: arguments.rounds], 1):
            began = time.monotonic()
            # A failed round ends the test: the run may not go on by itself any more.
            result = play(site, kind, random.Random(f"{arguments.seed} {number}"))
            facts = {"round": number, "kind": kind, **result, "round_s": round(time.monotonic() - began, 1)}
            print(json.dumps(facts), flush=True)
        print(f"{arguments.rounds} rounds. {finish(site)}")


@contextlib.contextmanager
def _submitted(site: Site) -> Iterator[None]:
    """Build the index and submit the run; cancel what is left of it afterwards."""
    done = site.call("submit", *site.words)
    _check(done.returncode == 0, done.stdout + done.stderr)
    try:
        yield
    finally:
        site.call("cancel", str(site.run.path))


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


if __name__ == "__main__":
    sys.exit(main())
