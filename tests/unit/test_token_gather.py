"""Batches from shards that hold token ids, against a document-by-document reference."""

import contextlib
import errno
import json
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.chunk_plan import PlannerState
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import BatchSlice
from mixtera_hpc.dataplane.reading.document_reader import DocumentReader
from mixtera_hpc.dataplane.reading.source import Source, open_source
from mixtera_hpc.dataplane.reading.step_sequences import slots_of_plan
from mixtera_hpc.dataplane.reading.stored import document_places, mapped_files, token_gather
from mixtera_hpc.dataplane.reading.stored.mapped_files import MappedFiles
from mixtera_hpc.dataplane.watchdog.progress import ReadPlace
from mixtera_hpc.errors import DataError
from mixtera_hpc.formats.base import BlockRef
from mixtera_hpc.formats.codecs.megatron_index import read_token_layout
from mixtera_hpc.formats.readers.megatron import MegatronFormat, MegatronReader
from mixtera_hpc.index.build.build import build_index
from mixtera_hpc.index.token_store.store_job import write_store
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.tokens.bpe_training import train_bpe

EOS = 0
BOS = 1
TYPES = ["<u2", "<i4", "<u2"]


def write_documents(folder: Path, seed: int, dtype: str, count: int = 60) -> None:
    """Write documents with and without special tokens at their borders, and empty ones."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(seed))
    documents = []
    for i in range(count):
        ids = random.integers(2, 250, int(random.integers(0, 90))).tolist()
        begin = [BOS] if random.random() < 0.5 else []
        end = [EOS] if random.random() < 0.7 else []
        documents.append([*begin, *ids, *end] if i % 13 else [EOS])
    write_megatron(folder / "a.bin", [*documents, [], [EOS]], dtype)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tokenizer whose documents may begin with the token 1 and end with the token 0."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["some text"], 300, folder / "tokenizer.json", ["<s>"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    return folder


@pytest.fixture
def overrides(tmp_path: Path, tokenizer: Path) -> list[str]:
    """Return the overrides for three domains, stored as integers of different types."""
    for number, dtype in enumerate(TYPES):
        write_documents(tmp_path / f"data/{number}", number, dtype)
    return [
        f"data.root={tmp_path / 'data'}",
        f"index.path={tmp_path / 'i.h5'}",
        "index.block_rows=16",
        "data.properties.source=__parent__",
        "mixture=natural",
        "mixture.group_by=[source]",
        "mixture.max_epochs=2",
        "mixture.on_exhausted=stop",
        f"dataplane.tokenizer={tokenizer}",
        "dataplane.seq_len=29",
        "dataplane.global_batch_size=6",
        "dataplane.chunk_steps=2",
        "dataplane.last_batch=pad",
        "dataplane.window_bytes=2000",
    ]


def reference_document(source: Source, block: int, row: int) -> list[int]:
    """Read one document by itself, and give it the special tokens of the configuration."""
    blocks = source.blocks
    path = Path(source.index.data_root) / source.index.shard_paths[int(blocks.shard[block])]
    (ids,) = MegatronReader(path).tokens(BlockRef.of(blocks, block), np.array([row]))
    tokens = ids.tolist()
    tokenizer = source.tokenizer
    assert tokenizer is not None
    if tokens[-1:] == [EOS]:
        tokens = tokens[:-1]
    if tuple(tokens[:1]) == tokenizer.bos_ids:
        tokens = tokens[1:]
    return [*tokenizer.added.before, *tokens, *tokenizer.added.after]


def reference_rows(source: Source) -> Iterator[tuple[list[int], list[int], list[bool]]]:
    """Yield tokens, document ids and loss mask of every sequence, in the order of the plans."""
    streams = source.streams()
    across = source.config.dataplane.predict_across_documents
    state = PlannerState.start(source.num_domains)
    last = False
    while not last:
        plan, state = source.planner.plan(state, source.weights)
        last = plan.last
        slots = slots_of_plan(source, plan)
        sequences = source.lanes.sequence(slots.domain, slots.ordinal)
        for domain, sequence in zip(slots.domain.tolist(), sequences.tolist(), strict=True):
            documents = streams.documents(domain, *source.span(domain, sequence, 1))
            tokens: list[int] = []
            numbers: list[int] = []
            counted: list[bool] = []
            for number, (block, row, first, stop) in enumerate(
                zip(documents.block, documents.row, documents.first, documents.last, strict=True)
            ):
                part = reference_document(source, int(block), int(row))[int(first) : int(stop)]
                tokens += part
                numbers += [number] * len(part)
                counted += [first > 0 or across] + [True] * (len(part) - 1)
            yield tokens, numbers, counted[1:]


def served_rows(config: Any) -> list[tuple[list[int], list[int], list[bool]]]:
    """Return the same of all batches of a run, without padding."""
    rows = []
    with DataPlane.open(config, comm=Local()) as plane:
        for batch in plane:
            assert not batch.tokens[batch.is_padding].any()
            assert not batch.loss_mask[batch.is_padding].any()
            for row in np.flatnonzero(~batch.is_padding):
                arrays: list[NDArray[Any]] = [batch.tokens[row], batch.document_ids[row], batch.loss_mask[row]]
                rows.append((arrays[0].tolist(), arrays[1].tolist(), arrays[2].tolist()))
    return rows


@pytest.mark.parametrize(
    "change",
    [
        [],
        ["dataplane.add_bos=true"],
        ["dataplane.add_eos=false"],
        ["dataplane.add_bos=true", "dataplane.add_eos=false"],
        ["dataplane.overlap_one_token=false", "dataplane.shuffle=block"],
        ["dataplane.predict_across_documents=true", "dataplane.shuffle=none"],
    ],
)
def test_the_batches_are_those_of_single_documents(change: list[str], overrides: list[str]) -> None:
    config = compose([*overrides, *change])
    build_index(config)
    rows = served_rows(config)
    assert len(rows) > 100
    assert rows == list(reference_rows(open_source(config, Local())))


@pytest.mark.parametrize("has_store", [False, True])
def test_text_and_stored_tokens_may_be_mixed(has_store: bool, overrides: list[str], tmp_path: Path) -> None:
    # The same texts beside shards of token ids, and alone; the name makes them the first domain of both.
    for folder in ("data/-text", "alone/-text"):
        (tmp_path / folder).mkdir(parents=True)
        lines = [json.dumps({"text": f"some text {i} " * (i % 9)}) + "\n" for i in range(50)]
        (tmp_path / folder / "a.jsonl").write_text("".join(lines))

    def rows_of_domain(root: str, index: str, domain: int) -> list[Any]:
        # With several lanes, the order inside a step would depend on the other domains.
        words = [f"data.root={tmp_path / root}", f"index.path={tmp_path / index}", "dataplane.lanes=1"]
        config = compose([*overrides, *words])
        build_index(config)
        if has_store and root == "data":
            config = compose([*overrides, *words, f"data.tokens={tmp_path / 'tokens'}"])
            write_store(config, Local())
            assert open_source(config, Local()).index.token_stores
        rows = []
        with DataPlane.open(config, comm=Local()) as plane:
            for batch in plane:
                for row in np.flatnonzero(batch.domain_ids == domain):
                    arrays: list[NDArray[Any]] = [batch.tokens[row], batch.document_ids[row], batch.loss_mask[row]]
                    rows.append([array.tolist() for array in arrays])
        return rows

    beside_tokens = rows_of_domain("data", "mixed.h5", 0)
    alone = rows_of_domain("alone", "alone.h5", 0)
    count = min(len(beside_tokens), len(alone))
    assert count > 50
    assert beside_tokens[:count] == alone[:count]
    # The shards of token ids give the same sequences as without texts beside them; their domains have other numbers.
    assert len(rows_of_domain("data", "mixed.h5", 1)) > 20


def limit_mapped_files(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the readers of this process keep at most `count` files mapped."""
    for module in (document_places, mapped_files, token_gather):
        monkeypatch.setattr(module, "MAX_MAPPED_FILES", count)


