"""table3.png: the validation loss of each row here, beside the paper's perplexity of the same row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ..evaluation.figures import new_figure, save_figure
from .paper import BASE, ROWS
from .results import RowResult

COLORS = {"baselines": "tab:gray", "memories": "tab:blue", "ablations": "tab:orange", "stage 2": "tab:green"}


def draw_table(path: Path, results: Sequence[RowResult], *, scale: str) -> None:
    """One line for each row from top to bottom; groups differ by colour. A dashed line marks the row that all others
    are compared with. Raises OSError."""
    figure = new_figure(11.5, 1.6 + 0.36 * len(results))
    here, paper = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    places = _places(results)
    for result in results:
        _draw_measured(here, places[result.key], result)
        number = ROWS[result.key].c4_perplexity
        if number is not None:
            color = COLORS[ROWS[result.key].group]
            paper.plot(number, places[result.key], "o", color=color, markersize=7)
            paper.annotate(
                f"{number:.2f}", (number, places[result.key]), (7, 0), textcoords="offset points", va="center",
                fontsize=8.5, color=color,
            )  # fmt: skip
    base = next((r for r in results if r.key == BASE), None)
    if base is not None and base.mean is not None and math.isfinite(base.mean.value):
        here.axvline(base.mean.value, color="tab:blue", linestyle="--", linewidth=0.9, zorder=0)
    paper.axvline(ROWS[BASE].c4_perplexity, color="tab:blue", linestyle="--", linewidth=0.9, zorder=0)
    here.set_yticks(list(places.values()), [ROWS[key].title for key in places])
    for label, key in zip(here.get_yticklabels(), places, strict=True):
        label.set_color(COLORS[ROWS[key].group])
    here.set_ylim(-0.6, max(places.values()) + 0.6)
    here.invert_yaxis()
    here.set_title(f"here, scale {scale}: mean ± standard error, and each seed", fontsize=10)
    here.set_xlabel("validation bits per byte (less is better)")
    paper.set_title("paper, 150M parameters (arXiv 2511.07343)", fontsize=10)
    paper.set_xlabel("perplexity on C4 (less is better)")
    for axes in (here, paper):
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.12)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _places(results: Sequence[RowResult]) -> dict[str, float]:
    """The height of each row, with some space between groups."""
    places: dict[str, float] = {}
    height, group = 0.0, None
    for result in results:
        if group is not None and ROWS[result.key].group != group:
            height += 0.5
        places[result.key], group = height, ROWS[result.key].group
        height += 1.0
    return places


def _draw_measured(axes: Axes, place: float, result: RowResult) -> None:
    color, losses = COLORS[ROWS[result.key].group], [x for x in result.losses.values() if math.isfinite(x)]
    if not losses:
        words = "failed" if result.failures else "not yet run"
        axes.text(0.02, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=color)
        return
    axes.plot(losses, [place] * len(losses), ".", color=color, alpha=0.35, markersize=6)
    mean = result.mean
    error = mean.standard_error if math.isfinite(mean.standard_error) else 0.0
    axes.errorbar(mean.value, place, xerr=error, fmt="o", color=color, markersize=7, capsize=3, elinewidth=1.4)
    axes.annotate(
        f"{mean.value:.3f}", (max(*losses, mean.value + error), place), (8, 0), textcoords="offset points",
        va="center", fontsize=8.5, color=color,
    )  # fmt: skip
