"""Writes Megatron-LM's token files, for tests and for small corpora of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.formats.readers.megatron import DTYPES, HEADER, MAGIC

__all__ = ["write_megatron"]


def write_megatron(path: Path, documents: Sequence[Any], dtype: str = "<u2") -> None:
    """Write `path` (`.bin`) and its `.idx`: one sequence per document, as `preprocess_data.py` does without `--split-sentences`."""
    code = next(code for code, name in DTYPES.items() if name == dtype)
    arrays = [np.asarray(ids, dtype) for ids in documents]
    lengths = np.array([len(a) for a in arrays], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    path.write_bytes(b"".join(a.tobytes() for a in arrays))
    header = HEADER.pack(MAGIC, 1, code, len(arrays), len(arrays) + 1)
    table = np.arange(len(arrays) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + table.tobytes())
