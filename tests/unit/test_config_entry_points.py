"""Every key of the schema, set through every entry point: the resolved value is the same everywhere."""

import re
import subprocess
import sys
from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import mixtera_hpc
from mixtera_hpc.cli.main import main
from mixtera_hpc.config.composition.override_words import hydra_words
from mixtera_hpc.config.composition.schema_store import schema_defaults
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.key_paths import SchemaKey, schema_keys, without_none
from mixtera_hpc.config.schema import Config

pytestmark = pytest.mark.slow
"""Sets every key through every entry point."""

TEXT = "a >= 0.5, 'b c' = (d)"
"""Text that Hydra's grammar cannot parse, for every key that takes any text."""
SPECIAL = {
    "data.root": "/data",
    "data.sets": {"web": "/a", "code": {"root": "/b"}},
    "data.properties": {"language": "meta.lang", "size": {"path": "n", "kind": "number"}},
    "index.path": "/i dex.h5",
    "index.paths": ["/a.h5", "/b.h5"],
    "index.trusted_roots": ["/trusted"],
    "mixture.kind": "static",
    "mixture.domains": [{"key": {"language": "en"}, "weight": 0.5}],
    "mixture.remainder": {"weight": 0.5},
    "mixture.algorithm": {"name": "odm", "warmup": 3},
    "mixture.schedule.stages": [{"start": 0, "kind": "natural"}],
    "dataplane.batch_schedule": [{"start": 5, "size": 256}],
    "dataplane.scalars": {"grad_norm": 0.5},
    "dataplane.balance": "cost",
    "dataplane.balance_group": 64,
    "dataplane.eos_id": 2,
    "dataplane.tokenizer": "/tok, 1.json",
    "run.name": "2026",
    "run.root": "/runs",
    "run.id": "007",
    "job.ranks_per_node": 2,
    "job.time": "02:00:00",
    "job.partition": "fast",
    "job.mem": "200G",
    "environment.kind": "uenv",
    "swarm.objective": {"web": 1.5},
    "swarm.phases": [0.75, 0.25],
    "mixture.fraction": 0.5,
    "sweep.scaling": "weak",
    "cluster.gpus_per_node": 2,
    "cluster.cpus_per_node": 64,
    "cluster.max_time": "1-00:00:00",
    "cluster.partitions": {"fast": {"max_nodes": 8}},
}
"""Values of keys that not any value of their type suits."""
APART = [
    {"dataplane.vocab_size", "dataplane.eos_id"},
    {"mixture.temperature"},
    {"mixture.unimax_epochs"},
    {"mixture.schedule.stages"},
    {"dataplane.pack"},
]
"""Keys that exclude others: each set has a configuration to itself."""
WITH_APART = [
    [],
    ["mixture.kind=natural"],
    ["mixture.kind=natural"],
    ["mixture.kind=schedule"],
    ["mixture.unit=tokens", "dataplane.tokenizer=/tok, 1.json"],
]
"""Overrides that the configurations of `APART` need besides."""
BASE = ["data.root=/data", "mixture.unit=samples"]
KEYS = [key for key in schema_keys() if not key.is_group]


def value_for(key: SchemaKey) -> Any:
    """A value that is not the default."""
    if key.path in SPECIAL:
        return SPECIAL[key.path]
    default = reduce(lambda node, name: node[name], key.path.split("."), schema_defaults())
    hint = without_none(key.hint)
    if hint is bool:
        return not default
    if hint in (int, float):
        return 2 * default if default else {int: 3, float: 0.5}[hint]
    if get_origin(hint) is Literal:
        return next(option for option in get_args(hint) if option != default)
    if get_origin(hint) in (list, dict):
        return ["a", "b"] if get_origin(hint) is list else {"a": "1"}
    return TEXT


def word_for(key: SchemaKey) -> str:
    """The override as a user types it: text without quotes of its own."""
    value = value_for(key)
    if isinstance(value, dict | list):
        return f"{key.path}={yaml.safe_dump(value, default_flow_style=True, width=1000).strip()}"
    return f"{key.path}={yaml.safe_dump(value).splitlines()[0] if not isinstance(value, str) else value}"


