"""Several images per row: the function of docs/vlm.md, as written, on every layout, and wrong images."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.comm.communicator import Local
from mixtera_hpc.config.compose import compose
from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.dataplane.plane import DataPlane
from mixtera_hpc.errors import DataError
from mixtera_hpc.index.build.build import build_index

image_library = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

PAGE = Path(__file__).resolve().parents[2] / "docs/vlm.md"
NUM_ROWS = 12
LAYOUTS = ["jsonl", "parquet", "parquet_single", "parquet_paths", "tar"]


@pytest.fixture(autouse=True)
def _function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the function of the page to a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/row_images.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "row_images", raising=False)


def picture(number: int, kind: str = "PNG") -> bytes:
    """Return an image file of one colour."""
    file = io.BytesIO()
    image_library.new("RGB", (40, 30), (number, 2 * number, 100)).save(file, kind)
    return file.getvalue()


def write_layout(layout: str, data: Path, wrong: Any = None) -> None:
    """Write 12 rows with three images each, or one; `wrong` takes the place of the last image of row 5."""
    images = [[picture(3 * i + k, "JPEG" if layout == "tar" else "PNG") for k in range(3)] for i in range(NUM_ROWS)]
    if layout == "parquet_single":
        images = [contents[:1] for contents in images]
    data.mkdir()
    rows: list[dict[str, Any]] = []
    for i, contents in enumerate(images):
        entries: list[Any] = []
        for k, content in enumerate(contents):
            is_wrong = wrong is not None and i == 5 and k == len(contents) - 1
            path = f"images/{i}_{k}.png"
            if layout in ("jsonl", "parquet_paths"):
                (data / "images").mkdir(exist_ok=True)
                (data / path).write_bytes(wrong if is_wrong and isinstance(wrong, bytes) else content)
                path = wrong if is_wrong and isinstance(wrong, str) else path
                entries.append(path if layout == "jsonl" else {"bytes": None, "path": path})
            else:
                value = wrong if is_wrong else content
                entries.append(value if layout == "tar" else {"bytes": value, "path": None})
        rows.append({"images": entries, "text": f"row {i}"})
    write_rows(layout, data, rows)


def write_rows(layout: str, data: Path, rows: list[dict[str, Any]]) -> None:
    if layout == "jsonl":
        (data / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif layout == "tar":
        with tarfile.open(data / "a.tar", "w") as archive:
            for i, row in enumerate(rows):
                members = {"jpg": row["images"][0], "2.jpg": row["images"][1], "10.jpg": row["images"][2]}
                for ending, content in {**members, "json": json.dumps({"text": row["text"]}).encode()}.items():
                    member = tarfile.TarInfo(f"{i:04}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    else:
        struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        single = layout == "parquet_single"
        values = [row["images"][0] if single else row["images"] for row in rows]
        column = pyarrow.array(values, struct if single else pyarrow.list_(struct))
        texts = [row["text"] for row in rows]
        table = pyarrow.table({"image" if single else "images": column, "text": texts})
        pyarrow.parquet.write_table(table, data / "a.parquet", row_group_size=5)


def overrides_of(layout: str, tmp_path: Path) -> list[str]:
    return [
        f"data.root={tmp_path}/data",
        f"data.include=[a.{layout.split('_')[0]}]",
        f"data.text={'json.text' if layout == 'tar' else 'text'}",
        f"index.path={tmp_path}/i.h5",
        "mixture.unit=samples",
        "dataplane.global_batch_size=4",
        "dataplane.audit=true",
        "data.transform=row_images.images_and_text",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_function_of_the_page_gets_all_images_in_order(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_layout(layout, tmp_path / "data")
    config = compose(overrides_of(layout, tmp_path))
    build_index(config)
    folder = RunFolder(tmp_path / "runs/a/20260101-000000-aaaa")
    with DataPlane.open(config, Local(), folder=folder) as plane:
        batches = [next(iter(plane)) for _ in range(3)]
    for sample in (sample for batch in batches for sample in batch.payloads or []):
        number = int(sample["text"].removeprefix("row "))
        count = 1 if layout == "parquet_single" else 3
        assert sample["images"].shape == (count, 32, 32, 3)
        colours = sample["images"].mean((1, 2))
        # JPEG changes colours a little.
        assert np.abs(colours[:, 0] - (3 * number + np.arange(count))).max() < 2.5

    assert main(["trace", str(folder.path), "--step", "1", "--show"]) == 0
    capsys.readouterr()
    written = list(folder.report.glob("step_1/*"))
    embedded = {"jsonl": 0, "parquet_paths": 0, "parquet_single": 1}.get(layout, 3)
    assert len(written) == 4 * embedded
    assert all(image_library.open(path).size == (40, 30) for path in written)


@pytest.mark.parametrize(
    ("wrong", "layouts", "problem"),
    [
        ("images/none.png", ("jsonl", "parquet_paths"), r"row 5 names the file 'images/none.png', but .* No such file"),
        ("../code/row_images.py", ("jsonl", "parquet_paths"), r"row 5 names the file .* which is not below"),
        ("/etc/hostname", ("jsonl", "parquet_paths"), r"row 5 names the file '/etc/hostname', which is not below"),
        (b"no image", LAYOUTS, r"images_and_text failed for .* row 5 .*UnidentifiedImageError"),
        (picture(5)[:40], LAYOUTS, r"images_and_text failed for .* row 5 "),
    ],
)
def test_a_wrong_image_is_named_with_its_row(
    wrong: Any, layouts: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    for layout in layouts:
        root = tmp_path / layout
        root.mkdir()
        write_layout(layout, root / "data", wrong)
        config = compose(overrides_of(layout, root))
        build_index(config)
        with pytest.raises(DataError, match=problem) as caught, DataPlane.open(config, Local()) as plane:
            for _ in range(3):
                next(iter(plane))
        assert caught.value.exit_code == 2
