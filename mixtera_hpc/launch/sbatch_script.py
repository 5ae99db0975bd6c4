"""Render the batch script of a `Config` as text. The renderer is pure: the same input gives the same bytes.

submitit's renderer writes the `#SBATCH` block. It is private, so its version is pinned below 1.6 and golden files
record its output. The command is our own instead of submitit's pickled closure: nothing is unpickled on thousands of
ranks, and the script shows what it runs. `batch/prologue.sh` claims the attempt and submits the job that follows it.
`batch/epilogue.sh` withdraws that job if nothing is left to do.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.job_shape import num_ranks, parse_time
from mixtera_hpc.config.schema import ClusterConfig, Config
from mixtera_hpc.config.yaml_files import dump_yaml

__all__ = ["RANKS_WITH_OWN_LOG", "SbatchJob", "render_script"]

RANKS_WITH_OWN_LOG = 255
"""Jobs with more ranks write one labelled log per node, because shared file systems limit the number of files."""

_JOB_FLAGS = (
    *("account", "partition", "qos", "constraint", "reservation"),
    *("mem", "comment", "exclude", "dependency"),
)
"""Keys of `job` that are passed to sbatch under their own name."""

_HEREDOC_END = "END_OF_MIXTERA_FILE"
"""End of a file inside the script. Underscores are added where a line of the file is equal to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SbatchJob:
    """One batch job of a run."""

    config: Config
    overrides: Sequence[str] = ()
    """The overrides that the user typed. A script that makes its own run folder records them there."""
    folder: Path | None = None
    """The prepared run folder; None if the script makes one when it starts."""
    attempt: int = 1


def render_script(job: SbatchJob) -> str:
    """Return the batch script of `job`; `sbatch` accepts it from a file or from standard input."""
    # Imported here because submitit takes 0.1 s, and only verbs that render a script need it.
    from submitit.slurm.slurm import _get_default_parameters, _make_sbatch_string

    flags = _flags(job)
    known = {name: flags.pop(name) for name in list(flags) if name in _get_default_parameters()}
    script: str = _make_sbatch_string(
        command=_srun(job),
        folder=".",
        setup=[*_variables(job), *_shipped_lines("prologue.sh"), *_make_folder(job), *_environment(job.config)],
        teardown=[*_shipped_lines("epilogue.sh"), ""],
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={name.replace("_", "-"): value for name, value in flags.items()},
        **{"wckey": None, **known},
    )
    return script


def _flags(job: SbatchJob) -> dict[str, Any]:
    """Return the `#SBATCH` parameters.

    Our defaults are overridden by `cluster.sbatch`, that by what `job` asks for, and that by what the run needs.
    """
    config = job.config
    defaults: dict[str, Any] = {
        "partition": config.cluster.partition,
        "mem": config.cluster.mem,
        "no_requeue": True,
        **_gpu_flags(config.cluster),
    }
    of_cluster = {name.replace("-", "_"): value for name, value in config.cluster.sbatch.items()}
    of_job = {name: value for name in _JOB_FLAGS if (value := getattr(config.job, name)) is not None}
    flags = {**defaults, **of_cluster, **of_job, **_fixed_flags(job)}
    return {name: value for name, value in flags.items() if value is not None and value is not False}


def _fixed_flags(job: SbatchJob) -> dict[str, Any]:
    config = job.config
    return {
        "job_name": config.job.name or config.run.name,
        "nodes": config.job.nodes,
        "ntasks_per_node": num_ranks(config) // config.job.nodes,
        "cpus_per_task": _cpus_per_rank(config),
        "time": config.job.time,
        "signal": f"USR2@{config.job.signal_lead_s}",
        "open_mode": "append",
        "output": _batch_log(job),
    }


def _batch_log(job: SbatchJob) -> str:
    if job.folder is None:
        return "%x-%j.out"
    return f"{_escape_percent(job.folder)}/attempts/{job.attempt:03d}/logs/batch.out"