def configurations() -> list[list[str]]:
    """Overrides of configurations that pass all checks and together set every key."""
    apart = set().union(*APART)
    together = [word_for(key) for key in KEYS if key.path not in apart]
    others = [
        [*BASE, *more, *(word_for(key) for key in KEYS if key.path in keys)]
        for keys, more in zip(APART, WITH_APART, strict=True)
    ]
    return [together, *others]


def expected() -> dict[str, Any]:
    """Dotted path → value, with short forms expanded."""
    plain = schema_defaults()
    for key in KEYS:
        *above, name = key.path.split(".")
        reduce(lambda node, part: node[part], above, plain)[name] = value_for(key)
    return leaves(from_plain(Config, plain))


def leaves(config: Config) -> dict[str, Any]:
    plain = to_plain(config)
    return {key.path: reduce(lambda node, name: node[name], key.path.split("."), plain) for key in KEYS}


def keys_of(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in words]


@pytest.mark.parametrize("words", configurations(), ids=["together", *("-".join(sorted(keys)) for keys in APART)])
def test_every_key_is_set_by_compose_and_by_a_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    composed = mixtera_hpc.compose(words)
    assert main(["submit", "--dry-run", *words]) == 0
    script = capsys.readouterr().out
    recorded = re.search(r"\.config\.yaml\" <<'(\w+)'\n(.*?)\n\1\n", script, re.DOTALL)
    assert recorded is not None

    by_compose = leaves(composed)
    by_verb = leaves(from_plain(Config, yaml.safe_load(recorded.group(2))))

    wanted = expected()
    for path in set(keys_of(words)) - set(keys_of([*BASE, "mixture.kind="])):
        assert (path, by_compose[path]) == (path, wanted[path])
        assert (path, by_verb[path]) == (path, wanted[path])


def test_every_key_is_set_by_the_hydra_application() -> None:
    words = [word_for(key) for key in KEYS]

    printed = hydra_application(*words)

    assert leaves(from_plain(Config, printed)) == expected()


def test_keys_below_open_mappings_are_set_without_a_plus() -> None:
    words = [
        "data.root=/data",
        "data.properties.kind.path=meta.kind",
        'data.properties.kind.pattern=^(a|b)\\d+, "x"$',
        "data.properties.stem=__stem__",
        "data.sets.web.root=/a b",
        "data.sets.code=/c",
        "mixture.unit=samples",
        "mixture.algorithm.warmup=3",
        "cluster.env.NUMBER=1",
        "cluster.sbatch.exclusive=true",
        "cluster.partitions.fast.max_time=02:00:00",
    ]

    config = mixtera_hpc.compose(words)

    assert config.data.properties["kind"].pattern == '^(a|b)\\d+, "x"$'
    assert config.data.properties["stem"].path == "__stem__"
    assert config.data.roots() == {"web": "/a b", "code": "/c"}
    assert config.mixture.algorithm == {"name": "ado", "warmup": 3}
    assert config.cluster.env == {"NUMBER": "1"}
    assert config.cluster.sbatch == {"exclusive": True}
    assert config.cluster.partitions["fast"].max_time == "02:00:00"
    assert from_plain(Config, hydra_application(*words)) == config


@pytest.mark.parametrize(
    "text",
    [
        "'spam' not in tags and a == \"b\"",
        "matches(l, 'zh-.*|en')",
        "q >= 0.5, [x]",
        "{a: b",
        "ends with \\",
        'a \\" quote',
        "1e5",
        "true",
        "01:00:00",
        "a=b=c",
        "choice(a,b)",
        "#no comment",
        " ",
        "/home/jürgen/数据",
    ],
)
def test_text_arrives_as_typed(text: str) -> None:
    (word,) = hydra_words([f"job.comment={text}"])
    override = OverridesParser.create().parse_override(word)

    assert override.key_or_group == "job.comment"
    assert str(override.value()) == text
    assert not override.is_sweep_override()


