"""Render the batch script of a `Config` as text. The renderer is pure: the same input gives the same bytes.

submitit's renderer writes the `#SBATCH` block. It is private, so its version is pinned below 1.6 and golden files
record its output. The command is our own instead of submitit's pickled closure: nothing is unpickled on thousands of
ranks, and the script shows what it runs. `batch/prologue.sh` claims the attempt and submits the job that follows it.
`batch/epilogue.sh` withdraws that job if nothing is left to do.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtera_hpc.config.convert import to_plain
from mixtera_hpc.config.job_shape import (
    cpus_per_rank,
    mpi_plugin,
    num_ranks,
    parse_time,
    python_of_ranks,
    signal_lead_s,
)
from mixtera_hpc.config.schema import ClusterConfig, Config
from mixtera_hpc.config.yaml_files import dump_yaml

__all__ = ["RANKS_WITH_OWN_LOG", "SbatchJob", "escape_percent", "render_script", "render_template"]

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
    options = _log_options(num_ranks(job.config))
    rank = _rank_command(job.config)
    if not job.config.job.command:
        rank += ["--folder", '"$folder"', "--attempt", '"$attempt"']
    return _sbatch_text(
        job,
        command=_srun(job.config, options, rank),
        setup=[*_variables(job), *_shipped_lines("prologue.sh"), *_make_folder(job), *_environment(job.config)],
        teardown=[*_shipped_lines("epilogue.sh"), ""],
    )


def render_template(config: Config, introduction: Sequence[str]) -> str:
    """Return a short batch script that starts the ranks and nothing else, for users to read and change.

    Its arguments are those of `mixtera-hpc` on every rank, for example `run experiment=mine`. No attempt follows by
    itself.

    Args:
        config: The job and the cluster. The data and the mixture do not matter.
        introduction: Comment lines below the first line of the script.
    """
    rank = [shlex.quote(python_of_ranks(config)), "-u", "-m", "mixtera_hpc", '"$@"']
    environment = _environment(config)
    script = _sbatch_text(
        SbatchJob(config=config),
        command=_srun(config, [], rank),
        setup=[*_shellcheck_directive(config), 'export MIXTERA_SAVED_FILE="$PWD/saved-$SLURM_JOB_ID"', *environment],
        teardown=[*_shipped_lines("template_end.sh"), ""],
    )
    interpreter, *lines = script.replace("export SUBMITIT_EXECUTOR=slurm\n", "").split("\n")
    return "\n".join([interpreter, *introduction, *lines])


def _sbatch_text(job: SbatchJob, *, command: str, setup: list[str], teardown: list[str]) -> str:
    # Imported here because submitit takes 0.1 s, and only verbs that render a script need it.
    from submitit.slurm.slurm import _get_default_parameters, _make_sbatch_string

    flags = _flags(job)
    known = {name: flags.pop(name) for name in list(flags) if name in _get_default_parameters()}
    script: str = _make_sbatch_string(
        command=command,
        folder=".",
        setup=setup,
        teardown=teardown,
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
        "cpus_per_task": cpus_per_rank(config),
        "time": config.job.time,
        "signal": f"USR2@{signal_lead_s(config.job, config.cluster)}",
        "open_mode": "append",
        "output": _batch_log(job),
    }


def _batch_log(job: SbatchJob) -> str:
    if job.folder is None:
        return "%x-%j.out"
    return f"{escape_percent(job.folder)}/attempts/{job.attempt:03d}/logs/batch.out"


def _gpu_flags(cluster: ClusterConfig) -> dict[str, Any]:
    if not cluster.gpus_per_node:
        return {}
    if cluster.gpu_request == "gpus-per-task":
        return {"gpus_per_task": 1}
    if cluster.gpu_request == "gpus-per-node":
        return {"gpus_per_node": cluster.gpus_per_node}
    return {"gres": f"gpu:{cluster.gpus_per_node}"}


def _variables(job: SbatchJob) -> list[str]:
    """Return the shell variables that the shipped shell code reads."""
    job_config = job.config.job
    folder = _new_folder(job.config) if job.folder is None else shlex.quote(str(job.folder))
    last_attempt = job.attempt + job_config.max_attempts - 1
    depends = '"afternotok:$job_id"'
    if job_config.dependency == "singleton":
        depends = '"singleton,afternotok:$job_id"'
    return [
        *_shellcheck_directive(job.config),
        "# The attempt number and the run folder. A follow-up job gets both as arguments, and the job that it follows.",
        f"attempt=${{1:-{job.attempt}}} first_attempt={job.attempt} last_attempt={last_attempt}",
        "folder=$2 previous_job=$3",
        f'if [ -z "$folder" ]; then folder={folder}; fi',
        f"nodes={job_config.nodes} ranks={num_ranks(job.config)} limit_s={parse_time(job_config.time)}",
        "# A task of an array is named ARRAY_TASK. Its follow-up job is not a task and must not inherit these "
        "variables.",
        "job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job_id=${job_id:-$SLURM_JOB_ID}",
        'unset "${!SLURM_ARRAY_@}"',
        f"follow_up={depends}",
    ]


def _shellcheck_directive(config: Config) -> list[str]:
    """Return a comment for shellcheck if the wrapper contains shell code that the ranks run."""
    return ["# shellcheck disable=SC2016"] if any("$" in word for word in config.cluster.wrapper) else []


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
    variables = dict(cluster.env)
    if config.environment.kind == "container":
        variables |= cluster.container_env
    lines = [f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
    lines += [*cluster.setup, *config.environment.setup]
    if config.environment.kind == "venv":
        # A job.command finds the programs of the virtual environment, as if it were activated.
        folder = shlex.quote(str(config.environment.venv))
        lines.append(f'export VIRTUAL_ENV={folder} PATH={folder}/bin:"$PATH"')
    return ["", f"# cluster {cluster.name}", *lines] if lines else []


def _srun(config: Config, log_options: Sequence[str], rank: Sequence[str]) -> str:
    """Return the srun command. It ends the step when a rank fails, and keeps the rank's exit code.

    `--cpus-per-task` is repeated because srun does not inherit it from sbatch since Slurm 22.05.

    Args:
        config: The job, the cluster and the environment.
        log_options: Options of srun, quoted for the shell.
        rank: Words of the command of every rank, quoted for the shell.
    """
    cluster = config.cluster
    cpus = cpus_per_rank(config)
    options = ["srun", "--unbuffered", "--kill-on-bad-exit=1", *log_options]
    if mpi := mpi_plugin(config):
        options.append(f"--mpi={shlex.quote(mpi)}")
    if cpus:
        options.append(f"--cpus-per-task={cpus}")
    options += _environment_options(config)
    options += [shlex.quote(word) for word in (*cluster.srun_args, *config.job.srun_args)]
    wrapper = [shlex.quote(word) for word in cluster.wrapper]
    return " ".join(options) + " \\\n  " + " ".join([*wrapper, *rank])


def _rank_command(config: Config) -> list[str]:
    """Return the words of the command of every rank, quoted for the shell."""
    words = config.job.command or [python_of_ranks(config), "-u", "-m", "mixtera_hpc", "run"]
    return [shlex.quote(word) for word in words]


def _environment_options(config: Config) -> list[str]:
    """Return the flags of srun for the uenv or the container, which sbatch must not get."""
    environment = config.environment
    options = []
    if environment.kind == "container":
        options.append(f"{config.cluster.container_flag}={environment.image}")
    if environment.kind == "uenv":
        options.append(f"{config.cluster.uenv_flag}={environment.image}")
    if environment.view:
        options.append(f"--view={environment.view}")
    return [shlex.quote(option) for option in options]


def _log_options(ranks: int) -> list[str]:
    if ranks <= RANKS_WITH_OWN_LOG:
        return ['--output="$logs/rank_%05t.out"', '--error="$logs/rank_%05t.err"']
    return ["--label", '--output="$logs/node_%05n.out"', '--error="$logs/node_%05n.err"']


def _shipped_lines(name: str) -> list[str]:
    return (Path(__file__).parent / "batch" / name).read_text().rstrip("\n").split("\n")


def escape_percent(path: Path) -> str:
    """Double each %, which sbatch would expand in file names."""
    return str(path).replace("%", "%%")
