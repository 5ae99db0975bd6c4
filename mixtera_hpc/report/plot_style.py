"""The look of all plots, and a figure as PNG or as SVG that takes its colours from the page it stands in.

Figures are drawn in the colours of `LIGHT`; in SVG each becomes a CSS variable, so one drawing serves light and dark.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixtera_hpc.report.domain_groups import MAX_BANDS

__all__ = [
    "DARK",
    "INK",
    "LIGHT",
    "LINE",
    "MUTED",
    "PALETTE",
    "SURFACE",
    "group_color",
    "save_png",
    "to_svg",
    "use_plot_style",
]

SURFACE, INK, MUTED, LINE = "#fffffe", "#1b1f24", "#69707a", "#e4e7eb"
PALETTE = (
    *("#3e6fd8", "#ef9f20", "#e4604e", "#45b5a2", "#8a5bd1", "#5aa746", "#e77bab", "#7db7ee", "#9a6c4c"),
    *("#b4bac2",),
)
"""One colour per band, and the grey of `other`; a tenth domain takes the grey."""
LIGHT = {"surface": SURFACE, "ink": INK, "muted": MUTED, "line": LINE, **{f"d{i}": c for i, c in enumerate(PALETTE)}}
"""CSS variable → colour."""
DARK = {
    "surface": "#15181d",
    "ink": "#e8eaed",
    "muted": "#969ea9",
    "line": "#2b3038",
    **{f"d{i}": c for i, c in enumerate(PALETTE)},
    "d0": "#6b94f0",
    "d4": "#a781e6",
    "d8": "#b88a69",
    "d9": "#6d747e",
}
_STYLE = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


@contextmanager
def use_plot_style() -> Iterator[None]:
    """The settings that figures are made and saved under."""
    with rc_context(_STYLE):
        yield


def group_color(position: int) -> str:
    """The palette's colour for a band."""
    return PALETTE[min(position, MAX_BANDS)]


def save_png(figure: Figure, path: Path) -> None:
    """The figure in its light colours, sharp on any screen."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=200)


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element to stand inside a page that defines `--surface`, `--ink`, `--d0` and so on."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": title + str(figure.get_size_inches())}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z.]+\w*_\d+"', "", text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', text, count=1)
    text = text.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for name, color in LIGHT.items():
        text = text.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", text)
