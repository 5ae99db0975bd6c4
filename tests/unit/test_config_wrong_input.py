"""Mistakes that a user may type, and the message for each of them. There is never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.config.compose import compose, load_config, prepare_application
from mixtera_hpc.config.schema import ClusterConfig
from mixtera_hpc.config.yaml_files import read_yaml
from mixtera_hpc.errors import ConfigError

pytestmark = pytest.mark.slow
"""Composes a configuration for every mistake."""

BASE = ["data.root=/data", "mixture.unit=samples"]


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("experiment=nope", r"experiment=nope does not exist\. Known: .*'demo'"),
        ("foo", r"'foo' is not an override\. Write key=value"),
        ("index.path=~/i.h5", r"the shell leaves ~ as it is behind a =\. Write index\.path=\$HOME/i\.h5"),
        ("=3", r"'=3' is not an override\. Write key=value"),
        ("job.nodes=0", r"^job\.nodes is 0, expected at least 1\.$"),
        (
            "job.nodes=3",
            r"^dataplane\.global_batch_size is 64, which 3 ranks cannot share evenly\. Use a multiple of 3\.$",
        ),
        ("dataplane.model_parallel_size=0", r"dataplane\.model_parallel_size is 0, expected at least 1"),
        ("dataplane.batch_schedule=null", r"expected a list\. Write dataplane\.batch_schedule=\[\]\."),
        (
            "dataplane.batch_schedule={start: 5, size: 8}",
            r"has keys and values, expected a list\.\n  Write dataplane\.batch_schedule=\[…\]",
        ),
        ("mixture.group_by='[a]'", r"is '\[a\]', expected a list\. Remove the quotes around the list\."),
        (
            "mixture.domains=[{key: {a: [0,1)}}]",
            r"is not a Hydra override\.\n  Put each text in it that has special characters in double quotes",
        ),
        ("job.command=[a(b]", r"Put each text in double quotes: 'job\.command=\[\"a, b\", \"c\"\]'"),
        ("data.properties.ü=a", r"in a key, but this one is 'data\.properties\.ü'\. Write it in an experiment file\."),
        ("data.properties.my key=a", r"takes ASCII letters, digits and \./@_- in a key, .* 'data\.properties\.my key'"),
        ('data.properties={"a": b}', r"is not a Hydra override\.\n .* and names of keys in none"),
        ("query.were=a > 1", r"^query\.were is not a known key\. Did you mean 'query\.where'"),
        ("mixture={kind: natural, capp: 1}", r"^mixture\.capp is not a known key\. Did you mean 'mixture\.cap'"),
        ("query.split=validation", r"^query\.split is not a known key\. Use --split of the verbs query and plan\.$"),
        ("+query.drop=a > 1", r"^query\.drop is not a known key\. Use --drop of the verb resume\.$"),
        ("training.keep_checkpoints=3", r"^training\.keep_checkpoints is not a known key\. Use checkpoint\.keep\.$"),
        ("job.time=12h", r"^job\.time is '12h', expected HH:MM:SS or D-HH:MM:SS, e\.g\. job\.time=12:30:00"),
        ("plan.steps=-1", r"plan\.steps is -1, expected at least 1"),
        ("plan.first_step=-4", r"plan\.first_step is -4, expected at least 0"),
        ("training.seed=99999999999999999999999", r"training\.seed is 9+, expected a number of 64 bits"),
        ("training.learning_rate=inf", r"training\.learning_rate is inf, expected a finite number"),
        ("mixture.max_epochs=inf", r"mixture\.max_epochs is inf, expected a finite number"),
        ("job.mem=lots", r"^job\.mem is 'lots', expected a number of megabytes, or a number with K, M, G or T\.$"),
        ("job.cpus_per_rank=0", r"^job\.cpus_per_rank is 0, expected at least 1\.$"),
        (
            "dataplane.workers=100",
            r"^dataplane\.workers is 100, but where the cores of a rank are not known, at most 64 are accepted",
        ),
        ("job.command=[]", r"^job\.command is empty\. Give the words of a command"),
        ("job.comment='a\nb'", r"^job\.comment is 'a\\nb', expected text on one line without control characters\.$"),
        ("+cluster.env={A-B: c}", r"^cluster\.env has the key 'A-B', which is not the name of a variable\.$"),
        ("+cluster.sbatch={X_Y: c}", r"^cluster\.sbatch has the key 'X_Y', which is not a parameter of sbatch\.$"),
        (
            "dataplane.watchdog_s=0.1",
            r"^dataplane\.watchdog_s is 0\.1, expected at least 1 second, or 0 to turn it off",
        ),
        ("job.heartbeat_s=0.5", r"^job\.heartbeat_s is 0\.5, expected 1 to 3600 seconds"),
        ("job.heartbeat_s=1e9", r"^job\.heartbeat_s is 1000000000\.0, expected 1 to 3600 seconds"),
        ("dataplane.watchdog_s=-1", r"^dataplane\.watchdog_s is -1.*, expected at least 0"),
        ("dataplane.watchdog_trainer_s=0", r"^dataplane\.watchdog_trainer_s is 0.*, expected at least 1"),
        (
            "dataplane.feedback_lag=1000000000000000000000",
            r"^dataplane\.feedback_lag is 10+, expected at most 1000000 chunks",
        ),
        ("dataplane.lanes=65537", r"^dataplane\.lanes is 65537, expected at most 65536\."),
        (
            "dataplane.window_bytes=4611686018427387904",
            r"^dataplane\.window_bytes is 4611686018427387904, expected less",
        ),
        (
            "dataplane.seq_len=2147483648",
            r"^dataplane\.seq_len is 2147483648, expected at most 134217728 \(2\*\*27\) tokens",
        ),
        ("index.block_rows=100000000", r"^index\.block_rows is 100000000, expected at most 1048576"),
        ("index.path=''", r"^index\.path is empty\. Set it to the file of the index"),
        ("mixture.group_by=[a,a]", r"^mixture\.group_by names 'a' twice\.$"),
        ("mixture.temperature=1e-300", r"^mixture\.temperature is 1e-300, expected at least 0\.01"),
        (
            "mixture={kind: static, domains: [{key: {a: b}, weight: 1e308}, {key: {a: c}, weight: 1e308}]}",
            r"mixture\.domains\[0\]\.weight is 1e\+308, expected a number of at least 0 and at most 1e\+100\.",
        ),
        ("data.properties.class=label", r"data\.properties\.class is not a usable name\..*no keyword of Python"),
    ],
)
def test_a_wrong_override_is_explained(word: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        compose([*BASE, word])


@pytest.mark.parametrize(
    ("words", "cores"),
    [
        (["job.cpus_per_rank=2", "dataplane.workers=9"], r"job\.cpus_per_rank=2"),
        (["cluster=clariden", "job.account=a", "dataplane.workers=289"], "the 72 cores of a rank"),
    ],
)
def test_more_reading_processes_than_the_cores_of_a_rank_can_run_are_refused(words: list[str], cores: str) -> None:
    *words, workers = words
    count = workers.removeprefix("dataplane.workers=")
    with pytest.raises(ConfigError, match=rf"^dataplane\.workers is {count}, more than 4 × {cores}\. More processes"):
        compose([*BASE, *words, workers])
    compose([*BASE, *words, f"dataplane.workers={int(count) - 1}"])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's configs, on MIXTERA_CONF."""
    for group in ("experiment", "cluster"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(
            "# @package _global_\n" if group == "experiment" else "name: mine\n"
        )
    monkeypatch.setenv("MIXTERA_CONF", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("group", ["experiment", "cluster"])
def test_near_misses_include_configs_of_the_user(own: Path, group: str) -> None:
    with pytest.raises(ConfigError, match=rf"{group}=mien does not exist\. Did you mean 'mine'\?"):
        compose([*BASE, f"{group}=mien"])


@pytest.mark.parametrize(
    ("file", "text", "answer"),
    [
        (
            "experiment/mine.yaml",
            "# @package _global_\nmixture: {group_by: [a}\n",
            r"Invalid YAML in a config file: (?s:.*)/experiment/mine\.yaml\", line 2",
        ),
        ("experiment/mine.yaml", "mixture: {group_by: [a]}\n", "Begin its file with the line `# @package _global_`"),
        (
            "cluster/mine.yaml",
            "name: mine\nmem: ${cluster.memory}\n",
            r"^cluster\.memory is not a known key, but \S+\.mem refers to it\.",
        ),
    ],
)
def test_a_mistake_in_a_config_of_the_user_is_explained(own: Path, file: str, text: str, answer: str) -> None:
    (own / file).write_text(text)
    group, _, _ = file.partition("/")

    with pytest.raises(ConfigError, match=answer):
        compose([*(BASE if group == "cluster" else []), f"{group}=mine"])


def test_a_key_that_is_left_open_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^dataplane\.tokenizer is missing\. Set it"):
        compose([*BASE, "dataplane.tokenizer=???"])
    with pytest.raises(ConfigError, match=r"^data\.root is missing\.(?s:.*)The value of index\.path is taken from it"):
        compose(["data.root=???"])


def test_a_cluster_file_of_the_user_holds_differences_only(own: Path) -> None:
    (own / "cluster/mine.yaml").write_text("name: mine\nranks_per_node: 2\n")

    config = compose([*BASE, "cluster=mine"])

    assert config.cluster == ClusterConfig(name="mine", ranks_per_node=2)
    assert config.job.ranks_per_node == 2


def test_a_missing_folder_of_configs_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTERA_CONF", f"{own}:{own}/typo")

    with pytest.raises(ConfigError, match=r"MIXTERA_CONF names .*/typo, which is not a folder"):
        compose(BASE)
    done = _hydra_application("cluster=mine")
    assert (done.returncode, done.stderr.startswith("ConfigError: MIXTERA_CONF names")) == (2, True)


def test_the_hydra_application_finds_configs_of_the_user(own: Path) -> None:
    done = _hydra_application("cluster=mine", "experiment=mine")

    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--resolve"]])
def test_the_hydra_application_prints_no_config_with_an_unknown_key(flags: list[str], own: Path) -> None:
    (own / "experiment/mine.yaml").write_text("# @package _global_\ntraining: {validat_every: 3}\n")

    done = _hydra_application("experiment=mine", *flags)

    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: training.validat_every is not a known key. Did you mean")


def _hydra_application(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mixtera_hpc.training", "--cfg", "job", *BASE, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'spam' not in tags and a == 'b'", "'spam' not in tags and a == 'b'"),
        ("\"'spam' not in tags\"", "'spam' not in tags"),
        ('"x" in tags', '"x" in tags'),
        ("0.1 <= q < 0.5", "0.1 <= q < 0.5"),
        ("'a == 3'", "a == 3"),
    ],
)
def test_a_query_needs_no_second_pair_of_quotes(typed: str, meant: str) -> None:
    assert compose([*BASE, f"query.where={typed}"]).query.where == meant


