"""One style for every picture: width, letters, colours, ticks, error bars, and a legend that covers no data.

What a picture shows is drawn beside the numbers it shows, between `picture` and its end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import cycler, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import Formatter, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from ..evaluation.estimates import Estimate, Proportion
from .files import atomic_file

# Of every picture, in inches: shown 800 pixels wide, letters of 8 points are 11 pixels high.
WIDTH = 8.0
COLORS = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
)  # fmt: skip
BARS = "bars: ± 1 standard error"
# What values are compared with: chance, no difference, another model.
REFERENCE = {"color": "black", "linewidth": 1}
_STYLE = {
    "font.size": 8.5, "figure.titlesize": 10, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "lines.markersize": 4, "lines.linewidth": 1.3, "errorbar.capsize": 2,
    "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 160, "axes.prop_cycle": cycler(color=COLORS),
}  # fmt: skip


@contextmanager
def picture(path: Path, title: str, *, height: float) -> Iterator[Figure]:
    """A figure to draw in, `height` inches high. Then it is written to `path` as a PNG, whole or not at all.

    All that has a label stands in one legend, below the panels; in a figure with subfigures, below those of each.
    Without pyplot: no display is looked for, and nothing global stays changed. Raises OSError.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.suptitle(textwrap.fill(title, 100))
        for part in figure.subfigs or [figure]:
            _add_legend(part)
        with atomic_file(path) as fresh:
            figure.savefig(fresh)


def _add_legend(part: FigureBase) -> None:
    """One entry for each label, curves first; as many columns as the longest leaves room for."""
    drawn = [pair for axes in part.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    entries: dict[str, Artist] = {}
    for handle, label in sorted(drawn, key=lambda pair: not isinstance(pair[0], ErrorbarContainer)):
        entries.setdefault(label, handle)
    if entries:
        columns = max(1, 140 // (max(map(len, entries)) + 8))
        part.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def draw_curves(axes: Axes, curves: Mapping[str, Mapping[float, Estimate | Proportion]]) -> None:
    """A line with error bars of one standard error for each name, from its points by x, on a logarithmic axis. A name
    without points is not drawn, and keeps its colour."""
    colors = assign_colors(curves)
    for i, (name, curve) in enumerate(curves.items()):
        if curve:
            values = np.array([estimate.value for estimate in curve.values()])
            low, high = np.array([estimate.interval() for estimate in curve.values()]).T
            x = move_apart(list(curve), i, len(curves))
            axes.errorbar(x, values, yerr=(values - low, high - values), color=colors[name], label=name, marker="o")


def assign_colors(names: Iterable[str]) -> dict[str, str]:
    """The colour of each name; after the ninth they begin again."""
    return dict(zip(names, cycle(COLORS), strict=False))


def move_apart(x: Sequence[float], index: int, count: int) -> list[float]:
    """The positions on a logarithmic axis of curve `index` of `count`, so that their bars do not cover each other."""
    return [value * 1.04 ** (index - (count - 1) / 2) for value in x]


def count_tokens(axes: Axes, ticks: Sequence[int]) -> None:
    """A logarithmic x axis of token counts with these ticks, thinned out to at most 8."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks[:: -(-len(ticks) // 8) or 1])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_count(round(x))))


def make_y_logarithmic(axes: Axes, formatter: Formatter | None = None) -> None:
    """With several ticks, however little of the axis is shown."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogTicks())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(formatter or FuncFormatter(lambda y, _: f"{y:,.12g}"))


class LogTicks(Locator):
    """Powers of ten; with less than three of them in view, their doubles and fives too; otherwise equal steps."""

    def __call__(self) -> Sequence[float]:
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        low, high = sorted((vmin, vmax))
        for subs in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            ticks = [x for x in LogLocator(subs=subs, numticks=12).tick_values(low, high) if low <= x <= high]
            if len(ticks) >= 3:
                return ticks
        return [x for x in MaxNLocator(4).tick_values(low, high) if low <= x <= high]


def without_outliers(values: Sequence[float]) -> list[float]:
    """Those inside of Tukey's outer fences, three interquartile ranges from the quartiles; others would squeeze them on
    an axis."""
    if not values:
        return []
    low, high = np.quantile(values, (0.25, 0.75))
    reach = 3 * (high - low) or np.inf
    return [value for value in values if low - reach <= value <= high + reach]


def short_count(count: int) -> str:
    """A number of tokens: 16k is 16,384, 1M is 1,048,576."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
