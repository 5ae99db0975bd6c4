"""`mixtera-hpc migrate`: the plan of the written experiment has the proportions of the other loader."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.testing.writers import write_arrow_stream, write_mds_rows, write_tar

pytestmark = pytest.mark.slow
"""Builds an index for every source."""

IDS = ["dataplane.vocab_size=50257", "dataplane.eos_id=50256"]
Words = list[str]


def token_files(data: Path) -> None:
    for name, count in (("web", 40), ("code", 20)):
        write_megatron(data / f"{name}_text_document.bin", [[1, 2, 3, 50256]] * count)


def megatron_words(data: Path) -> Words:
    token_files(data)
    return ["megatron", "30", f"{data}/web_text_document", "70", f"{data}/code_text_document", *IDS]


def megatron_twice(data: Path) -> Words:
    token_files(data)
    blend = ["1", f"{data}/web_text_document", "7", f"{data}/code_text_document", "2", f"{data}/web_text_document"]
    return ["megatron", *blend, *IDS]


def megatron_file(data: Path) -> Words:
    _, *blend = megatron_words(data)
    (data / "blend.txt").write_text("\n".join(blend[:4]))
    return ["megatron", f"{data}/blend.txt", *IDS]


def megatron_json(data: Path) -> Words:
    _, *blend = megatron_words(data)
    (data / "blend.json").write_text(json.dumps({"train": blend[:4], "valid": ["x"]}))
    return ["megatron", f"{data}/blend.json", *IDS]


def megatron_by_size(data: Path) -> Words:
    token_files(data)
    other = data / "more_text_document.bin"
    write_megatron(other, [[1, 2, 3, 50256]] * 60)
    return ["megatron", *(f"{data}/{name}_text_document" for name in ("web", "code", "more")), *IDS]


def saved_folder(folder: Path, column: str) -> None:
    folder.mkdir()
    (path,) = write_arrow_stream(folder, [{column: f"row {i}", "n": i} for i in range(30)])
    path.rename(folder / "data-00000-of-00001.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    features = {column: {"dtype": "string", "_type": "Value"}, "n": {"dtype": "int64", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def huggingface(data: Path) -> Words:
    saved_folder(data / "web", "text")
    saved_folder(data / "code", "content")
    return ["huggingface", "0.8", f"{data}/web", "0.2", f"{data}/code"]


def huggingface_in_turn(data: Path) -> Words:
    saved_folder(data / "web", "text")
    saved_folder(data / "code", "content")
    return ["huggingface", f"{data}/web", f"{data}/code"]


def mds_folders(data: Path) -> None:
    for name, count in (("web", 20), ("code", 10)):
        (data / name).mkdir()
        write_mds_rows(data / name, [{"text": f"row {i}", "n": i} for i in range(count)], "zstd")


def mosaic_proportions(data: Path) -> Words:
    mds_folders(data)
    (data / "train.yaml").write_text(
        f"train_loader:\n  dataset:\n    streams:\n      web: {{local: {data}/web, proportion: 0.7}}\n"
        f"      code: {{remote: {data}, split: code, proportion: 0.3}}\n"
    )
    return ["mosaic", f"{data}/train.yaml"]


def mosaic_repeat(data: Path) -> Words:
    mds_folders(data)
    (data / "s.yaml").write_text(f"streams:\n- {{local: {data}/web}}\n- {{local: {data}/code, repeat: 3}}\n")
    return ["mosaic", f"{data}/s.yaml"]


def mosaic_folders(data: Path) -> Words:
    mds_folders(data)
    return ["mosaic", f"{data}/web", f"{data}/code"]


def prepared(folder: Path, count: int) -> None:
    (folder / ".nv-meta").mkdir(parents=True)
    (shard,) = write_tar(folder, [{"text": f"row {i}"} for i in range(count)])
    shard.rename(folder / "s-00.tar")
    (other,) = write_tar(folder, [{"text": "validation"}])
    other.rename(folder / "s-01.tar")
    (folder / ".nv-meta/split.yaml").write_text(
        "exclude: []\nsplit_parts:\n  train: ['s-{00..00}.tar']\n  val: [s-01.tar]\n"
    )
    (folder / ".nv-meta/.info.json").write_text(json.dumps({"shard_counts": {"s-00.tar": count, "s-01.tar": 1}}))


def metadataset(path: Path, train: str) -> Words:
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
    path.write_text(head + train)
    return ["energon", str(path)]


def energon_blend(data: Path) -> Words:
    prepared(data / "coco", 20)
    prepared(data / "charts", 10)
    blend = "    blend:\n    - {weight: 5, path: ./coco, subflavors: {a: b}}\n    - {weight: 2, path: ./charts}\n"
    return metadataset(data / "m.yaml", blend)


def energon_nested(data: Path) -> Words:
    energon_blend(data)
    prepared(data / "text", 10)
    return metadataset(
        data / "outer.yaml", "    blend:\n    - {weight: 3, path: m.yaml}\n    - {weight: 7, path: text}\n"
    )


def energon_epochized(data: Path) -> Words:
    prepared(data / "coco", 20)
    prepared(data / "charts", 10)
    blend = "    blend_epochized:\n    - {repetitions: 2, path: coco}\n    - {repetitions: 6, path: charts}\n"
    return metadataset(data / "m.yaml", blend)


# Source → the words of the command, the proportions, and what the weights count.
CASES: dict[Callable[[Path], Words], tuple[dict[str, float], str]] = {
    megatron_words: ({"web": 0.3, "code": 0.7}, "packed sequences"),
    megatron_twice: ({"web": 0.3, "code": 0.7}, "packed sequences"),
    megatron_file: ({"web": 0.3, "code": 0.7}, "packed sequences"),
    megatron_json: ({"web": 0.3, "code": 0.7}, "packed sequences"),
    megatron_by_size: ({"web": 1 / 3, "code": 1 / 6, "more": 1 / 2}, "packed sequences"),
    huggingface: ({"web": 0.8, "code": 0.2}, "samples"),
    huggingface_in_turn: ({"web": 0.5, "code": 0.5}, "samples"),
    mosaic_proportions: ({"web": 0.7, "code": 0.3}, "samples"),
    mosaic_repeat: ({"web": 0.4, "code": 0.6}, "samples"),
    mosaic_folders: ({"web": 2 / 3, "code": 1 / 3}, "samples"),
    energon_blend: ({"coco": 5 / 7, "charts": 2 / 7}, "samples"),
    energon_nested: ({"coco": 1.5 / 7, "charts": 0.6 / 7, "text": 0.7}, "samples"),
    energon_epochized: ({"coco": 0.4, "charts": 0.6}, "samples"),
}
SMALL = ["plan.steps=10", "dataplane.global_batch_size=10", "dataplane.seq_len=4", "dataplane.chunk_steps=2"]


@pytest.mark.parametrize("source", CASES, ids=lambda source: source.__name__)
def test_the_plan_has_the_proportions_of_the_source(
    source: Callable[[Path], Words],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, counts = CASES[source]
    (tmp_path / "data").mkdir()
    words = source(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", *words, "--out", "conf/experiment/blend.yaml"]) == 0
    output = capsys.readouterr().out
    assert f"weights count {counts}" in output

    # The printed commands are run as they are; the plan lists a hundred sequences or samples.
    commands = [shlex.split(line) for line in output.split("Next:\n")[1].splitlines()]
    assert [words[:2] for words in commands[1:]] == [["mixtera-hpc", "index"], ["mixtera-hpc", "plan"]]
    monkeypatch.setenv("MIXTERA_CONF", commands[0][1].removeprefix("MIXTERA_CONF="))
    assert main(commands[1][1:]) == 0
    assert main(["query", *commands[2][2:], "--json"]) == 0
    domains = json.loads(capsys.readouterr().out.splitlines()[-1])["domains"]
    assert {d["key"]["dataset"]: d["weight"] for d in domains} == pytest.approx(expected)

    assert main([*commands[2][1:], "--json", *SMALL]) == 0
    served = [json.loads(line)["domain_id"] for line in capsys.readouterr().out.splitlines()]
    assert len(served) == 100
    for number, domain in enumerate(domains):
        assert abs(served.count(number) - 100 * expected[domain["key"]["dataset"]]) < 1


def no_such_prefix(data: Path) -> Words:
    return ["megatron", "1", f"{data}/nothing"]


def weight_without_source(data: Path) -> Words:
    return [*megatron_words(data)[:3], "70"]


def weight_zero(data: Path) -> Words:
    return ["megatron", "0", *megatron_words(data)[2:]]


def broken_json(data: Path) -> Words:
    (data / "blend.json").write_text("{")
    return ["megatron", f"{data}/blend.json"]


def json_without_train(data: Path) -> Words:
    (data / "blend.json").write_text('{"valid": ["p"]}')
    return ["megatron", f"{data}/blend.json"]


def no_saved_folder(data: Path) -> Words:
    return ["huggingface", str(data)]


def splits_of_a_dict(data: Path) -> Words:
    (data / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return ["huggingface", str(data)]


def saved_with_indices(data: Path) -> Words:
    saved_folder(data / "web", "text")
    (data / "web/state.json").write_text('{"_indices_files": [{"filename": "i.arrow"}]}')
    return ["huggingface", f"{data}/web"]


def incomplete_folder(data: Path) -> Words:
    saved_folder(data / "web", "text")
    (data / "web/data-00000-of-00001.arrow").unlink()
    return ["huggingface", f"{data}/web"]


def two_columns_of_text(data: Path) -> Words:
    saved_folder(data / "web", "text")
    features = {name: {"dtype": "string"} for name in ("question", "answer")}
    (data / "web/dataset_info.json").write_text(json.dumps({"features": features}))
    return ["huggingface", f"{data}/web"]


def no_streams(data: Path) -> Words:
    (data / "s.yaml").write_text("model: gpt\n")
    return ["mosaic", f"{data}/s.yaml"]


def remote_stream(data: Path) -> Words:
    (data / "s.yaml").write_text("streams: {web: {remote: 's3://bucket/web', local: /nowhere}}\n")
    return ["mosaic", f"{data}/s.yaml"]


def mixed_streams(data: Path) -> Words:
    mds_folders(data)
    streams = f"web: {{local: {data}/web, proportion: 0.5}}, code: {{local: {data}/code, repeat: 2}}"
    (data / "s.yaml").write_text(f"streams: {{{streams}}}\n")
    return ["mosaic", f"{data}/s.yaml"]


def no_mds_folder(data: Path) -> Words:
    return ["mosaic", str(data)]


def no_metadataset(data: Path) -> Words:
    (data / "m.yaml").write_text("a: b\n")
    return ["energon", f"{data}/m.yaml"]


def joined(data: Path) -> Words:
    return metadataset(data / "m.yaml", "    join: {a: {path: x}}\n")


def not_prepared(data: Path) -> Words:
    return metadataset(data / "m.yaml", "    path: coco\n")


def unknown_part(data: Path) -> Words:
    prepared(data / "coco", 3)
    return metadataset(data / "m.yaml", "    path: coco\n    split_part: dev\n")


def without_counts(data: Path) -> Words:
    words = energon_epochized(data)
    (data / "coco/.nv-meta/.info.json").unlink()
    return words


def excluded_sample(data: Path) -> Words:
    words = energon_blend(data)
    path = data / "coco/.nv-meta/split.yaml"
    path.write_text(path.read_text().replace("exclude: []", "exclude: [s-00.tar/0001]"))
    return words


def unknown_key(data: Path) -> Words:
    return [*megatron_words(data), "dataplane.sequence_length=3"]


REFUSED: dict[Callable[[Path], Words], str] = {
    no_such_prefix: "nothing.bin does not exist. A prefix of Megatron's --data-path names",
    weight_without_source: "not every source has a weight",
    weight_zero: "but must be a number above 0",
    broken_json: "blend.json is not valid JSON",
    json_without_train: "has no list of weights and prefixes under 'train'",
    no_saved_folder: "has no state.json, so it is no folder of save_to_disk",
    splits_of_a_dict: "with the splits train, test.\n  Name the folder of one split, e.g.",
    saved_with_indices: "Call flatten_indices() before save_to_disk",
    incomplete_folder: "data-00000-of-00001.arrow of state.json is missing",
    two_columns_of_text: "add data.sets.web.text=question to the command",
    no_streams: "has no streams.\n  Give a YAML file",
    remote_stream: "remote='s3://bucket/web', and none of them is a folder here",
    mixed_streams: "has streams with proportion and others with repeat",
    no_mds_folder: "is not the index of a folder of MDS shards",
    no_metadataset: "is not a metadataset of Energon",
    joined: "join has no counterpart here",
    not_prepared: "Give a data set that energon prepare has prepared",
    unknown_part: "has no split part 'dev'; it has train, val",
    without_counts: "has no shard_counts of all its shards",
    excluded_sample: "excludes single samples, for example 's-00.tar/0001'",
    unknown_key: "dataplane.sequence_length is not a known key. Did you mean 'seq_len'?",
}


@pytest.mark.parametrize("source", REFUSED, ids=lambda source: source.__name__)
def test_a_source_that_cannot_be_used_is_refused(
    source: Callable[[Path], Words], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "conf/experiment/blend.yaml"
    assert main(["migrate", *source(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert REFUSED[source] in error and "Traceback" not in error
    assert "\n  " in error or "Did you mean" in error
    assert not out.exists()


def test_the_document_is_the_column_that_the_command_names(tmp_path: Path) -> None:
    words = two_columns_of_text(tmp_path)
    out = tmp_path / "conf/experiment/blend.yaml"
    assert main(["migrate", *words, "data.sets.web.text=answer", "--out", str(out)]) == 0
    assert "text: answer" in out.read_text()


@pytest.mark.parametrize("out", ["blend.yaml", "experiment/blend.txt"])
def test_an_experiment_has_its_folder(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = megatron_words(tmp_path)
    assert main(["migrate", *words, "--out", str(tmp_path / out)]) == 2
    assert "For example --out my_conf/experiment/blend.yaml" in capsys.readouterr().err


def test_an_experiment_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*megatron_words(tmp_path), "--out", str(tmp_path / "experiment/blend.yaml")]
    assert main(["migrate", *words]) == 0
    assert main(["migrate", *words]) == 2
    assert "which exists" in capsys.readouterr().err
