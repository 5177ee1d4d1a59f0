"""table3.png: the validation loss of each row here, beside the paper's perplexity of the same row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..common.pictures import picture, without_outliers
from ..evaluation.estimates import Estimate
from .paper import BASE, ROWS
from .results import STANDARD_ERRORS, RowResult, difference_to_base

COLORS = {"baselines": "tab:gray", "memories": "tab:blue", "ablations": "tab:orange", "stage 2": "tab:green"}


class Line(NamedTuple):
    """What is drawn of a row. `losses`: of each seed; `difference`: to the row that all are compared with, paired by
    seed; `state`: what is said where there is no mean."""

    key: str
    mean: Estimate | None
    difference: Estimate | None
    losses: Sequence[float] = ()
    state: str = "not finished"


class Point(NamedTuple):
    """A number of the row at height `place`, with bars of `STANDARD_ERRORS` standard errors where they are known."""

    place: float
    color: str
    group: str
    estimate: Estimate
    words: str
    reach: float = -math.inf  # of what else is drawn in the row

    @property
    def error(self) -> float:
        known = math.isfinite(self.estimate.standard_error)
        return STANDARD_ERRORS * self.estimate.standard_error if known else 0.0


def describe_lines(results: Sequence[RowResult]) -> list[Line]:
    return [
        Line(
            result.key, result.mean, difference_to_base(result, results),
            [loss for loss in result.losses.values() if math.isfinite(loss)],
            "failed" if result.failures or result.losses else "not finished",
        )
        for result in results
    ]  # fmt: skip


def draw_table(path: Path, lines: Sequence[Line], *, scale: str) -> None:
    """One line for each row from top to bottom; groups differ by colour. Raises OSError.

    From left to right: the loss of each row and seed; how much it is above or below that of the row that all are
    compared with (the dashed line), which is what the verdicts go by; the paper's perplexity.
    """
    title = f"Table 3 at scale {scale}; bars: ± {STANDARD_ERRORS:g} standard errors over seeds. Further left is better"
    with picture(path, title, height=2 + 0.26 * len(lines)) as figure:
        losses, differences, paper = figure.subplots(1, 3, sharey=True, width_ratios=[5, 5, 4])
        places = _find_places(lines)
        losses.set_yticks(list(places.values()), [ROWS[key].title for key in places])
        losses.set_ylim(max(places.values()) + 0.6, -0.6)
        points: dict[Axes, list[Point]] = {losses: [], differences: [], paper: []}
        for line in lines:
            row, place = ROWS[line.key], places[line.key]
            color = COLORS[row.group]
            losses.get_yticklabels()[list(places).index(line.key)].set_color(color)
            if line.mean is None or not math.isfinite(line.mean.value):
                where = {"transform": losses.get_yaxis_transform(), "va": "center", "color": color}
                losses.text(0.03, place, line.state, **where)
            else:
                reach = max(line.losses, default=-math.inf)
                points[losses].append(Point(place, color, row.group, line.mean, f"{line.mean.value:.3f}", reach))
                for loss in line.losses:
                    losses.plot(loss, place, "x", color="0.6", label="a seed", zorder=1)
            if line.difference is not None and math.isfinite(line.difference.value):
                words = f"{line.difference.value:+.3f}"
                points[differences].append(Point(place, color, row.group, line.difference, words))
            if row.c4_perplexity is not None:
                alone = Estimate(row.c4_perplexity, math.nan)
                points[paper].append(Point(place, color, row.group, alone, f"{row.c4_perplexity:.2f}"))
        base = next((line.mean.value for line in lines if line.key == BASE and line.mean is not None), None)
        for axes, reference in ((losses, base), (differences, 0.0), (paper, ROWS[BASE].c4_perplexity)):
            _draw_points(axes, points[axes], reference)
        losses.set_title("here")
        losses.set_xlabel("validation bits per byte")
        differences.set_title(f"here, less {ROWS[BASE].title},\npaired by seed")
        differences.set_xlabel("bits per byte")
        paper.set_title("paper, 150M parameters\n(arXiv 2511.07343)")
        paper.set_xlabel("perplexity on C4")


def _find_places(lines: Iterable[Line]) -> dict[str, float]:
    """The height of each row, with some space between groups."""
    places: dict[str, float] = {}
    height, group = 0.0, None
    for line in lines:
        if group is not None and ROWS[line.key].group != group:
            height += 0.5
        places[line.key], group = height, ROWS[line.key].group
        height += 1.0
    return places


def _draw_points(axes: Axes, points: Sequence[Point], reference: float | None) -> None:
    """The points of a panel; an outlier, which would squeeze the others, is an arrow at the edge with its number."""
    kept = sorted(without_outliers([point.estimate.value for point in points]))
    ends = [] if reference is None or not math.isfinite(reference) else [reference]
    for point in points:
        value = point.estimate.value
        if not kept[0] <= value <= kept[-1]:
            right = value > kept[-1]
            axes.plot(
                0.97 if right else 0.03, point.place, ">" if right else "<", color=point.color, clip_on=False,
                transform=axes.get_yaxis_transform(), label="beyond the axis, with its number", linestyle="none",
            )  # fmt: skip
            axes.text(
                0.92 if right else 0.08, point.place, point.words, transform=axes.get_yaxis_transform(), va="center",
                ha="right" if right else "left", color=point.color, fontsize=8,
            )  # fmt: skip
            continue
        axes.errorbar(value, point.place, xerr=point.error or None, fmt="o", color=point.color, label=point.group)
        ends += [value - point.error, value + point.error, max(value, point.reach)]
        axes.annotate(
            point.words, (max(point.reach, value + point.error), point.place), (5, 0), textcoords="offset points",
            va="center", color=point.color, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    if ends:
        span = max(ends) - min(ends) or 1.0
        axes.set_xlim(min(ends) - 0.08 * span, max(ends) + 0.35 * span)  # with room for the last number
    if reference is not None and math.isfinite(reference):
        axes.axvline(reference, color="black", linestyle="--", linewidth=0.8, zorder=0, label=ROWS[BASE].title)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