def _gpu_flags(cluster: ClusterConfig) -> dict[str, Any]:
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
    ranks_per_node = num_ranks(config) // config.job.nodes
    return max(1, config.cluster.cpus_per_node // ranks_per_node)


def _variables(job: SbatchJob) -> list[str]:
    """Return the shell variables that the shipped shell code reads."""
    job_config = job.config.job
    folder = _new_folder(job.config) if job.folder is None else shlex.quote(str(job.folder))
    last_attempt = job.attempt + job_config.max_attempts - 1
    depends = '"afternotok:$job_id"'
    if job_config.dependency == "singleton":
        depends = '"singleton,afternotok:$job_id"'
    # A wrapper may contain shell code that the ranks run.
    checked = ["# shellcheck disable=SC2016"] if any("$" in word for word in job.config.cluster.wrapper) else []
    return [
        *checked,
        "# The attempt number and the run folder. A follow-up job gets both as arguments, and the job that it follows.",
        f"attempt=${{1:-{job.attempt}}} first_attempt={job.attempt} last_attempt={last_attempt}",
        "folder=$2 previous_job=$3",
        f'if [ -z "$folder" ]; then folder={folder}; fi',
        f"nodes={job_config.nodes} ranks={num_ranks(job.config)} limit_s={parse_time(job_config.time)}",
        "# A task of an array is named ARRAY_TASK. Its follow-up job is none, and must not inherit these variables.",
        "job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job_id=${job_id:-$SLURM_JOB_ID}",
        'unset "${!SLURM_ARRAY_@}"',
        f"follow_up={depends}",
    ]


def _new_folder(config: Config) -> str:
    """Return a shell word for the folder that the script makes, named by the time and the job id."""
    runs = Path(config.run.root).absolute() / config.run.name
    return shlex.quote(f"{runs}/") + '"$(date -u +%Y%m%d-%H%M%S)-$SLURM_JOB_ID"'


def _make_folder(job: SbatchJob) -> list[str]:
    """Return the commands that write what `prepare_run` would have written; `config.yaml` last, as there."""
    if job.folder is not None:
        return []
    config = dump_yaml(to_plain(job.config)).rstrip("\n").split("\n")
    overrides = [line for override in job.overrides for line in override.split("\n")]
    end = _HEREDOC_END
    while end in (*overrides, *config):
        end += "_"
    return [
        "",
        'if [ ! -e "$folder/config.yaml" ]; then',
        f"cat >\"$folder/overrides.txt\" <<'{end}'",
        *overrides,
        end,
        f"cat >\"$folder/.config.yaml\" <<'{end}'",
        *config,
        end,
        'mv "$folder/.config.yaml" "$folder/config.yaml"',
        "fi",
    ]


def _environment(config: Config) -> list[str]:
    cluster = config.cluster
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.env.items())]
    return ["", f"# cluster {cluster.name}", *lines, *cluster.setup] if lines or cluster.setup else []


def _srun(job: SbatchJob) -> str:
    """Return the srun command. It ends the step when a rank fails, and keeps the rank's exit code.

    `--cpus-per-task` is repeated because srun does not inherit it from sbatch since Slurm 22.05.
    """
    config = job.config
    cluster = config.cluster
    cpus = _cpus_per_rank(config)
    options = ["srun", "--unbuffered", "--kill-on-bad-exit=1", *_log_options(num_ranks(config))]
    if cluster.mpi:
        options.append(f"--mpi={shlex.quote(cluster.mpi)}")
    if cpus:
        options.append(f"--cpus-per-task={cpus}")
    if config.job.container:
        options.append(shlex.quote(f"{cluster.container_flag}={config.job.container}"))
    options += [shlex.quote(word) for word in (*cluster.srun_args, *config.job.srun_args)]

    rank = [shlex.quote(word) for word in (*cluster.wrapper, *_rank_command(config))]
    if not config.job.command:
        rank += ["--folder", '"$folder"', "--attempt", '"$attempt"']
    return " ".join(options) + " \\\n  " + " ".join(rank)


def _rank_command(config: Config) -> list[str]:
    if config.job.command:
        return config.job.command
    # A container has its own interpreter.
    python = "python" if config.job.container else sys.executable
    return [config.cluster.python or python, "-u", "-m", "mixtera_hpc", "run"]


def _log_options(ranks: int) -> list[str]:
    if ranks <= RANKS_WITH_OWN_LOG:
        return ['--output="$logs/rank_%05t.out"', '--error="$logs/rank_%05t.err"']
    return ["--label", '--output="$logs/node_%05n.out"', '--error="$logs/node_%05n.err"']


def _shipped_lines(name: str) -> list[str]:
    return (Path(__file__).parent / "batch" / name).read_text().rstrip("\n").split("\n")


def _escape_percent(path: Path) -> str:
    """Double each %, which sbatch would expand in file names."""
    return str(path).replace("%", "%%")
