"""Conversations as documents: the same tokens at the build and when served, the loss mask, and what is refused."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.convert import from_plain, to_plain
from mixtera_hpc.config.schema import Config
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import ConfigError, DataError, PropertyIndexError
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.build.derive import derive_properties
from mixtera_hpc.index.build.refresh import refresh_index
from mixtera_hpc.index.read.configured import open_configured
from mixtera_hpc.index.read.duplicates import find_duplicates
from mixtera_hpc.index.read.open import open_index
from mixtera_hpc.index.read.verify import deeply_changed_shards
from mixtera_hpc.testing.chats import CHATS, FORGETFUL, TEMPLATES, share_form, split_marks, write_tokenizer
from mixtera_hpc.tokens.chat_template import Conversation
from mixtera_hpc.tokens.tokenizer import EncodingSettings, load_tokenizer, load_vocabulary

ALL_CHATS = CHATS * 5
FORMATS = ["jsonl", "jsonl.gz", "json", "parquet", "arrow", "tar"]
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"a.{suffix}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    elif suffix == "arrow":
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), path, compression="uncompressed")
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "tar":
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(rows):
                member = tarfile.TarInfo(f"{number:03}.json")
                content = json.dumps(row).encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    return path


def configured(root: Path, template: str | None = "chatml_marked", **more: Any) -> Config:
    """Return a configuration; `template` is the name of a template, or one."""
    tokenizer = write_tokenizer(root / "tokenizer", TEMPLATES.get(template or "", template))
    data = {"root": str(root / "data"), "include": ["*"], "text": "chat:messages"} | more.pop("data", {})
    plane = {"tokenizer": str(tokenizer), "seq_len": 32, "global_batch_size": 6, "audit": True, "workers": 0}
    plane |= more.pop("dataplane", {})
    return from_plain(Config, {"data": data, "index": {"path": f"{root}/i.h5"}, "dataplane": plane} | more)


def expected_stream(config: Config, chats: list[list[dict[str, Any]]]) -> tuple[list[int], list[bool]]:
    """Return the tokens of all chats in order, and which of them are trained."""
    tokenizer = load_tokenizer(config.dataplane.tokenizer or "", EncodingSettings.of(config.dataplane))
    assert tokenizer.chat is not None
    texts = [tokenizer.chat.render(Conversation(messages=chat)) for chat in chats]
    tokens, trained = split_marks(np.concatenate(tokenizer.encode_each(texts)))
    return tokens.tolist(), trained.tolist()


def served_stream(config: Config, **options: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens and loss masks of all sequences of an epoch; the mask begins at token 1."""
    config = replace(config, mixture=replace(config.mixture, max_epochs=1, on_exhausted="stop"))
    tokens: list[int] = []
    mask: list[bool] = []
    with DataPlane.open(config, Local(), **options) as plane:
        for batch in plane:
            overlap = int(config.dataplane.overlap_one_token)
            for row, counted in zip(batch.tokens, batch.loss_mask, strict=True):
                tokens += row[: len(row) - overlap].tolist()
                mask += counted.tolist()
    return tokens, mask


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("form", ["messages", pytest.param("conversations", marks=pytest.mark.full)])
def test_a_run_is_proven_and_serves_the_rendered_tokens_with_the_prompts_masked(
    suffix: str, form: str, tmp_path: Path, prove_run: Callable[[Config], int]
) -> None:
    path = f"json.{form}" if suffix == "tar" else form
    rows = [{form: chat if form == "messages" else share_form(chat), "id": i} for i, chat in enumerate(ALL_CHATS)]
    write_rows(tmp_path / "data", suffix, rows)
    config = configured(
        tmp_path, data={"text": f"chat:{path}", "include": [f"*.{suffix}"]}, dataplane={"shuffle": "none"}
    )

    tokens, trained = expected_stream(config, ALL_CHATS)
    assert build_index(config).tokens == len(tokens)
    served, mask = served_stream(config)
    # The chats are packed without any token in between, and sequences begin and end inside of them.
    assert served == tokens[: len(served)]
    assert len(served) > len(tokens) - 7 * 32
    # Token 0 of a chat belongs to its prompt, so the border of documents masks nothing more.
    assert mask == trained[1 : len(mask) + 1]

    assert prove_run(replace(config, dataplane=replace(config.dataplane, shuffle="window"))) == 54
    with open_configured(config) as index:
        assert deeply_changed_shards(index, load_vocabulary(config.dataplane), Local()) == []
        assert deeply_changed_shards(index, None, Local()) == []
        assert find_duplicates(index, Local()).duplicates == len(ALL_CHATS) - len(CHATS)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_tokens_are_trained_if_wanted(workers: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "data", "jsonl", [{"messages": chat} for chat in ALL_CHATS])
    plane = {"chat_loss": "all", "shuffle": "none", "predict_across_documents": True, "workers": workers}
    # A template that cannot be trained on answers alone.
    config = configured(tmp_path, FORGETFUL, dataplane=plane)
    build_index(config)
    served, mask = served_stream(config)
    assert served == expected_stream(config, ALL_CHATS)[0][: len(served)]
    assert all(mask)


