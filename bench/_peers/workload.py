"""The input of every measured process: the place of the corpus, and the sizes of batches."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ROWS_PER_BATCH", "Order", "Workload", "load_order"]

ROWS_PER_BATCH = 256
"""Documents of one batch, for the systems that serve documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Folders of one run of the benchmark; relative names inside a folder are the same for every system."""

    folder: Path
    """Everything below it belongs to this size of the corpus."""
    tokenizer: Path
    num_rows: int

    @property
    def jsonl(self) -> Path:
        """Ten shards of JSON lines."""
        return self.folder / "jsonl-10"

    @property
    def compressed(self) -> Path:
        """The same shards, each compressed as one zstd frame."""
        return self.folder / "zst"

    @property
    def tokens(self) -> Path:
        """The same documents as Megatron token files of uint16, one per domain."""
        return self.folder / "tokens"

    def own(self, system: str) -> Path:
        """Return the folder for what a system makes of the corpus before it is measured."""
        path = self.folder / "own" / system
        path.mkdir(parents=True, exist_ok=True)
        return path

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        return json.dumps(asdict(self), default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> "Workload":
        """Return the workload that `to_json` wrote."""
        plain: dict[str, Any] = json.loads(text)
        return cls(folder=Path(plain["folder"]), tokenizer=Path(plain["tokenizer"]), num_rows=plain["num_rows"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Documents in the order in which Mixtera-HPC serves them as samples."""

    shards: list[Path]
    shard: NDArray[np.int64]
    """Index into `shards`, shape (N,)."""
    offset: NDArray[np.int64]
    """Bytes from the beginning of the shard, shape (N,)."""
    length: NDArray[np.int64]
    """Bytes, shape (N,)."""

    def save(self, path: Path) -> None:
        """Write the order to an npz file."""
        names = np.array([str(shard) for shard in self.shards])
        np.savez(path, shards=names, shard=self.shard, offset=self.offset, length=self.length)


def load_order(path: Path) -> Order:
    """Read what `Order.save` wrote."""
    with np.load(path) as arrays:
        return Order(
            shards=[Path(name) for name in arrays["shards"].tolist()],
            shard=arrays["shard"],
            offset=arrays["offset"],
            length=arrays["length"],
        )
