"""Write Megatron-LM's token files, for tests and for small corpora."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixtera_hpc.formats.codecs.megatron_index import DTYPES, HEADER, MAGIC, VERSION

__all__ = ["write_megatron"]


def write_megatron(path: Path, documents: Sequence[Any], dtype: str = "<u2") -> None:
    """Write `path` (`.bin`) and its `.idx` file with one sequence per document.

    This is the layout of Megatron's `preprocess_data.py` without `--split-sentences`.
    """
    code = next(code for code, name in DTYPES.items() if name == dtype)
    arrays = [np.asarray(ids, dtype) for ids in documents]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))

    lengths = np.array([len(array) for array in arrays], "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    document_table = np.arange(len(arrays) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, code, len(arrays), len(document_table))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + document_table.tobytes())
