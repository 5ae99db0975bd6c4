"""How far a shuffled stream is from a perfect shuffle, and what that costs in reads.

    python -m bench.order

One domain of 1,048,576 rows in blocks of 256, stored in the worst order there is: sorted by what is to be mixed. Prints a table and
writes bench/out/order.json. Numbers are counts and ratios; nothing here depends on the machine.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.core.order import ShuffleOrder

OUT = Path(__file__).resolve().parent / "out" / "order.json"
NUM_BLOCKS, BLOCK_ROWS = 4096, 256
NUM_ROWS = NUM_BLOCKS * BLOCK_ROWS
BATCHES = (64, 1024)
WINDOWS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """One way to shuffle, seen in batches of `batch` rows."""

    shuffle: str
    window: int
    batch: int
    spread: float
    """Standard deviation of a batch's mean position on disk over that of a perfect shuffle; 1 is perfect, √batch is none."""
    same_block: float
    """Chance that two neighbours in the stream come from the same block; 1 / blocks is perfect."""
    blocks_per_batch: float
    """Blocks that a batch touches."""
    amplification: float
    """Rows read per row used, where a block can only be read whole and none is kept."""
    kept_rows: int
    """Rows of blocks that have to be kept to read each block once."""


def stream(order: ShuffleOrder, epoch: int = 0) -> np.ndarray:
    """Positions on disk of one epoch's rows, in served order."""
    epoch_order = order.epoch(0, epoch, np.full(NUM_BLOCKS, BLOCK_ROWS))
    parts = []
    for window in range(len(epoch_order.starts) - 1):
        rows = (epoch_order.blocks_of(window)[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
        parts.append(rows[order.rows(0, epoch, window, len(rows))])
    return np.concatenate(parts)


def quality(order: ShuffleOrder, batch: int) -> Quality:
    """Over a whole epoch."""
    rows = stream(order)
    blocks = rows // BLOCK_ROWS
    means = rows.reshape(-1, batch).mean(axis=1)
    perfect = NUM_ROWS / np.sqrt(12 * batch) * np.sqrt((NUM_ROWS - batch) / (NUM_ROWS - 1))
    touched = np.mean([len(np.unique(part)) for part in blocks.reshape(-1, batch)])
    window = order.window if order.shuffle == "window" else 1
    return Quality(
        shuffle=order.shuffle,
        window=window,
        batch=batch,
        spread=float(means.std() / perfect),
        same_block=float(np.mean(blocks[1:] == blocks[:-1])),
        blocks_per_batch=float(touched),
        amplification=float(touched * BLOCK_ROWS / batch),
        kept_rows=window * BLOCK_ROWS,
    )


def qualities() -> Iterator[Quality]:
    for batch in BATCHES:
        for shuffle in ("none", "block"):
            yield quality(ShuffleOrder(seed=0, shuffle=shuffle, window=1), batch)
        for window in WINDOWS[1:]:
            yield quality(ShuffleOrder(seed=0, shuffle="window", window=window), batch)


def seeks(num_blocks: int) -> dict[str, Any]:
    """What it takes to stand anywhere: order the epoch's blocks once, then look up positions."""
    order, sizes = ShuffleOrder(seed=0, shuffle="window", window=64), np.full(num_blocks, BLOCK_ROWS)
    began = time.perf_counter()
    epoch = order.epoch(0, 12345, sizes)
    ordered = time.perf_counter()
    for item in range(0, num_blocks * BLOCK_ROWS, num_blocks * BLOCK_ROWS // 1000):
        epoch.window_at(item)
    looked_up = time.perf_counter()
    return {"blocks": num_blocks, "order_ms": (ordered - began) * 1e3, "position_us": (looked_up - ordered) * 1e3}


def epochs_agree(num_epochs: int = 8) -> float:
    """Share of positions at which two epochs serve the same row; 1 / rows is perfect."""
    order = ShuffleOrder(seed=0, shuffle="window", window=64)
    first = stream(order)
    return float(np.mean([np.mean(stream(order, epoch) == first) for epoch in range(1, num_epochs)]))


def main() -> None:
    """Measure, print, write."""
    rows = list(qualities())
    print(
        f"{'batch':>5} {'shuffle':>8} {'window':>6} {'spread':>7} {'same block':>10} {'blocks':>7} {'read/used':>9} {'kept rows':>10}"
    )
    for r in rows:
        print(
            f"{r.batch:5} {r.shuffle:>8} {r.window:6} {r.spread:7.2f} {r.same_block:10.4f} {r.blocks_per_batch:7.1f} "
            f"{r.amplification:9.1f} {r.kept_rows:10,}"
        )
    places = [seeks(n) for n in (10_000, 100_000, 1_000_000)]
    for p in places:
        print(f"{p['blocks']:9,} blocks: ordered in {p['order_ms']:.1f} ms, any position in {p['position_us']:.1f} µs")
    same = epochs_agree()
    print(f"two epochs serve the same row at {same:.1e} of all positions (chance: {1 / NUM_ROWS:.1e})")
    OUT.parent.mkdir(exist_ok=True)
    content = {"qualities": [asdict(r) for r in rows], "seeks": places, "epochs_agree": same}
    OUT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
