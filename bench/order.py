"""Quality of the shuffled order within a domain, and what it costs in reads.

    python -m bench order

The domain has 1,048,576 rows in blocks of 256. It is stored in the worst possible order: sorted by the property that a
shuffle should mix. The results are counts and ratios and do not depend on the machine, except for the two times. Prints
a table and writes bench/out/order.json.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from bench._results import write_results
from mixtera_hpc.core.lanes import LaneOrder
from mixtera_hpc.core.order import ShuffleOrder
from mixtera_hpc.core.sequence_grid import SequenceGrid

NUM_BLOCKS = 4096
BLOCK_ROWS = 256
NUM_ROWS = NUM_BLOCKS * BLOCK_ROWS
BATCH_SIZES = (64, 1024)
ROW_BYTES = 1024
WINDOWS = ((4, 1), (4, 16), (32, 1), (32, 4), (32, 16), (32, 64), (32, 128), (4096, 1))
"""Blocks in a window, and values of `dataplane.lanes`."""
LARGE_BATCHES = ((8192, 16), (8192, 256), (32768, 16), (32768, 1024))
"""Batch sizes with 16 lanes, and with the default number for them; in the default window."""
DEFAULT_WINDOW = (32, 16)
"""`dataplane.window_bytes` of 8 MiB holds 32 blocks of 256 rows of 1 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderQuality:
    """One shuffle, measured in batches of `batch_size` rows."""

    shuffle: str
    window: int
    """Blocks per window."""
    lanes: int
    batch_size: int
    spread: float
    """Standard deviation of a batch's mean position on disk, relative to a perfect shuffle: 1 is perfect, √batch_size
    is no shuffle."""
    same_block: float
    """Probability that two consecutive rows come from the same block; 1 / number of blocks is perfect."""
    blocks_per_batch: float
    """Number of different blocks in a batch."""
    read_amplification: float
    """Rows read per row used, for formats that read whole blocks, without a cache."""
    cached_rows: int
    """Rows that a cache must hold so that each block is read only once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeekTime:
    """Time to find any position of an epoch."""

    num_blocks: int
    order_ms: float
    """Ordering the blocks of the epoch, once."""
    position_us: float
    """Looking up one position."""


def main() -> None:
    """Measure, print and write all results."""
    qualities = list(measure_qualities())
    print_qualities(qualities)

    seeks = [measure_seek(num_blocks) for num_blocks in (10_000, 100_000, 1_000_000)]
    for seek in seeks:
        print(
            f"{seek.num_blocks:9,} blocks: {seek.order_ms:.1f} ms to order them once per epoch, "
            f"{seek.position_us:.1f} µs to find a position"
        )

    agreement = measure_epoch_agreement()
    print(f"two epochs serve the same row at {agreement:.1e} of all positions (by chance: {1 / NUM_ROWS:.1e})")

    content = {
        "qualities": [asdict(quality) for quality in qualities],
        "seeks": [asdict(seek) for seek in seeks],
        "epoch_agreement": agreement,
    }
    write_results("order", content)


def shuffled(window: int) -> ShuffleOrder:
    """Return the order with windows of `window` blocks."""
    return ShuffleOrder(seed=0, shuffle="window", window_bytes=window * BLOCK_ROWS * ROW_BYTES)


def served_positions(order: ShuffleOrder, lanes: int, epoch: int = 0) -> np.ndarray:
    """Return the positions on disk of all rows of an epoch, in served order."""
    sizes = np.full(NUM_BLOCKS, BLOCK_ROWS)
    epoch_order = order.epoch(epoch, np.arange(NUM_BLOCKS), sizes, sizes * ROW_BYTES)
    windows = []
    for window in range(len(epoch_order.starts) - 1):
        # The rows of the window's blocks, block by block, then permuted within the window.
        rows = (epoch_order.blocks_of(window)[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).reshape(-1)
        windows.append(rows[order.rows(0, epoch, window, len(rows))])
    zero = np.zeros(1, np.int64)
    lane_order = LaneOrder(
        lanes=lanes, grid=SequenceGrid.of_samples(), epoch_items=np.array([NUM_ROWS]), origins=zero, begins=zero
    )
    return np.concatenate(windows)[lane_order.sequence(0, np.arange(NUM_ROWS))]


def measure_qualities() -> Iterator[OrderQuality]:
    """Measure every shuffle and window with every batch size."""
    for batch_size in BATCH_SIZES:
        for shuffle in ("none", "block"):
            yield measure_quality(ShuffleOrder(seed=0, shuffle=shuffle, window_bytes=1), 1, 1, batch_size)
        for window, lanes in WINDOWS:
            yield measure_quality(shuffled(window), window, lanes, batch_size)
    for batch_size, lanes in LARGE_BATCHES:
        yield measure_quality(shuffled(DEFAULT_WINDOW[0]), DEFAULT_WINDOW[0], lanes, batch_size)


def measure_quality(order: ShuffleOrder, window: int, lanes: int, batch_size: int) -> OrderQuality:
    """Measure one shuffle over a whole epoch."""
    rows = served_positions(order, lanes)
    blocks = rows // BLOCK_ROWS
    batch_means = rows.reshape(-1, batch_size).mean(axis=1)

    # Mean of batch_size draws without replacement from NUM_ROWS uniform positions.
    finite_population = np.sqrt((NUM_ROWS - batch_size) / (NUM_ROWS - 1))
    perfect_std = NUM_ROWS / np.sqrt(12 * batch_size) * finite_population

    blocks_per_batch = float(np.mean([len(np.unique(batch)) for batch in blocks.reshape(-1, batch_size)]))
    return OrderQuality(
        shuffle=order.shuffle,
        window=window,
        lanes=lanes,
        batch_size=batch_size,
        spread=float(batch_means.std() / perfect_std),
        same_block=float(np.mean(blocks[1:] == blocks[:-1])),
        blocks_per_batch=blocks_per_batch,
        read_amplification=blocks_per_batch * BLOCK_ROWS / batch_size,
        cached_rows=lanes * window * BLOCK_ROWS,
    )


def measure_seek(num_blocks: int) -> SeekTime:
    """Measure how long it takes to order an epoch and to find 1,000 positions in it."""
    order = shuffled(DEFAULT_WINDOW[0])
    sizes = np.full(num_blocks, BLOCK_ROWS)
    started = time.perf_counter()
    epoch = order.epoch(12345, np.arange(num_blocks), sizes, sizes * ROW_BYTES)
    ordered = time.perf_counter()
    num_rows = num_blocks * BLOCK_ROWS
    for item in range(0, num_rows, num_rows // 1000):
        epoch.window_at(item)
    finished = time.perf_counter()
    return SeekTime(
        num_blocks=num_blocks,
        order_ms=(ordered - started) * 1e3,
        position_us=(finished - ordered) * 1e3,  # Milliseconds for 1,000 positions are microseconds for one.
    )


def measure_epoch_agreement(num_epochs: int = 8) -> float:
    """Return the share of positions at which two epochs serve the same row; 1 / NUM_ROWS is perfect."""
    window, lanes = DEFAULT_WINDOW
    order = shuffled(window)
    first = served_positions(order, lanes)
    return float(np.mean([np.mean(served_positions(order, lanes, epoch) == first) for epoch in range(1, num_epochs)]))


def print_qualities(qualities: list[OrderQuality]) -> None:
    print("spread: 1 is a perfect shuffle. read ampl.: rows read per row used, whole blocks without a cache.")
    print("cached rows: cache size that avoids reading a block twice.")
    print(
        f"{'batch':>5} {'shuffle':>8} {'window':>6} {'lanes':>5} {'spread':>7} {'same block':>10} {'blocks/batch':>12} "
        f"{'read ampl.':>10} {'cached rows':>11}"
    )
    for quality in qualities:
        print(
            f"{quality.batch_size:5} {quality.shuffle:>8} {quality.window:6} {quality.lanes:5} {quality.spread:7.2f} "
            f"{quality.same_block:10.4f} {quality.blocks_per_batch:12.1f} {quality.read_amplification:10.1f} "
            f"{quality.cached_rows:11,}"
        )


if __name__ == "__main__":
    main()
