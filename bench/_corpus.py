"""Reproducible corpora made of the Python installation's own source code; nothing is downloaded.

Rows have the shape of SlimPajama: `{"text": …, "meta": {"redpajama_set_name": …}}`. Document lengths are log-normal,
and a row has 1.1 kB on average. Sources occur in SlimPajama's proportions, in random order. Texts are cut from 64 MB of
source code, so a corpus of 1.1 GB contains every byte several times. That does not favor any system: all read the same
rows.
"""

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import zstandard

from bench._results import OUT
from mixtera_hpc.tokens.bpe_training import train_bpe

__all__ = [
    "FOLDER",
    "SHARES",
    "make_number_rows",
    "make_once",
    "make_rows",
    "make_tokenizer",
    "shard_rows",
    "source_text",
    "zst_frames",
]

FOLDER = OUT / "corpus"
ROWS_PER_SHARD = 100_000

MEAN_CHARACTERS = 1000
LOG_SIGMA = 0.8
"""Standard deviation of the logarithm of document lengths."""

SHARES = {
    "RedPajamaCommonCrawl": 0.522,
    "RedPajamaC4": 0.267,
    "RedPajamaGithub": 0.052,
    "RedPajamaBook": 0.042,
    "RedPajamaArXiv": 0.046,
    "RedPajamaWikipedia": 0.038,
    "RedPajamaStackExchange": 0.033,
}
"""Proportions of SlimPajama's sources."""


@cache
def source_text() -> str:
    """Return the source code of the standard library and installed packages, up to about 64 MB."""
    texts = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        size += len(text)
        if size > 64 << 20:
            break
    return "\n".join(texts)


def make_rows(num_rows: int, folder: Path = FOLDER) -> Path:
    """Return a folder of JSONL shards with `num_rows` rows; write it unless it exists."""

    def write(partial: Path) -> None:
        for number, start in enumerate(range(0, num_rows, ROWS_PER_SHARD)):
            rows = shard_rows(number, min(ROWS_PER_SHARD, num_rows - start))
            (partial / f"shard-{number:05d}.jsonl").write_bytes(b"".join(rows))

    return make_once(folder / f"rows-{num_rows}", write)


def make_number_rows(num_rows: int, folder: Path = FOLDER) -> Path:
    """Return a folder with one JSONL shard of tiny rows with two numbers; write it unless it exists.

    `day` grows along the shard, so that few blocks hold a range of days. `quality` is independent of the position.
    """

    def write(partial: Path) -> None:
        with (partial / "shard.jsonl").open("wb") as file:
            for start in range(0, num_rows, ROWS_PER_SHARD):
                file.write(_number_rows(start, min(ROWS_PER_SHARD, num_rows - start), num_rows))

    return make_once(folder / f"numbers-{num_rows}", write)


def _number_rows(start: int, count: int, num_rows: int) -> bytes:
    random = np.random.Generator(np.random.Philox(start))
    quality = np.round(random.random(count), 4).tolist()
    # Days of ten years, with up to two weeks of disorder.
    days = (np.arange(start, start + count) * 3650 // num_rows + random.integers(0, 14, count)).tolist()
    source = random.integers(0, 7, count).tolist()
    lines = [
        f'{{"text":"a","s":"{s}","day":{d},"quality":{q}}}\n' for s, d, q in zip(source, days, quality, strict=True)
    ]
    return "".join(lines).encode()


def make_tokenizer(vocab_size: int = 32_768, folder: Path = FOLDER) -> Path:
    """Return a byte-level BPE tokenizer trained on a quarter of the text; train it unless it exists."""
    target = folder / f"tokenizer-{vocab_size}.json"
    if not target.exists():
        text = source_text()
        train_bpe((text[start : start + 4000] for start in range(0, len(text), 16_000)), vocab_size, target)
    return target


def make_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder `target`. Unless it exists, `write` fills another folder, which is then renamed."""
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.part")
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.rename(target)
    return target


def zst_frames(lines: Sequence[bytes], frame_rows: int) -> bytes:
    """Compress lines in frames of `frame_rows` lines."""
    compress = zstandard.ZstdCompressor().compress
    return b"".join(compress(b"".join(lines[i : i + frame_rows])) for i in range(0, len(lines), frame_rows))


def shard_rows(number: int, num_rows: int, *, parts: bool = False) -> Iterator[bytes]:
    """Yield the lines of one shard.

    Args:
        number: of the shard; it is the seed.
        num_rows: number of lines.
        parts: whether `meta.part` holds three random digits, for mixtures of more domains.
    """
    text = source_text()
    random = np.random.Generator(np.random.Philox(number))

    # A log-normal variable has the mean exp(mu + sigma² / 2).
    mu = np.log(MEAN_CHARACTERS) - LOG_SIGMA**2 / 2
    length = np.clip(random.lognormal(mu, LOG_SIGMA, num_rows), 20, 200_000).astype(np.int64)
    start = random.integers(0, len(text) - length)
    names = list(SHARES)
    shares = np.array(list(SHARES.values()))
    source = random.choice(len(names), num_rows, p=shares / shares.sum())
    part = random.integers(0, 1000, num_rows)

    encode = msgspec.json.Encoder().encode
    columns = zip(start.tolist(), length.tolist(), source.tolist(), part.tolist(), strict=True)
    for first, size, name, digits in columns:
        meta = {"redpajama_set_name": names[name]}
        if parts:
            meta["part"] = f"{digits:03d}"
        yield encode({"text": text[first : first + size], "meta": meta}) + b"\n"