def test_the_batches_do_not_depend_on_how_many_files_can_be_mapped(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3, 20):
        write_documents(tmp_path / f"data/{number}", number, TYPES[number % 2], count=4)
    config = compose([*overrides, "mixture.group_by=[]", "mixture.max_epochs=1", "dataplane.workers=0"])
    build_index(config)
    expected = served_rows(config)
    limit_mapped_files(monkeypatch, 5)
    assert served_rows(config) == expected


def test_mapped_files_keep_no_descriptor(overrides: list[str], tmp_path: Path) -> None:
    """A rank may read the data held out beside the training data, both with more shards than files may be open."""
    for number in range(3, 90):
        write_documents(tmp_path / f"data/{number}", number, TYPES[number % 2], count=4)
    config = compose([*overrides, "mixture.group_by=[]"])
    build_index(config)
    source = open_source(config, Local())
    documents = source.streams().documents(0, 0, int(source.layout.epoch_items()[0]))
    sizes = [int(documents.wanted.sum())]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit counts numbers, not open files. Other tests may have left free numbers below used ones.
    num_open = 1 + max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard))
    try:
        with contextlib.closing(DocumentReader(source)) as first, contextlib.closing(DocumentReader(source)) as second:
            tokens = [np.zeros(sizes, np.uint32) for _ in range(2)]
            for reader, output in zip((first, second), tokens, strict=True):
                reader.prepare(documents, sizes).write(0, output)
            assert tokens[0].any()
            assert (tokens[0] == tokens[1]).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_places_are_kept_where_not_all_files_can_be_mapped(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3, 20):
        write_documents(tmp_path / f"data/{number}", number, TYPES[number % 2], count=4)
    config = compose([*overrides, "mixture.group_by=[]", "dataplane.add_bos=false"])
    build_index(config)
    source = open_source(config, Local())
    documents = source.streams().documents(0, 0, int(source.layout.epoch_items()[0]))
    sizes = [int(documents.wanted.sum())]
    mapped = []
    map_one = MappedFiles._map_one
    monkeypatch.setattr(MappedFiles, "_map_one", lambda *place: (mapped.append(place[1]), map_one(*place)))
    limit_mapped_files(monkeypatch, 5)
    counts = []
    with contextlib.closing(DocumentReader(source)) as reader:
        for _ in range(2):
            mapped.clear()
            reader.prepare(documents, sizes)
            counts.append(len(mapped))
    # The second read maps each file once, to copy its tokens.
    assert counts[1] <= 20 < counts[0]


