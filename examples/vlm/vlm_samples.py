"""`data.transform` of the example: from a row of either set to a picture and the bytes of its text."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mixtera_hpc import ServedSample

__all__ = ["MAX_BYTES", "picture_and_bytes"]

MAX_BYTES = 48


def picture_and_bytes(row: dict[str, Any], sample: ServedSample) -> dict[str, Any]:
    """Return `picture` (3, 16, 16) float32, `tokens` (MAX_BYTES,) int64 and `counted` (MAX_BYTES - 1,) bool.

    The prompt is input only: the loss counts the bytes of the answer.
    """
    if "conversations" in row:  # LLaVA: the picture is a file below the folder of the set.
        content = sample.read_bytes(row["image"])
        prompt, answer = (turn["value"] for turn in row["conversations"])
    else:  # WebDataset: the picture is a member of the archive.
        content = row["png"]
        prompt, answer = "<image>\n", row["json"]["caption"]

    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((16, 16)), np.float32) / 255
    # Augmentation: the same for any number of ranks and workers, and after a resume.
    if sample.rng().random() < 0.5:
        picture = picture[:, ::-1]

    before = prompt.encode()
    text = (before + answer.encode() + b"\n")[:MAX_BYTES]
    tokens = np.zeros(MAX_BYTES, np.int64)
    tokens[: len(text)] = np.frombuffer(text, np.uint8)
    target = np.arange(1, MAX_BYTES)
    counted = (target >= len(before)) & (target < len(text))
    return {"picture": picture.transpose(2, 0, 1).copy(), "tokens": tokens, "counted": counted}