@pytest.mark.parametrize(
    "entries",
    [
        ["308870072333", "012", "12345e678901", "0x1f", "1_000"],
        ["train.py", "--steps", "100", "--lr", "1e-3", "--decay", ".5", "--offset", "-1"],
        ["true", "nan", "-inf", "a1"],
        ["prose/*.jsonl", "1.2.3", "10:20", "2024-01-01"],
        ["/home/jürgen/数据", "a=b", "a;b", "#a", "~a", "!a", "a & b", "<a>", "`a`", "--name=x y"],
    ],
)
@pytest.mark.parametrize("sweep", [False, True])
def test_entries_of_a_list_of_texts_arrive_as_typed(entries: list[str], *, sweep: bool) -> None:
    (word,) = hydra_words([f"job.command=[{', '.join(entries)}]"], sweep=sweep)
    override = OverridesParser.create().parse_override(word)

    assert [str(entry) for entry in override.value()] == entries
    assert mixtera_hpc.compose([f"job.command=[{','.join(entries)}]", *BASE]).job.command == entries


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("index.generations=['',12]", "index.generations=['',\"12\"]"),
        ("index.generations=['[1,2]',\"3, 4\", 5 ]", 'index.generations=[\'[1,2]\',"3, 4", "5" ]'),
        ("index.generations=[]", "index.generations=[]"),
        ("index.paths=[${oc.env:A,1,2}]", "index.paths=[${oc.env:A,1,2}]"),
        ("mixture.weights=[1,2]", "mixture.weights=[1,2]"),
    ],
)
def test_entries_that_are_quoted_or_no_numbers_stay(word: str, expected: str) -> None:
    assert hydra_words([word]) == [expected]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("index.generations=[1],[2,3]", 'index.generations=["1"],["2","3"]'),
        ("job.time=01:00:00,1-02:00:00", 'job.time="01:00:00","1-02:00:00"'),
        ("run.name=a,b", "run.name=a,b"),
        ("query.where='a == 1',\"b == 'x'\"", "query.where='a == 1',\"b == 'x'\""),
        ("job.qos=null,high", "job.qos=null,high"),
        ("dataplane.seed=1,2", "dataplane.seed=1,2"),
    ],
)
def test_values_of_a_sweep_are_quoted_one_by_one(word: str, expected: str) -> None:
    assert hydra_words([word], sweep=True) == [expected]


def hydra_application(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "mixtera_hpc.training", "--cfg", "job", "--resolve", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert isinstance(printed, dict)
    return printed


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["training.validat_every=5"],
            "training.validat_every is not a known key. Did you mean 'training.validate_every'",
        ),
        (
            ["mixture.remainder.weight=0.1"],
            "mixture.remainder is null, so mixture.remainder.weight cannot be set alone",
        ),
        (["experiment=demon"], "experiment=demon does not exist. Did you mean 'demo'?"),
        (
            ["--cfg", "job", "--resolve", "index.path=${oc.env:UNSET_FOLDER}/i.h5"],
            "index.path needs the environment variable UNSET_FOLDER, which is not set.\n"
            "  Set UNSET_FOLDER, or give index.path",
        ),
        (["--cfg", "job", "--resolve", "job.mem=${cluster.memory}"], "cluster.memory is not a known key, but job.mem"),
        (["mixture=unimx"], "mixture=unimx does not exist. Did you mean 'unimax'?"),
        (["-m", "--cfg", "job", "training.seed=1,2"], "A sweep (-m) cannot be combined with --cfg."),
        (["-m", "training.sead=1,2"], "training.sead is not a known key. Did you mean 'training.seed'"),
    ],
)
def test_the_hydra_application_names_what_is_wrong(words: list[str], answer: str) -> None:
    command = [sys.executable, "-m", "mixtera_hpc.training", "data.root=/data", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 2
    assert f"ConfigError: {answer}" in done.stderr