@pytest.mark.parametrize("has_all_ends", [True, False])
@pytest.mark.parametrize("seq_len", [29, 6000])
def test_documents_that_follow_each_other_in_a_file_are_copied_together(
    seq_len: int, has_all_ends: bool, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.Generator(np.random.Philox(3))
    shards = [tmp_path / f"data/{domain}/{number:02}.bin" for domain in range(2) for number in range(12)]
    for shard in shards:
        documents = [[*random.integers(2, 250, int(random.integers(1, 90))).tolist(), EOS] for _ in range(9)]
        if not has_all_ends and shard == shards[5]:
            documents[4].pop()
        write_megatron(shard, documents, "<u2")
    words = [word for word in overrides if "dataplane.tokenizer=" not in word]
    words += ["dataplane.vocab_size=300", "dataplane.eos_id=0", f"dataplane.seq_len={seq_len}"]
    words += ["dataplane.shuffle=sequence", "data.include=[?/??.bin]"]
    config = compose([*words, "mixture.max_epochs=30", "dataplane.workers=0"])
    build_index(config)
    expected = list(reference_rows(open_source(config, Local())))
    assert max(max(numbers) for _, numbers, _ in expected) > 2

    num_copied = []
    locate = document_places.DocumentPlaces.locate
    counted = lambda *asked: (num_copied.append(len(asked[1].number)), locate(*asked))[1]  # noqa: E731
    monkeypatch.setattr(document_places.DocumentPlaces, "locate", counted)
    assert served_rows(config) == expected
    num_documents = sum(len(set(numbers)) for _, numbers, _ in expected)
    # The first read of a window finds the places of its documents.
    assert (sum(num_copied) < 0.9 * num_documents) == has_all_ends


def test_only_neighbours_in_a_store_are_copied_together(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train_bpe(["some text"], 300, tmp_path / "tokenizer.json")
    random = np.random.Generator(np.random.Philox(4))
    # A store sorts documents by all properties, a domain by the rows of its files.
    languages = np.repeat(random.integers(0, 2, 40), random.integers(1, 12, 40)).tolist()
    texts = [f"some text {number} " * int(random.integers(1, 5)) for number in range(200)]
    rows = [
        {"text": text, "kind": "ab"[number % 2], "language": f"{languages[number]}"}
        for number, text in enumerate(texts)
    ]
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.root={tmp_path / 'data'}", "data.properties={kind: kind, language: language}"]
    words += ["mixture=natural", "mixture.group_by=[kind]", "mixture.max_epochs=3", "dataplane.workers=0"]
    words += ["dataplane.add_eos=false", "dataplane.shuffle=sequence", "dataplane.seq_len=70"]
    words.append(f"dataplane.tokenizer={tmp_path / 'tokenizer.json'}")
    config = compose([*words, f"index.path={tmp_path / 'i.h5'}", "dataplane.global_batch_size=4"])
    build_index(config)
    expected = served_rows(config)
    stored = replace(config, data=replace(config.data, tokens=str(tmp_path / "tokens")))
    write_store(stored, Local())
    assert open_source(stored, Local()).index.token_stores
    assert len(expected) > 30
    assert served_rows(stored) == expected


def test_a_shard_that_was_replaced_is_refused(overrides: list[str], tmp_path: Path) -> None:
    config = compose(overrides)
    build_index(config)
    # Other documents, with the same number of them and the same size.
    shard = tmp_path / "data/0/a.bin"
    documents = np.array_split(np.fromfile(shard, "<u2"), 62)
    with DataPlane.open(config, comm=Local()) as plane, pytest.raises(DataError) as caught:
        write_megatron(shard, documents)
        list(plane)
    assert re.search(r"has changed since it was indexed: document \d+ lies elsewhere", str(caught.value))


def test_a_shard_is_named_while_it_is_opened(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(overrides)
    build_index(config)
    source = open_source(config, Local())
    paths = source.index.shard_paths
    named = []
    map_tokens = MegatronFormat.map_tokens

    def recorded(fmt: MegatronFormat, path: Path, *arguments: Any) -> NDArray[Any]:
        named.append((str(path.relative_to(source.index.data_root)), paths[place.now().shard]))
        return map_tokens(fmt, path, *arguments)

    monkeypatch.setattr(MegatronFormat, "map_tokens", recorded)
    place = ReadPlace()
    with contextlib.closing(BatchMaker(source, BatchSlice(group=0, num_groups=1), audit=False)) as maker:
        maker.write_place(place)
        plan, _ = source.planner.plan(PlannerState.start(source.num_domains), source.weights)
        next(maker.batches(plan, 0))
    assert named and all(path == shard for path, shard in named), named
    assert place.now().shard == -1


def test_a_shard_that_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_megatron(path, [[1, 2, 3], [4, 5]])
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"a\.bin cannot be opened: No such device"):
        MegatronFormat().map_tokens(path, np.array([0]), np.array([0]))


@pytest.mark.parametrize(
    ("code", "cure"), [(errno.EACCES, "Let the user of the job read the file"), (errno.ENOMEM, "vm.max_map_count")]
)
def test_an_idx_file_that_cannot_be_mapped_has_a_cure_for_the_reason(
    code: int, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_megatron(tmp_path / "a.bin", [[1, 2, 3]])

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(np, "memmap", fail)
    with pytest.raises(DataError, match=r"a\.idx cannot be opened") as caught:
        read_token_layout(tmp_path / "a.bin")
    assert cure in str(caught.value)


def test_samples_of_moved_documents_are_refused(tmp_path: Path) -> None:
    """An `.idx` file that cuts the same ids elsewhere is found at any document of a block, not only at the first."""
    path = tmp_path / "a.bin"
    write_megatron(path, [[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    size = path.stat().st_size
    itemsize = size // 9
    block = BlockRef(offset=0, length=size, first_row=0, rows=3)
    lengths = np.array([3, 2, 4]) * itemsize
    served = MegatronReader(path).payloads(block, lengths, np.array([0, 2]))
    assert [sample["tokens"].tolist() for sample in served] == [[1, 2, 3], [6, 7, 8, 9]]
    write_megatron(path, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    with pytest.raises(DataError, match="its documents have other lengths"):
        MegatronReader(path).payloads(block, lengths, np.array([0, 2]))


def test_a_damaged_document_of_the_window_is_refused_when_it_is_served(overrides: list[str], tmp_path: Path) -> None:
    """All documents of a window are located together, but only those that are served must be right."""
    words = [word for word in overrides if "dataplane.tokenizer=" not in word]
    words += ["mixture.group_by=[]", "dataplane.shuffle=none", "dataplane.vocab_size=300", "dataplane.eos_id=0"]
    config = compose(words)
    build_index(config)
    shard = tmp_path / "data/2/a.bin"
    os.truncate(shard, shard.stat().st_size - 2)

    source = open_source(config, Local(), check=False)
    documents = source.streams().documents(0, 0, int(source.layout.epoch_items()[0]))
    of_window = documents.select(np.flatnonzero(documents.window == documents.window[-1]))
    reader = DocumentReader(source)
    with contextlib.closing(reader):
        right = of_window.select(slice(0, -1))
        tokens = np.zeros(int(right.wanted.sum()), np.int64)
        reader.prepare(right, [len(tokens)]).write(0, tokens)
        assert tokens.any()
        with pytest.raises(DataError, match="documents lie outside the file"):
            reader.prepare(of_window, [int(of_window.wanted.sum())])
