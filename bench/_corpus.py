"""Corpora to measure on, made of the Python installation's own text: nothing is downloaded, the same bytes every time.

Shaped like SlimPajama: `{"text": …, "meta": {"redpajama_set_name": …}}`, documents of log-normal length, 1.1 kB a row on
average, sources in SlimPajama's shares, alternating row by row. Texts are cut out of the installation's sources, so every byte
comes back some dozen times in 1.1 GB; a peer and ours always read the same rows.
"""

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import numpy as np

from mixtera_hpc.tokens.bpe_training import train_bpe

__all__ = ["FOLDER", "make_number_rows", "make_rows", "make_tokenizer", "source_text"]

FOLDER = Path(__file__).resolve().parent / "out" / "corpus"
ROWS_PER_SHARD = 100_000
MEAN_CHARACTERS, SIGMA = 1000, 0.8
SHARES = {
    "RedPajamaCommonCrawl": 0.522,
    "RedPajamaC4": 0.267,
    "RedPajamaGithub": 0.052,
    "RedPajamaBook": 0.042,
    "RedPajamaArXiv": 0.046,
    "RedPajamaWikipedia": 0.038,
    "RedPajamaStackExchange": 0.033,
}


@cache
def source_text() -> str:
    """The sources of the standard library and what is installed beside it, up to 64 MB."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts.append(text)
        size += len(text)
        if size > 64 << 20:
            break
    return "\n".join(texts)


def make_rows(num_rows: int, folder: Path = FOLDER) -> Path:
    """A folder with `num_rows` rows in shards of JSONL; made once, kept."""
    target = folder / f"rows-{num_rows}"
    if target.is_dir():
        return target
    part = target.with_name(f".{target.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_SHARD)):
        rows = _shard(number, min(ROWS_PER_SHARD, num_rows - start))
        (part / f"shard-{number:05d}.jsonl").write_bytes(b"".join(rows))
    return part.rename(target)


def make_number_rows(num_rows: int, folder: Path = FOLDER) -> Path:
    """One JSONL shard of `num_rows` tiny rows with two numbers: `day` grows along the shard, `quality` is anywhere."""
    target = folder / f"numbers-{num_rows}"
    if target.is_dir():
        return target
    part = target.with_name(f".{target.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    with (part / "shard.jsonl").open("wb") as file:
        for start in range(0, num_rows, ROWS_PER_SHARD):
            count = min(ROWS_PER_SHARD, num_rows - start)
            random = np.random.Generator(np.random.Philox(start))
            quality = np.round(random.random(count), 4).tolist()
            days = (np.arange(start, start + count) * 3650 // num_rows + random.integers(0, 14, count)).tolist()
            source = random.integers(0, 7, count).tolist()
            lines = [
                f'{{"text":"a","s":"{s}","day":{d},"quality":{q}}}\n'
                for s, d, q in zip(source, days, quality, strict=True)
            ]
            file.write("".join(lines).encode())
    return part.rename(target)


def make_tokenizer(vocab_size: int = 32_768, folder: Path = FOLDER) -> Path:
    """A byte-level BPE trained on some of the text."""
    target = folder / f"tokenizer-{vocab_size}.json"
    if not target.exists():
        text = source_text()
        train_bpe((text[i : i + 4000] for i in range(0, len(text), 16_000)), vocab_size, target)
    return target


def _shard(number: int, num_rows: int) -> Iterator[bytes]:
    text = source_text()
    random = np.random.Generator(np.random.Philox(number))
    mean = np.log(MEAN_CHARACTERS) - SIGMA**2 / 2
    length = np.clip(random.lognormal(mean, SIGMA, num_rows), 20, 200_000).astype(np.int64)
    start = random.integers(0, len(text) - length)
    names = list(SHARES)
    weights = np.array(list(SHARES.values()))
    source = random.choice(len(names), num_rows, p=weights / weights.sum())
    encode = msgspec.json.Encoder().encode
    for a, n, s in zip(start.tolist(), length.tolist(), source.tolist(), strict=True):
        yield encode({"text": text[a : a + n], "meta": {"redpajama_set_name": names[s]}}) + b"\n"
