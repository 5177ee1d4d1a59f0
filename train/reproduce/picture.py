"""table3.png: the validation loss of each row here, beside the paper's perplexity of the same row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..evaluation.estimates import Estimate
from ..evaluation.figures import new_figure, save_figure
from .paper import BASE, ROWS
from .results import STANDARD_ERRORS, RowResult, difference_to_base

COLORS = {"baselines": "tab:gray", "memories": "tab:blue", "ablations": "tab:orange", "stage 2": "tab:green"}


def draw_table(path: Path, results: Sequence[RowResult], *, scale: str) -> None:
    """One line for each row from top to bottom; groups differ by colour. Raises OSError.

    From left to right: the loss of each row and seed; how much it is above or below that of the row that all are
    compared with (the dashed line), in pairs of one seed, which is what the verdicts go by; the paper's perplexity.
    """
    figure = new_figure(14.5, 1.6 + 0.36 * len(results))
    losses, differences, paper = figure.subplots(1, 3, sharey=True, width_ratios=[5, 5, 4])
    places = _places(results)
    for result in results:
        color, place = COLORS[ROWS[result.key].group], places[result.key]
        _draw_losses(losses, place, result, color)
        difference = difference_to_base(result, results)
        if difference is not None and math.isfinite(difference.value):
            _draw_estimate(
                differences, place, difference, color, bars=STANDARD_ERRORS, words=f"{difference.value:+.3f}"
            )
        number = ROWS[result.key].c4_perplexity
        if number is not None:
            _draw_estimate(paper, place, Estimate(number, math.nan), color, words=f"{number:.2f}")
    base = next((r.mean for r in results if r.key == BASE), None)
    _draw_line(losses, None if base is None else base.value)
    _draw_line(differences, 0.0)
    _draw_line(paper, ROWS[BASE].c4_perplexity)
    losses.set_yticks(list(places.values()), [ROWS[key].title for key in places])
    for label, key in zip(losses.get_yticklabels(), places, strict=True):
        label.set_color(COLORS[ROWS[key].group])
    losses.set_ylim(max(places.values()) + 0.6, -0.6)
    losses.set_title(f"here, scale {scale}: mean ± standard error, and each seed", fontsize=10)
    losses.set_xlabel("validation bits per byte")
    differences.set_title(f"here: less {ROWS[BASE].title}, by seed, ± {STANDARD_ERRORS:g} SE", fontsize=10)
    differences.set_xlabel("difference in bits per byte")
    paper.set_title("paper, 150M parameters (arXiv 2511.07343)", fontsize=10)
    paper.set_xlabel("perplexity on C4")
    for axes in (losses, differences, paper):
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.14)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("further left is better", fontsize=10, color="0.35")
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


def _draw_losses(axes: Axes, place: float, result: RowResult, color: str) -> None:
    losses = [loss for loss in result.losses.values() if math.isfinite(loss)]
    if not losses or not math.isfinite(result.mean.value):
        words = "failed" if result.failures or result.losses else "not finished"
        axes.text(0.02, place, words, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=color)
        return
    axes.plot(losses, [place] * len(losses), ".", color=color, alpha=0.35, markersize=6)
    _draw_estimate(axes, place, result.mean, color, words=f"{result.mean.value:.3f}", right_of=max(losses))


def _draw_estimate(
    axes: Axes, place: float, estimate: Estimate, color: str, *, words: str, bars: float = 1.0,
    right_of: float = -math.inf,
) -> None:  # fmt: skip
    """A point with a bar of `bars` standard errors to either side, if they are known, and its number behind it."""
    error = bars * estimate.standard_error if math.isfinite(estimate.standard_error) else 0.0
    bar = {"xerr": error, "capsize": 3, "elinewidth": 1.4} if error else {}
    axes.errorbar(estimate.value, place, fmt="o", color=color, markersize=6.5, **bar)
    axes.annotate(
        words, (max(right_of, estimate.value + error), place), (8, 0), textcoords="offset points", va="center",
        fontsize=8.5, color=color, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _draw_line(axes: Axes, x: float | None) -> None:
    """What a row is compared with."""
    if x is not None and math.isfinite(x):
        axes.axvline(x, color="tab:blue", linestyle="--", linewidth=0.9, zorder=0)
