"""Write MDS shards in the layout that MosaicML Streaming documents, for tests."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

__all__ = ["write_mds"]

# Bytes of encodings of a fixed size.
_SIZES = {"int": 8, "int32": 4, "uint8": 1, "float32": 4, "float64": 8, "ndarray:int32:2,2": 16}


def write_mds(
    folder: Path,
    encodings: Mapping[str, str],
    shards: Sequence[Sequence[Mapping[str, bytes]]],
    compression: str | None = None,
) -> list[Path]:
    """Write shards and their `index.json` into a folder, and return the shards.

    Args:
        folder: where to write.
        encodings: column → encoding.
        shards: the samples of every shard: column → encoded value.
        compression: None or `zstd`.
    """
    header = {
        "column_encodings": [encodings[name] for name in sorted(encodings)],
        "column_names": sorted(encodings),
        "column_sizes": [_SIZES.get(encodings[name]) for name in sorted(encodings)],
        "compression": compression,
        "format": "mds",
        "hashes": [],
        "size_limit": 1 << 26,
        "version": 2,
    }
    paths = []
    entries = []
    for number, samples in enumerate(shards):
        path = folder / f"shard.{number:05d}.mds"
        data = _shard(header, samples)
        entry: dict[str, Any] = header | {
            "raw_data": {"basename": path.name, "bytes": len(data), "hashes": {}},
            "samples": len(samples),
            "zip_data": None,
        }
        if compression:
            data = zstandard.compress(data)
            path = path.with_name(f"{path.name}.zstd")
            entry["zip_data"] = {"basename": path.name, "bytes": len(data), "hashes": {}}
        path.write_bytes(data)
        paths.append(path)
        entries.append(entry)
    index = {"shards": entries, "version": 2}
    (folder / "index.json").write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
    return paths


def _shard(header: Mapping[str, Any], samples: Sequence[Mapping[str, bytes]]) -> bytes:
    """Return the bytes of one shard."""
    config = json.dumps(header, sort_keys=True).encode()
    encoded = [_sample(header, sample) for sample in samples]
    # The number of samples and the ends of all samples come before the first one.
    start = 4 * (len(encoded) + 2) + len(config)
    starts = start + np.cumsum([0, *map(len, encoded)])
    return np.uint32(len(encoded)).tobytes() + starts.astype("<u4").tobytes() + config + b"".join(encoded)


def _sample(header: Mapping[str, Any], sample: Mapping[str, bytes]) -> bytes:
    """Return one sample: the sizes of its columns without a fixed size, then all columns."""
    values = [sample[name] for name in header["column_names"]]
    sizes = [len(value) for value, size in zip(values, header["column_sizes"], strict=True) if size is None]
    return np.array(sizes, "<u4").tobytes() + b"".join(values)
