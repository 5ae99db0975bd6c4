"""The configs of docs/moving_in.md, on files as the other loaders write them."""

import json
import re
from pathlib import Path

import pytest

from mixtera_hpc.cli.main import main
from mixtera_hpc.testing.megatron import write_megatron
from mixtera_hpc.testing.writers import write_arrow_stream, write_mds_rows, write_tar

pytestmark = pytest.mark.slow
"""Builds an index for every loader."""

PAGE = Path(__file__).resolve().parents[2] / "docs/moving_in.md"
ROWS = [{"text": f"row {i}", "n": i} for i in range(30)]


def write_megatron_blend(data: Path) -> None:
    (data / "tokens").mkdir()
    for name, count in (("web", 40), ("code", 25)):
        write_megatron(data / f"tokens/{name}_text_document.bin", [[1, 2, 3, 50256]] * count)


def write_interleaved(data: Path) -> None:
    for name, key in (("web", "text"), ("code", "content")):
        (data / name).mkdir()
        (path,) = write_arrow_stream(data / name, [{key: row["text"]} for row in ROWS])
        path.rename(data / name / "data-00000-of-00001.arrow")
        for other in ("state.json", "dataset_info.json"):
            (data / name / other).write_text("{}")


def write_energon_blend(data: Path) -> None:
    for name in ("coco", "charts"):
        (data / name / ".nv-meta").mkdir(parents=True)
        (data / name / ".nv-meta/dataset.yaml").write_text("sample_type: CaptioningSample\n")
        write_tar(data / name, ROWS)


def write_mosaic_streams(data: Path) -> None:
    for name, compression in (("web_mds", None), ("code_mds", "zstd")):
        (data / name).mkdir()
        write_mds_rows(data / name, ROWS, compression)


CASES = {
    "megatron_blend": (write_megatron_blend, {"web": 0.3, "code": 0.7}),
    "interleaved": (write_interleaved, {"web": 0.8, "code": 0.2}),
    "mosaic_streams": (write_mosaic_streams, {"web": 0.7, "code": 0.3}),
    "energon_blend": (write_energon_blend, {"coco": 5 / 7, "charts": 2 / 7}),
}


def configs() -> dict[str, str]:
    """Return the experiments of the page by name."""
    blocks = re.findall(r"^```yaml\n(# @package _global_\n# (\w+)\.yaml\n.*?)^```", PAGE.read_text(), re.M | re.S)
    return {name: text for text, name in blocks}


def test_every_config_of_the_page_is_tested() -> None:
    assert configs().keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_config_gives_the_proportions_of_the_other_loader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, expected = CASES[name]
    write(tmp_path)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / f"conf/experiment/{name}.yaml").write_text(configs()[name].replace("/data", str(tmp_path)))
    monkeypatch.setenv("MIXTERA_CONF", f"{tmp_path}/conf")

    assert main(["index", "build", f"experiment={name}"]) == 0
    capsys.readouterr()
    assert main(["query", f"experiment={name}", "--json"]) == 0
    domains = json.loads(capsys.readouterr().out)["domains"]
    assert {d["key"]["dataset"]: d["weight"] for d in domains} == pytest.approx(expected)

    # A hundred sequences or samples, of the planned order.
    assert main(["plan", f"experiment={name}", "--json", "plan.steps=10", *SMALL]) == 0
    served = [json.loads(line)["domain_id"] for line in capsys.readouterr().out.splitlines()]
    names = [d["key"]["dataset"] for d in domains]
    assert len(served) == 100
    for domain, dataset in enumerate(names):
        assert abs(served.count(domain) - 100 * expected[dataset]) < 1


SMALL = ["dataplane.global_batch_size=10", "dataplane.seq_len=4", "dataplane.chunk_steps=2"]
