"""Index size and build rates, next to bare decoding and tokenizing loops."""

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from bench._corpus import FOLDER, make_tokenizer
from bench._figures import FigureLine, at_most, rate, ratio
from bench._format_digests import SOURCE
from bench._row_loops import decode_in_order, tokenizer_rate
from bench.index_parallel import best_build
from mixtera_hpc.config.compose import compose
from mixtera_hpc.core.properties import Kind
from mixtera_hpc.formats.base import PropertyField, ScanSpec
from mixtera_hpc.formats.batching.row_type import RowType
from mixtera_hpc.index.build.build import build_index

__all__ = ["build_lines", "rank_lines"]

BUILT = FOLDER / "built.h5"
ROUNDS = 3
SOURCE_FIELD = PropertyField(name="source", path="meta.redpajama_set_name", kind=Kind.CATEGORY)


def build_lines(data: Path, num_rows: int) -> Iterator[FigureLine]:
    """Measure index size and build rate, with and without token counts."""
    shard = min(data.iterdir())
    decoder = msgspec.json.Decoder(RowType(ScanSpec(text="text", properties=(SOURCE_FIELD,))).struct)
    build_plain = _build_function(data, None)
    build_counted = _build_function(data, make_tokenizer())
    decoding: list[float] = []
    plain: list[float] = []
    counted: list[float] = []
    tokenizing: list[float] = []
    # Ours and what it is compared with take turns, since the machine may be shared.
    for _ in range(ROUNDS):
        decoding.append(rate(lambda: decode_in_order(shard, decoder)))
        plain.append(rate(build_plain))
        counted.append(rate(build_counted))
        tokenizing.append(tokenizer_rate(data))

    bytes_per_row = BUILT.stat().st_size / num_rows
    yield at_most("index size, tokens counted, SlimPajama's shape", bytes_per_row, "B/row", "goal", 8)
    rows = statistics.median(plain)
    decode_rate = statistics.median(decoding)
    yield ratio("build, tokens not counted", rows, "rows/s", "msgspec over lines, same fields", decode_rate, 0.5)
    rows = statistics.median(counted)
    tokenize_rate = statistics.median(tokenizing)
    yield ratio("build, tokens counted", rows, "rows/s", "bare gigatoken, same texts", tokenize_rate, 0.8)
    both = 1 / (1 / decode_rate + 1 / tokenize_rate)
    yield ratio("build, tokens counted", rows, "rows/s", "that loop and gigatoken, one after the other", both, 0.8)


def rank_lines(data: Path) -> Iterator[FigureLine]:
    """Measure wall time of builds by several ranks; a shared machine, or too few cores, shows less than there is."""
    builds = {num_ranks: best_build(data, num_ranks, make_tokenizer()) for num_ranks in (1, 2, 4, 8)}
    seconds = {num_ranks: build["wall_s"] for num_ranks, build in builds.items()}
    for num_ranks in (2, 4, 8):
        speed_up = seconds[1] / seconds[num_ranks]
        yield FigureLine(
            what=f"build by {num_ranks} ranks on {os.cpu_count()} cores, tokens counted",
            ours=seconds[num_ranks],
            unit="s",
            limit="one rank, wall time",
            other=seconds[1],
            ratio=speed_up,
            goal="≥ 1.6" if num_ranks == 2 else "shown",
            met=num_ranks > 2 or speed_up >= 1.6,
        )
    files = len({build["file"] for build in builds.values()})
    yield at_most("different files that 1, 2, 4 and 8 ranks build", files, "", "goal", 1)


def _build_function(data: Path, tokenizer: Path | None) -> Callable[[], int]:
    """Return a function that builds an index and returns its number of rows."""
    unit = f"dataplane.tokenizer={tokenizer}" if tokenizer else "mixture.unit=samples"
    config = compose([f"data.root={data}", SOURCE, f"index.path={BUILT}", unit])

    def build() -> int:
        BUILT.unlink(missing_ok=True)
        return build_index(config).samples

    return build
