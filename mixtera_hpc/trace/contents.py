"""The content of steps that a run has served: its batches, read again from the data, without MPI."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from mixtera_hpc.dataplane.reading.batch_maker import BatchMaker
from mixtera_hpc.dataplane.reading.batches import Batch
from mixtera_hpc.dataplane.reading.source import Source
from mixtera_hpc.dataplane.recording.run_history import AttemptRecord
from mixtera_hpc.errors import ConfigError, DataError
from mixtera_hpc.trace.list import global_batch_maker
from mixtera_hpc.trace.served_run import Record, ServedRun

__all__ = ["StepContents", "document_texts", "export_batches", "readable_sample", "write_images"]

_IMAGE_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"II*\0": "tif"}
"""First bytes of an image file → ending of its name."""


class StepContents:
    """Reads the global batches of a run again. Close it after use."""

    def __init__(self, run: ServedRun) -> None:
        """Open nothing yet."""
        self._run = run
        self._extents = run.history.extents()
        self._makers: dict[int, BatchMaker] = {}
        self._last: Batch | None = None

    def batch(self, step: int) -> Batch:
        """Return the global batch that `step` was served, with the digests of its sequences or samples.

        Raises:
            DataError: the step was not served, or its data cannot be read any more.
        """
        if self._last is None or self._last.step != step:
            attempt = self._attempt_of(step)
            maker = self._maker_of(attempt)
            (self._last,) = maker.batches_of(attempt.plan_of(step), range(step, step + 1))
        return self._last

    def source(self, step: int) -> Source:
        """Return the data that `step` was served from."""
        return self._run.source_of(self._attempt_of(step))

    def check_unchanged(self, record: Record) -> None:
        """Check a record of `list_sequences` against the content, if the run was audited.

        Raises:
            DataError: the data is not what the rank was given.
        """
        digests = self.batch(record["step"]).digests
        if digests is None or record.get("digest", digests[record["position"]]) == digests[record["position"]]:
            return
        raise DataError(
            f"Step {record['step']} position {record['position']} now has other content than the audit log recorded: "
            "the data has changed since.\n  Run mixtera-hpc index verify to see which shards."
        )

    def close(self) -> None:
        """Close all files."""
        for maker in self._makers.values():
            maker.close()
        self._makers.clear()

    def _attempt_of(self, step: int) -> AttemptRecord:
        for attempt, steps in self._extents:
            if step in steps:
                return attempt
        raise DataError(f"Step {step} has not been served.\n  See mixtera-hpc status for the steps of the run.")

    def _maker_of(self, attempt: AttemptRecord) -> BatchMaker:
        if attempt.number not in self._makers:
            self._makers[attempt.number] = global_batch_maker(self._run.source_of(attempt))
        return self._makers[attempt.number]


def document_texts(source: Source, batch: Batch, row: int) -> list[str]:
    """Return the texts of the documents of one sequence, in order, with special tokens; ids where shards hold these.

    A document that the sequence cuts in the middle of a character has U+FFFD there.
    """
    tokens = batch.tokens[row]
    parts = np.split(tokens, np.flatnonzero(np.diff(batch.document_ids[row])) + 1)
    # A batch has tokens only with a tokenizer.
    assert source.tokenizer is not None
    return [source.tokenizer.decode(part) for part in parts]


def write_images(payload: Any, folder: Path, stem: str) -> list[Path]:
    """Write the images of a raw sample, and return their paths.

    Args:
        payload: a raw sample. Bytes in it that begin like an image file are written.
        folder: is created.
        stem: beginning of the names.
    """
    paths = []
    for name, content in _binary_fields(payload, ""):
        for magic, ending in _IMAGE_ENDINGS.items():
            if content.startswith(magic):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{stem}{name.replace('/', '_')}.{ending}"
                path.write_bytes(content)
                paths.append(path)
    return paths


def readable_sample(payload: Any) -> Any:
    """Return a raw sample with the number of bytes in place of binary fields, fit for JSON."""
    if isinstance(payload, dict):
        return {str(key): readable_sample(value) for key, value in payload.items()}
    if isinstance(payload, (list, tuple)):
        return [readable_sample(value) for value in payload]
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return f"<{len(payload)} bytes>"
    return payload.tolist() if isinstance(payload, np.ndarray) else payload


def _binary_fields(payload: Any, name: str) -> list[tuple[str, bytes]]:
    """Return the name and content of all binary fields, at any depth."""
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return [(name, bytes(payload))]
    inner: Sequence[tuple[Any, Any]] = []
    if isinstance(payload, dict):
        inner = list(payload.items())
    elif isinstance(payload, (list, tuple)):
        inner = list(enumerate(payload))
    return [field for key, value in inner for field in _binary_fields(value, f"{name}_{key}")]


def export_batches(path: Path, batches: Sequence[tuple[Batch, NDArray[np.int64]]], names: Sequence[str]) -> int:
    """Write rows of global batches as one npz file, readable without pickle; return the number of rows.

    The arrays have one row per sequence: `step`, `position`, `domain_id`, `digest`, and with tokens `tokens`,
    `loss_mask`, `document_ids` and `position_ids` as in `Batch`. With samples, `payload_bytes` holds them as
    MessagePack one after the other, and `payload_offsets` where each begins. `domain_names` is by domain_id.

    Args:
        path: ends in .npz.
        batches: global batches, each with the rows to write.
        names: of the domains.

    Raises:
        ConfigError: there are no rows, or the path does not end in .npz or cannot be written.
    """
    if path.suffix != ".npz":
        raise ConfigError(f"--export is {str(path)!r}, but must end in .npz.")
    num_rows = sum(len(rows) for _, rows in batches)
    if not num_rows:
        raise ConfigError("No sequence passes the filters, so there is nothing to export.")

    try:
        np.savez(path, **_exported_arrays(batches, names))
    except OSError as error:
        raise ConfigError(f"--export is {str(path)!r}, which cannot be written: {error.strerror}.") from None
    return num_rows


def _exported_arrays(batches: Sequence[tuple[Batch, NDArray[np.int64]]], names: Sequence[str]) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "step": np.concatenate([np.full(len(rows), batch.step) for batch, rows in batches]),
        "position": np.concatenate([batch.positions[rows] for batch, rows in batches]),
        "domain_id": np.concatenate([batch.domain_ids[rows] for batch, rows in batches]),
        "digest": np.array([(batch.digests or [])[row] for batch, rows in batches for row in rows.tolist()]),
        "domain_names": np.array(names),
    }
    payloads = [batch.payloads[row] for batch, rows in batches if batch.payloads for row in rows.tolist()]
    if payloads:
        encoded = [msgspec.msgpack.encode(payload, enc_hook=_plain_value) for payload in payloads]
        arrays["payload_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays["payload_offsets"] = np.cumsum([0, *map(len, encoded)])
    else:
        for name in ("tokens", "loss_mask", "document_ids", "position_ids"):
            arrays[name] = np.concatenate([getattr(batch, name)[rows] for batch, rows in batches])
    return arrays


def _plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else str(value)
