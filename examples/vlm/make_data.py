"""Make two small sets of pictures and texts: captions as a WebDataset, and questions as LLaVA writes them.

A picture shows one shape in one colour. The captions of the source `noisy` are of other pictures.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["make_data"]

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220), "yellow": (230, 220, 40)}
SHAPES = ("circle", "square", "triangle")
SIZE = 32


def make_data(folder: Path, num_pictures: int = 480) -> None:
    """Write `captions/*.tar`, `instruct/questions.json` and `instruct/images/`. Always the same."""
    rng = np.random.default_rng(0)
    (folder / "captions").mkdir(parents=True)
    (folder / "instruct" / "images").mkdir(parents=True)
    questions = []
    for first in range(0, num_pictures, 120):
        with tarfile.open(folder / "captions" / f"{first // 120:03d}.tar", "w") as shard:
            for number in range(first, min(first + 120, num_pictures)):
                colour, shape = random_picture(rng)
                picture = draw(colour, shape, rng)
                is_noisy = number % 4 == 3
                words = random_picture(rng) if is_noisy else (colour, shape)
                facts = {"source": "noisy" if is_noisy else "captions", "caption": f"a {words[0]} {words[1]}"}
                add(shard, f"{number:06d}.png", picture)
                add(shard, f"{number:06d}.json", json.dumps(facts).encode())

                colour, shape = random_picture(rng)
                (folder / "instruct" / "images" / f"{number}.png").write_bytes(draw(colour, shape, rng))
                questions.append(question(number, colour, shape))
    (folder / "instruct" / "questions.json").write_text(json.dumps(questions))


def question(number: int, colour: str, shape: str) -> dict[str, object]:
    asked, answer = ("What colour is it?", colour) if number % 2 else ("Which shape is it?", shape)
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
    return {"id": number, "image": f"images/{number}.png", "source": "instruct", "conversations": turns}


def random_picture(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))


def draw(colour: str, shape: str, rng: np.random.Generator) -> bytes:
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    x, y = rng.integers(2, 12, 2).tolist()
    box = (x, y, x + 18, y + 18)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, COLOURS[colour])
    else:
        pen.polygon([(x, y + 18), (x + 18, y + 18), (x + 9, y)], COLOURS[colour])
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))
