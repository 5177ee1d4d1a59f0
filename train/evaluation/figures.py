"""What the pictures of all tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..checkpoint import atomic_file
from .estimates import Estimate

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


def draw_curve(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], *, color: str, label: str) -> None:
    """Points joined by lines, with a bar of one standard error to either side."""
    axes.errorbar(
        x, [e.value for e in estimates], yerr=[e.standard_error for e in estimates], color=color, label=label,
        marker="o", markersize=4, linewidth=1.3, elinewidth=1, capsize=2,
    )  # fmt: skip


def add_legend(axes: Axes, loc: str = "best") -> None:
    """A legend in which the models come before the lines to compare them with."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(handles)), key=lambda i: not isinstance(handles[i], ErrorbarContainer))
    axes.legend([handles[i] for i in order], [labels[i] for i in order], loc=loc, fontsize=8.5)
