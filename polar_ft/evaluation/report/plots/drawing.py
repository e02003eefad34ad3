"""From matplotlib figures to SVG inside a page and to PNG files.

matplotlib is used without pyplot: no global state, no window system, and a report can be made in any thread.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Fonts that hold Chinese, Japanese and Korean, on the systems that people use; the first one found is taken.
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti TC",
    "Arial Unicode MS",
)


@dataclass(frozen=True)
class Theme:
    """Colours of a plot.

    Blue and orange are those of Okabe and Ito ("Color Universal Design", 2008), which people with any
    kind of colour blindness can tell apart; shape and position say the same thing wherever colour does.

    Attributes:
        ink: Text and axes.
        faint: Grid lines and what stands in the background.
        first: The model, the chosen candidate, what is right.
        second: The rejected candidate, what is wrong.
        paper: What lies behind all of it.
    """

    ink: str
    faint: str
    first: str
    second: str
    paper: str


PRINT_THEME = Theme(ink="#1f2328", faint="#8b949e", first="#0072b2", second="#d55e00", paper="#ffffff")

# In SVG every colour is a variable of the page, so that one plot serves its light and its dark look. The
# values that matplotlib draws with are marks for these variables and appear nowhere else.
_VARIABLES = {
    "ink": "#01f0a1",
    "faint": "#01f0a2",
    "first": "#01f0a3",
    "second": "#01f0a4",
    "paper": "#01f0a5",
}
_PAGE_THEME = Theme(**_VARIABLES)

# Turns a text of users into what the medium can show.
Spell = Callable[[str], str]
# Draws on an empty figure.
Draw = Callable[[Figure, Theme, Spell], None]


@dataclass(frozen=True)
class Plot:
    """One plot of a report.

    Attributes:
        name: Of the PNG file, and of the SVG's ids.
        title: What it shows.
        explanation: How to read it, one or two sentences.
        alt: What it shows in words, for those who cannot see it.
        size: Width and height in inches.
        draw: Draws it on an empty figure of that size.
        labels: Texts of users that appear in it.
    """

    name: str
    title: str
    explanation: str
    alt: str
    size: tuple[float, float]
    draw: Draw
    labels: tuple[str, ...] = ()


def to_svg(plot: Plot) -> str:
    """The plot as an `<svg>` element to stand inside a page that defines `--ink` and the other colours.

    Texts stay text, set in the page's font, so that a browser finds a font for every script and a reader
    can search and copy them.
    """
    with _settings({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        figure = Figure(figsize=plot.size, layout="constrained", facecolor="none")
        plot.draw(figure, _PAGE_THEME, str)
        stream = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _for_page(stream.getvalue(), plot)


def to_png(plot: Plot, dpi: int = 220) -> bytes:
    """The plot as a PNG with its title, on white.

    A text of users for which no font at hand has the characters is drawn as the number it has in the plot,
    "#3", not as a row of boxes.

    Args:
        plot: What to draw.
        dpi: Pixels to an inch.
    """
    numbers = {label: f"#{i}" for i, label in enumerate(plot.labels) if not can_draw(label)}
    with _settings({}):
        figure = Figure(figsize=plot.size, layout="constrained", facecolor=PRINT_THEME.paper)
        plot.draw(figure, PRINT_THEME, lambda label: numbers.get(label, label))
        # Title of the legend and not of the figure, which would lie on the legend.
        title = plot.title if can_draw(plot.title) else plot.name
        for legend in figure.legends:
            legend.set_title(title, prop=font_manager.FontProperties(size=11))
            legend.set_alignment("left")
        stream = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def can_draw(text: str) -> bool:
    """Whether the fonts at hand have a glyph for every character, so that a PNG shows no boxes.

    >>> can_draw("plain text")
    True
    """
    return all(any(ord(char) in glyphs for glyphs in _glyphs()) for char in text if not char.isspace())


@contextmanager
def _settings(more: dict[str, Any]) -> Iterator[None]:
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A missing glyph is warned of once a character and text; `can_draw` deals with it beforehand, and in
        # SVG the browser chooses the font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        settings: dict[Any, Any] = {
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 11,
            "font.family": _font_families(),
            "font.size": 11,
            "legend.fontsize": 11,
            "legend.frameon": False,
            # A subset may be called "$x$".
            "text.parse_math": False,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            **more,
        }
        matplotlib.rcParams.update(settings)
        yield


def _for_page(svg: str, plot: Plot) -> str:
    """Takes the `<svg>` element out of the file and makes it fit for a page with others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # A style element inside a page's SVG holds for the whole page.
    svg = re.sub(r'<style type="text/css">.*?</style>\s*', "", svg, count=1, flags=re.DOTALL)
    # Ids are the page's: those of two plots must differ. `<g id="axes_1">` serves nobody.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' id="([^"]*)"', rf' id="{plot.name}-\1"', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{plot.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{plot.name}-", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # matplotlib 3.8 writes "font: 10px 'DejaVu Sans'", 3.11 a property for each.
    svg = re.sub(r"font: ([^';\"]*?px) [^;\"]*", r"font: \1 var(--font)", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", svg)
    for name, mark in _VARIABLES.items():
        svg = svg.replace(mark, f"var(--{name})")
    _, _, inside = svg.partition(">")
    width, height = plot.size
    box = f"0 0 {round(72 * width, 3):g} {round(72 * height, 3):g}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(plot.alt)}">{inside.rstrip()}'


@lru_cache(maxsize=1)
def _font_families() -> list[str]:
    known = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in _CJK_FONTS if name in known][:1]]


@lru_cache(maxsize=1)
def _glyphs() -> list[frozenset[int]]:
    """The characters that each of the fonts has."""
    found = []
    for family in _font_families():
        path = font_manager.findfont(font_manager.FontProperties(family=family))
        found.append(frozenset(font_manager.get_font(path).get_charmap()))
    return found
