"""Line plots with confidence bands: one look for everything that is drawn over the rank.

matplotlib by its objects only, without pyplot: no window, and no state that outlives a figure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from adapters.errors import AdapterError

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
"""Okabe and Ito's colours, which people with any of the common colour blindnesses can tell apart; without their yellow,
which is too faint for a line on white, and with a grey in its place."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK = "#333333"
_GREY = "#767676"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "text.parse_math": False,  # names of files and adapters may hold any sign, dollars too
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "dylora",
}
_FAR = 2.0
"""A level farther from the curves than this times their own height would flatten them: it is named at the edge instead."""


_MOST_INSIDE, _LEGEND_INCHES = 5, 2.3
"""Lines whose legend stands inside of a panel, where a corner is free as a rule; of more it stands beside them all, so wide."""
_CAPTION_LETTERS_PER_INCH = 17
_LABEL_HEIGHT = 0.055
"""Of a level's label, as a share of the axes' height."""


@dataclass(frozen=True)
class Series:
    """One line: `y` over `x`, both of one length, perhaps with a band from `low` to `high`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Level:
    """A value that does not depend on x: a dashed line over the whole width, with its label."""

    label: str
    y: float


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        series: in the order of the palette; one alone needs no legend.
        x_label, y_label: with the unit.
        levels: lines to compare with. One far from every series is named at the edge, with its value, instead.
        log2_x: a logarithmic axis whose ticks are powers of two, for ranks.
    """

    series: Sequence[Series]
    x_label: str
    y_label: str
    title: str = ""
    levels: Sequence[Level] = ()
    log2_x: bool = False


def panels(
    content: Sequence[Panel], *, columns: int = 3, title: str = "", caption: str = "", inches: tuple[float, float] = (3.9, 3.1)
) -> Figure:
    """Panels side by side, row after row.

    Args:
        content: at least one.
        columns: most panels in a row.
        title: above all of them.
        caption: below, for what holds for all: intervals, sample sizes.
        inches: width and height of one panel.
    """
    columns = min(columns, len(content))
    rows = -(-len(content) // columns)
    with rc_context(_STYLE):
        caption = fill(caption, width=round(_CAPTION_LETTERS_PER_INCH * inches[0] * columns))
        extra = 0.3 * bool(title) + (0.15 * caption.count("\n") + 0.25) * bool(caption)
        names = [[each.label for each in panel.series] for panel in content]
        is_beside = len(names[0]) > _MOST_INSIDE and all(each == names[0] for each in names)
        width = inches[0] * columns + _LEGEND_INCHES * is_beside
        figure = Figure(figsize=(width, inches[1] * rows + extra), layout="constrained")
        if title:
            figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        if caption:
            figure.supxlabel(caption, fontsize=7.5, color=_GREY, x=0.01, ha="left")
        for number, panel in enumerate(content):
            has_legend = not is_beside and names[number] not in names[:number]  # the same lines again need no second legend
            draw(figure.add_subplot(rows, columns, number + 1), panel, has_legend=has_legend)
        if is_beside:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw(axes: Axes, panel: Panel, *, has_legend: bool = True) -> None:
    """Draw a panel on axes of any figure; a single line has no legend in any case."""
    for number, each in enumerate(panel.series):
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        axes.plot(each.x, each.y, color=colour, marker=marker, markersize=4, linewidth=1.6, label=each.label, zorder=3)
        if each.low is not None and each.high is not None:
            axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    _draw_levels(axes, panel)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.title:
        axes.set_title(panel.title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    _set_x_ticks(axes, sorted({x for each in panel.series for x in each.x}), panel.log2_x)
    if has_legend and len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=8)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as the suffix says, .png or .svg; the same figure gives the same bytes.

    Raises:
        AdapterError: another suffix, or the file can't be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise AdapterError(f"{path}: a plot is written as .png or .svg")
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    try:
        with rc_context(_STYLE):
            figure.savefig(path, format=path.suffix[1:], dpi=160, metadata=metadata)
    except OSError as error:
        raise AdapterError(f"{path}: the plot can't be written ({error})") from error


def _draw_levels(axes: Axes, panel: Panel) -> None:
    """Lines with their labels in the right margin; what is far away is named at the edge."""
    bounds = [y for s in panel.series for y in (*s.y, *(s.low or ()), *(s.high or ()))]
    low, high = min(bounds), max(bounds)
    reach = _FAR * ((high - low) or abs(high) or 1.0)
    above = [level for level in panel.levels if level.y > high + reach]
    below = [level for level in panel.levels if level.y < low - reach]
    near = sorted((level for level in panel.levels if low - reach <= level.y <= high + reach), key=lambda level: level.y)
    for level in near:
        axes.axhline(level.y, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    bottom, top = axes.get_ylim()
    lowest = -1.0
    for level in near:
        place = max((level.y - bottom) / (top - bottom), lowest)  # labels of levels that nearly touch stand above each other
        lowest = place + _LABEL_HEIGHT
        axes.text(1.01, place, level.label, transform=axes.transAxes, ha="left", va="center", fontsize=7.5, color=_GREY)
    for levels, arrow, y, anchor in ((above, "↑", 1.0, "top"), (below, "↓", 0.0, "bottom")):
        if levels:
            text = "\n".join(f"{arrow} {level.label}: {level.y:.4g}" for level in levels)
            axes.text(0.99, y, text, transform=axes.transAxes, ha="right", va=anchor, fontsize=7.5, color=_GREY)


def _set_x_ticks(axes: Axes, values: Sequence[float], log2_x: bool) -> None:
    if not log2_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=all(float(x).is_integer() for x in values)))
        return
    axes.set_xscale("log", base=2)
    powers = [2.0**n for n in range(31) if values[0] <= 2**n <= values[-1]]
    axes.xaxis.set_major_locator(FixedLocator(sorted({values[0], values[-1], *powers})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