def test_a_folder_without_a_config_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read: .*No such file"):
        load_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        load_config(tmp_path / "config.yaml")


def test_numbers_of_a_file_are_read_as_in_conf(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text("kind: schedule\nschedule: {stages: [{start: 2e9}]}\n")
    assert read_yaml(tmp_path / "mixture.yaml") == {"kind": "schedule", "schedule": {"stages": [{"start": 2e9}]}}


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [", "a: ${nowhere}", "{1: 2"])
def test_a_file_without_keys_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "mixture.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"mixture\.yaml (cannot be read|has no keys)[^$]*\n  Give a YAML file"):
        read_yaml(tmp_path / "mixture.yaml")


def test_a_run_whose_folder_cannot_be_made_is_refused(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["run", *collection, f"run.root={tmp_path / 'file'}"]) == 2
    assert "No folder can be made in run.root=" in capsys.readouterr().err


def test_an_attempt_without_its_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *BASE, "--attempt=3"]) == 2
    assert "--attempt needs --folder" in capsys.readouterr().err


def test_an_attempt_that_no_batch_script_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--folder", str(tmp_path), "--attempt=99"]) == 2
    assert "names an attempt that no batch script has begun" in capsys.readouterr().err
    assert not (tmp_path / "attempts").exists()


def test_a_submitted_run_without_its_index_is_refused(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"index.path={tmp_path / 'none.h5'}"
    assert main(["submit", *collection, missing, f"run.root={tmp_path / 'runs'}", "cluster=dev"]) == 2
    assert "none.h5" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["job.nodes", "job.ranks_per_node", "cluster"])
def test_the_launcher_of_hydra_refuses_jobs_of_several_shapes(key: str) -> None:
    values = "dev,local" if key == "cluster" else "1,2"
    with pytest.raises(ConfigError, match=r"several values\.\n  Use mixtera-hpc sweep"):
        prepare_application(["-m", "hydra/launcher=submitit_slurm", *BASE, f"{key}={values}"])
