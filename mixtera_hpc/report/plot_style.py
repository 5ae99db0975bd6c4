"""Colors and style of all plots, and their export as PNG or as SVG that takes its colors from the surrounding page.

Figures are drawn in the colors of `LIGHT`. In the SVG each color becomes a CSS variable, so that one drawing works on a
light and on a dark page.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "DARK",
    "INK",
    "LIGHT",
    "LINE",
    "MUTED",
    "PALETTE",
    "SURFACE",
    "css_color",
    "group_color",
    "save_png",
    "to_svg",
    "use_plot_style",
]

SURFACE = "#fffffe"
"""Background. Not pure white, so that no other color of a drawing equals it."""
INK = "#1b1f24"
MUTED = "#69707a"
LINE = "#e4e7eb"

PALETTE = (
    *("#3e6fd8", "#ef9f20", "#e4604e", "#45b5a2", "#8a5bd1", "#5aa746", "#e77bab", "#7db7ee", "#9a6c4c"),
    *("#b4bac2",),
)
"""One color per domain group; the last one is the gray of the small domains."""

_PALETTE_VARIABLES = {f"d{i}": color for i, color in enumerate(PALETTE)}

LIGHT = {"surface": SURFACE, "ink": INK, "muted": MUTED, "line": LINE, **_PALETTE_VARIABLES}
"""CSS variable → color on a light page."""

DARK = {
    "surface": "#15181d",
    "ink": "#e8eaed",
    "muted": "#969ea9",
    "line": "#2b3038",
    **_PALETTE_VARIABLES,
    "d0": "#6b94f0",
    "d4": "#a781e6",
    "d8": "#b88a69",
    "d9": "#6d747e",
}
"""CSS variable → color on a dark page."""

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
    """Apply the style within a `with` block; figures must be created and saved inside it."""
    with rc_context(_STYLE):
        yield


def group_color(index: int) -> str:
    """Return the color of a domain group."""
    return PALETTE[index]


def css_color(color: str) -> str:
    """Return the CSS variable of the page for a color of `LIGHT`."""
    return next(f"var(--{name})" for name, value in LIGHT.items() if value == color)


def save_png(figure: Figure, path: Path) -> None:
    """Save the figure in its light colors, at a resolution for high-density screens."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=200)


def to_svg(figure: Figure, title: str) -> str:
    """Return the figure as an `<svg>` element for a page that defines `--surface`, `--ink`, `--d0` and so on.

    The same figure always gives the same text.
    """
    buffer = io.StringIO()
    # A fixed salt makes the ids reproducible; a different one per figure makes them unique within the page.
    with rc_context({"svg.hashsalt": title + str(figure.get_size_inches())}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return _compact(_use_page_style(svg, title))


def _use_page_style(svg: str, title: str) -> str:
    """Remove fixed size, fonts and colors, so that those of the page apply."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    svg = svg.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    for color in LIGHT.values():
        svg = svg.replace(color, css_color(color))
    return svg


def _compact(svg: str) -> str:
    """Remove unused ids, indentation, and all but two decimals of coordinates."""
    svg = re.sub(r' id="[A-Za-z.]+\w*_\d+"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    return re.sub(r"\n\s*", "\n", svg)