def test_only_texts_get_the_special_tokens_of_documents(tmp_path: Path) -> None:
    texts = ["Two moons.", "don't", "And"]
    write_rows(tmp_path / "chats", "parquet", [{"messages": chat} for chat in ALL_CHATS])
    write_rows(tmp_path / "web", "jsonl", [{"text": text} for text in texts])
    sets = {
        "chats": {"root": f"{tmp_path}/chats", "text": "chat:messages"},
        "web": {"root": f"{tmp_path}/web", "text": "text"},
    }
    plane = {"add_bos": True, "shuffle": "none", "seq_len": 4, "global_batch_size": 1}
    config = configured(tmp_path, data={"sets": sets, "text": "text", "root": ""}, dataplane=plane)
    build_index(config)
    chats, trained = expected_stream(config, ALL_CHATS)
    tokenizer = load_tokenizer(config.dataplane.tokenizer or "")
    web = [token for text in tokenizer.encode_each(texts) for token in [1, *text.tolist(), 2]]
    mask = [bool(i) for text in tokenizer.encode_each(texts) for i in [0, *range(1, len(text) + 2)]]

    served, counted = served_stream(config)
    expected = chats + web
    assert served == expected[: len(served)] and len(served) > len(chats)
    assert counted == (trained + mask)[1 : len(counted) + 1]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "is null, but must be a list of messages"),
        ("hi", "is str, but must be a list of messages"),
        ([], "is an empty conversation"),
        (["hi"], "message 0 is str, but must be an object"),
        ([USER, {"role": "critic", "content": "no"}], "message 1 has the unknown role 'critic'; known are system"),
        ([{"from": "bot", "value": "x"}], "message 0 is from the unknown 'bot'; known are system, human"),
        ([{"from": "human"}, ANSWER], "message 0 has no value"),
        ([{"role": "user"}, ANSWER], "message 0 has no content"),
        ([USER, {"role": "assistant", "content": 3}], "the content of message 1 is int, but must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "message 0 has a part of the type 'image'"),
        ([USER, {"role": "tool", "content": "2"}, ANSWER], "the chat template fails: Only user and assistant"),
        ([USER], "the conversation has no answer of the assistant"),
        ([{"role": "user", "content": "a </s> b"}, ANSWER], "message 0 has the text '</s>' of a special token"),
    ],
)
def test_a_wrong_conversation_is_a_bad_row_in_every_format(messages: Any, problem: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS]
    rows.insert(2, {"messages": messages})
    # Parquet and Arrow have one type per column, which some of these mistakes do not fit.
    for suffix in ["jsonl", "jsonl.gz", "json", "parquet", "tar"]:
        root = tmp_path / suffix
        try:
            write_rows(root / "data", suffix, rows)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            continue
        text = "chat:json.messages" if suffix == "tar" else "chat:messages"
        data = {"text": text, "include": [f"*.{suffix}"]}
        config = configured(root, "inst_marked", data=data)
        with pytest.raises(DataError, match="1 unreadable row") as caught:
            build_index(config)
        assert any("row=2" in note and problem in note for note in caught.value.__notes__)
        assert caught.value.exit_code == 2
        report = build_index(configured(root, "inst_marked", data=data | {"on_bad_sample": "skip"}))
        assert (report.samples, report.bad_rows) == (4, 1)
        with open_index(root / "i.h5") as index:
            assert problem[:20] in index.bad[0].reason


