"""What the pictures of all tasks share."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..checkpoint import atomic_file

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches. Without pyplot: nothing global is changed, and no display is looked for."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all. Raises OSError."""
    with atomic_file(path) as fresh:
        figure.savefig(fresh, dpi=120)


def count_in_doublings(axes: Axes, ticks: list[int]) -> None:
    """A logarithmic x axis of token counts with these ticks, thinned out to at most 12."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks[:: -(-len(ticks) // 12)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
