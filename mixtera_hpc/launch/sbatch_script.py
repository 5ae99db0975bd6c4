"""A `Config` becomes the text of a batch script: nothing is read, asked or written, the same input gives the same bytes.

submitit's renderer writes the `#SBATCH` block (it is private: pinned below 1.6, and golden files watch it). The command is
ours instead of its pickled closure, so nothing is unpickled on thousands of ranks and the script shows what it runs.
Between the two lie `batch/prologue.sh` and `batch/epilogue.sh`: the run folder, and what follows an attempt that saved.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.job_shape import num_ranks, parse_time
from mixtera_hpc.config.schema import Config
from mixtera_hpc.config.yaml_files import dump_yaml

__all__ = ["RANKS_WITH_OWN_LOG", "SbatchJob", "render_script"]

RANKS_WITH_OWN_LOG = 255
"""Beyond this many ranks there is one labelled log per node: shared file systems count inodes."""

_ASKED = (
    *("account", "partition", "qos", "constraint", "reservation"),
    *("mem", "comment", "exclude", "dependency"),
)
_END = "END_OF_MIXTERA_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class SbatchJob:
    """One batch job of a run."""

    config: Config
    overrides: Sequence[str] = ()
    """What was typed; kept in the folder of a run that makes its own."""
    folder: Path | None = None
    """The prepared run folder; None: the script makes one when it starts."""
    attempt: int = 1


def render_script(job: SbatchJob) -> str:
    """The batch script of `job`; `sbatch` takes it from a file or from standard input."""
    from submitit.slurm.slurm import _get_default_parameters, _make_sbatch_string

    flags = _flags(job)
    known = {k: flags.pop(k) for k in list(flags) if k in _get_default_parameters()}
    return _make_sbatch_string(
        command=_srun(job),
        folder=".",
        setup=[*_variables(job), *_shipped("prologue.sh"), *_make_folder(job), *_environment(job.config)],
        teardown=[*_shipped("epilogue.sh"), ""],
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={k.replace("_", "-"): v for k, v in flags.items()},
        **{"wckey": None, **known},
    )


def _flags(job: SbatchJob) -> dict[str, Any]:
    """`#SBATCH` parameters: ours, over them the cluster's, over those what was asked for."""
    asked, cluster = job.config.job, job.config.cluster
    output = "%x-%j.out" if job.folder is None else f"{_percent(job.folder)}/attempts/{job.attempt:03d}/logs/batch.out"
    ours: dict[str, Any] = {
        "partition": cluster.partition,
        "mem": cluster.mem,
        "no_requeue": True,
        **_gpu_flags(job.config),
        **{key.replace("-", "_"): value for key, value in cluster.sbatch.items()},
    }
    wanted = {name: value for name in _ASKED if (value := getattr(asked, name)) is not None}
    fixed: dict[str, Any] = {
        "job_name": asked.name or job.config.run.name,
        "nodes": asked.nodes,
        "ntasks_per_node": num_ranks(job.config) // asked.nodes,
        "cpus_per_task": _cpus_per_rank(job.config),
        "time": asked.time,
        "signal": f"USR2@{asked.signal_lead_s}",
        "open_mode": "append",
        "output": output,
    }
    return {key: v for key, v in {**ours, **wanted, **fixed}.items() if v is not None and v is not False}


def _gpu_flags(config: Config) -> dict[str, Any]:
    cluster = config.cluster
    if not cluster.gpus_per_node:
        return {}
    if cluster.gpu_request == "gpus-per-task":
        return {"gpus_per_task": 1}
    if cluster.gpu_request == "gpus-per-node":
        return {"gpus_per_node": cluster.gpus_per_node}
    return {"gres": f"gpu:{cluster.gpus_per_node}"}


def _cpus_per_rank(config: Config) -> int | None:
    if config.job.cpus_per_rank is not None or config.cluster.cpus_per_node is None:
        return config.job.cpus_per_rank
    return max(1, config.cluster.cpus_per_node // (num_ranks(config) // config.job.nodes))


def _variables(job: SbatchJob) -> list[str]:
    """What the shipped shell lines read. A follow-up gets its attempt and folder as arguments."""
    asked = job.config.job
    run = job.config.run
    own = shlex.quote(f"{Path(run.root).absolute() / run.name}/") + '"$(date -u +%Y%m%d-%H%M%S)-$SLURM_JOB_ID"'
    return [
        "# Which attempt of which run this is; a follow-up is told.",
        f"attempt=${{1:-{job.attempt}}}",
        "folder=$2",
        f'if [ -z "$folder" ]; then folder={own if job.folder is None else shlex.quote(str(job.folder))}; fi',
        f"nodes={asked.nodes} ranks={num_ranks(job.config)} limit_s={parse_time(asked.time)}",
        f"last_attempt={job.attempt + asked.max_attempts - 1}",
        "follow_up=singleton" if asked.dependency == "singleton" else 'follow_up="afterany:$SLURM_JOB_ID"',
    ]


def _make_folder(job: SbatchJob) -> list[str]:
    """For a run that makes its own folder: what `prepare_run` would have written, `config.yaml` last."""
    if job.folder is not None:
        return []
    config = dump_yaml(to_plain(job.config)).rstrip("\n")
    return [
        "",
        'if [ ! -e "$folder/config.yaml" ]; then',
        f"cat >\"$folder/overrides.txt\" <<'{_END}'",
        *job.overrides,
        _END,
        f"cat >\"$folder/.config.yaml\" <<'{_END}'",
        *config.split("\n"),
        _END,
        'cp "$0" "$here/submit.sh"',
        'mv "$folder/.config.yaml" "$folder/config.yaml"',
        "fi",
    ]


def _environment(config: Config) -> list[str]:
    cluster = config.cluster
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.env.items())]
    return ["", f"# cluster {cluster.name}", *lines, *cluster.setup] if lines or cluster.setup else []


def _srun(job: SbatchJob) -> str:
    """`srun` keeps its exit code, ends the step when a rank fails, and is told the CPUs again (it forgot them in 22.05)."""
    config = job.config
    cluster, asked = config.cluster, config.job
    cpus = _cpus_per_rank(config)
    options = ["srun", "--unbuffered", "--kill-on-bad-exit=1", *_logs(num_ranks(config))]
    options += [f"--mpi={shlex.quote(cluster.mpi)}"] if cluster.mpi else []
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    options += [shlex.quote(f"{cluster.container_flag}={asked.container}")] if asked.container else []
    options += [shlex.quote(word) for word in (*cluster.srun_args, *asked.srun_args)]
    rank = [shlex.quote(word) for word in (*cluster.wrapper, *_rank_command(config))]
    rank += [] if asked.command else ["--folder", '"$folder"', "--attempt", '"$attempt"']
    return " ".join(options) + " \\\n  " + " ".join(rank)


def _rank_command(config: Config) -> list[str]:
    if config.job.command:
        return config.job.command
    python = config.cluster.python or ("python" if config.job.container else sys.executable)
    return [python, "-u", "-m", "mixtera_hpc", "run"]


def _logs(ranks: int) -> list[str]:
    if ranks <= RANKS_WITH_OWN_LOG:
        return ['--output="$logs/rank_%05t.out"', '--error="$logs/rank_%05t.err"']
    return ["--label", '--output="$logs/node_%05n.out"', '--error="$logs/node_%05n.err"']


def _shipped(name: str) -> list[str]:
    return (Path(__file__).parent / "batch" / name).read_text().rstrip("\n").split("\n")


def _percent(path: Path) -> str:
    """sbatch expands % in file names."""
    return str(path).replace("%", "%%")
