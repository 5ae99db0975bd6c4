"""The HTML page is self-contained and complete for any number of domains."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.text import Annotation

from mixtera_hpc.config.run_folder import RunFolder
from mixtera_hpc.config.yaml_files import dump_yaml, load_yaml
from mixtera_hpc.report.canvas import Canvas
from mixtera_hpc.report.html_page import render_page
from mixtera_hpc.report.plot_style import LIGHT
from mixtera_hpc.report.plots import throughput_plot
from mixtera_hpc.report.projection import project_run
from mixtera_hpc.report.report_files import WrittenReport, write_report
from mixtera_hpc.report.run_metrics import load_run_metrics
from mixtera_hpc.report.summary import summarize_run

RunMaker = Callable[..., RunFolder]
VOID = {"meta", "br", "path", "use", "rect", "circle", "line"}


class BalanceChecker(HTMLParser):
    """Check that elements are closed in the reverse order of opening."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> does not match the open element"

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        return None


def page_of(report: WrittenReport) -> str:
    return report.page.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=[1, 40])
def report(request: pytest.FixtureRequest, make_run: RunMaker) -> WrittenReport:
    names = [f"source=<b>{i}</b>" for i in range(request.param)]
    return write_report(make_run(names, [(0, 10), (8, 20)], num_steps=30))


@pytest.mark.slow
def test_the_page_references_no_other_file_and_no_network(report: WrittenReport) -> None:
    page = page_of(report)
    links = re.findall(r"""(?:href|src|srcset|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert links
    assert [link for link in links if not link.startswith("#")] == []
    assert "<script" not in page
    assert "@import" not in page


def test_the_page_is_well_formed_and_escapes_names(report: WrittenReport) -> None:
    balance = BalanceChecker()
    balance.feed(page_of(report))
    assert balance.open == []
    assert "<b>0</b>" not in page_of(report)
    assert "&lt;b&gt;0&lt;/b&gt;" in page_of(report)


def test_plots_take_all_colors_from_the_page(report: WrittenReport) -> None:
    page = page_of(report)
    plots = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not [color for color in LIGHT.values() if color in plots]
    used = set(re.findall(r"var\(--(\w+)\)", page))
    for scheme in re.findall(r":root \{ (--surface.*?)\}", page):
        assert used - {"font", "code"} <= set(re.findall(r"--(\w+):", scheme))
    assert "prefers-color-scheme: dark" in page


def test_every_plot_exists_for_wide_and_narrow_screens_and_as_png(report: WrittenReport) -> None:
    expected = {"loss", "throughput", "data_wait", "communication"}
    if len(report.metrics.domains) > 1:
        expected.add("mixture")
    assert {plot.stem for plot in report.plots} == expected
    assert page_of(report).count("<svg") == 2 * len(expected)
    for plot in report.plots:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_small_domains_share_a_group_in_plots_but_have_rows_of_their_own(report: WrittenReport) -> None:
    names = [name for name in ("31 others",) if name in page_of(report)]
    assert names == (["31 others"] if len(report.metrics.domains) == 40 else [])
    assert all(f"&lt;b&gt;{i}&lt;/b&gt;</td>" in page_of(report) for i in range(len(report.metrics.domains)))


@pytest.mark.parametrize("attempts", [[(0, 20)], [(0, 10), (8, 20)]])
def test_plots_mark_the_step_where_an_attempt_resumed(make_run: RunMaker, attempts: list[tuple[int, int]]) -> None:
    metrics = load_run_metrics(make_run(["en"], attempts))
    figure = throughput_plot(metrics, Canvas(wide=True))
    assert figure is not None
    marks = [note.xy[0] for note in figure.findobj(Annotation) if note.get_text() == "attempt 2"]
    assert marks == [8] * (len(attempts) - 1)


def test_a_run_with_only_steps_recorded_has_a_page(make_run: RunMaker) -> None:
    run = make_run(["en", "de"], [(0, 4)], with_mixture=False)
    (run.metrics / "comm.jsonl").unlink()
    (run.metrics / "attempts.jsonl").unlink()
    report = write_report(run)
    assert {plot.stem for plot in report.plots} == {"loss", "throughput", "data_wait"}


def test_notices_report_nonfinite_losses_and_exhausted_domains(make_run: RunMaker) -> None:
    metrics = load_run_metrics(make_run(["en", "de"], [(0, 20)], num_steps=100, max_epochs=1.5, num_nonfinite=2))
    summary = summarize_run(metrics)
    page = render_page(metrics, summary, project_run(metrics, summary), {})
    assert "40 sequences had a loss that is not finite (NaN or infinity)" in page
    assert "de reaches mixture.max_epochs=1.5 around step 75" in page


@pytest.mark.slow
def test_the_same_metrics_give_the_same_page(make_run: RunMaker, tmp_path: Path) -> None:
    run = make_run(["en"], [(0, 2)])
    first, second = (write_report(run, tmp_path / name) for name in "ab")
    assert first.page.read_bytes() == second.page.read_bytes()


@pytest.mark.slow
def test_held_out_losses_have_a_plot_and_a_table_column(make_run: RunMaker) -> None:
    report = write_report(make_run(["a", "b"], [(0, 20)], validated_at=(5, 10, 15)))
    page = report.page.read_text()
    assert "Held-out loss by domain" in page and ">held-out loss</th>" in page
    assert report.page.with_name("validation.png").exists()
    assert "held-out" not in write_report(make_run(["a", "b"], [(0, 20)])).page.read_text()


def test_narrow_plots_have_a_legend_on_the_page(report: WrittenReport) -> None:
    legends = re.findall(r'<ul class="legend narrow">(.*?)</ul>', page_of(report))
    has_mixture = len(report.metrics.domains) > 1
    assert len(legends) == 3 if has_mixture else 2
    assert [legend.count("<li>") for legend in legends] == ([10, 11, 3] if has_mixture else [1, 3])
    assert "broadcast" in legends[-1]
    assert "var(--d4)" in legends[-1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"root": "/data", "sets": {}}, "/data"),
        ({"root": None, "sets": {"web": {"root": "/a"}, "code": {"root": "/b"}}}, "web: /a, code: /b"),
    ],
)
def test_the_page_names_the_data_root_or_that_of_every_set(
    make_run: RunMaker, data: dict[str, object], expected: str
) -> None:
    run = make_run(["en"], [(0, 4)])
    run.config.write_text(dump_yaml({**load_yaml(run.config), "data": data}))
    metrics = load_run_metrics(run)
    summary = summarize_run(metrics)
    page = render_page(metrics, summary, project_run(metrics, summary), {})
    assert f"<dt>Data</dt><dd>{expected}</dd>" in page