def test_texts_of_special_tokens_become_tokens_if_allowed(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", "jsonl", [{"messages": [{"role": "user", "content": "a </s> b"}, ANSWER]}])
    config = configured(tmp_path, dataplane={"special_tokens_in_text": "allow"})
    build_index(config)
    assert expected_stream(config, [[{"role": "user", "content": "a </s> b"}, ANSWER]])[0].count(2) == 1


def test_a_message_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    chat = [{"role": "developer", "content": "be kind"}, USER, ANSWER]
    write_rows(tmp_path / "data", "jsonl", [{"messages": chat}])
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError) as caught:
        build_index(configured(tmp_path, template))
    assert any("leaves out message 0 of the role 'developer'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, r"does not say which text is the assistant's: .* to message 1.*\n.*\{% generation %\}"),
        (None, r"no chat template is beside dataplane.tokenizer\.\n.*chat_template"),
        ("{% for %}", r"The chat template of dataplane.tokenizer is not valid: line 1"),
        ("{{ strftime_now('%d') }}", r"asks for today's date \(strftime_now\)"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str | None, message: str, tmp_path: Path) -> None:
    chat = [USER, {"role": "assistant", "content": "a"}, USER, ANSWER]
    # Bad rows are skipped, but this is no matter of the rows.
    write_rows(tmp_path / "data", "jsonl", [{"messages": chat}])
    skip = {"on_bad_sample": "skip"}
    with pytest.raises(ConfigError, match=message):
        build_index(configured(tmp_path, template, data=skip))


def test_another_template_is_refused_by_every_reader_that_renders(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", "jsonl", [{"messages": chat} for chat in CHATS])
    config = configured(tmp_path)
    first = build_index(config).fingerprint
    (tmp_path / "tokenizer/chat_template.jinja").write_text(TEMPLATES["inst"])
    with pytest.raises(PropertyIndexError, match=r"were rendered with the chat template \w{12}, but .* is \w{12} now"):
        DataPlane.open(config, Local())
    with pytest.raises(PropertyIndexError, match=r"data.text: chat:messages template:\w+ in the index"):
        refresh_index(config)
    function = {"length": {"function": "text_sizes.sizes", "kind": "number"}}
    (tmp_path / "text_sizes.py").write_text("def sizes(texts): return [len(text) for text in texts]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(PropertyIndexError, match="were rendered with the chat template"):
            derive_properties(configured_again(config, properties=function))
        (tmp_path / "tokenizer/chat_template.jinja").unlink()
        derive_properties(configured_again(config, properties=function))
        derived = open_index(tmp_path / "i.h5")
        with derived:
            numbers = derived.read_block(0).numbers["length"]
        tokenizer = load_tokenizer(config.dataplane.tokenizer or "")
        assert tokenizer.chat is not None
        assert numbers.tolist() == [len(tokenizer.chat.render(Conversation(messages=chat))) for chat in CHATS]
    (tmp_path / "tokenizer/chat_template.jinja").write_text(TEMPLATES["inst"])
    assert build_index(config).fingerprint != first


def configured_again(config: Config, **data: Any) -> Config:
    plain = to_plain(config)
    plain["data"] |= data
    return from_plain(Config, plain)


def test_samples_of_chats_stay_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "data", "jsonl", [{"messages": chat} for chat in ALL_CHATS])
    config = configured(tmp_path, None, dataplane={"tokenizer": None, "shuffle": "none"}, mixture={"unit": "samples"})
    build_index(config)
    with DataPlane.open(config, Local()) as plane:
        batch = next(iter(plane))
    assert batch.payloads is not None and batch.payloads[0] == {"messages": CHATS[0]}
