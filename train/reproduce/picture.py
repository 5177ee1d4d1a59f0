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
from .paper import BASE, HYBRIDS, ROWS
from .results import STANDARD_ERRORS, RowResult, difference_to_base

COLORS = {
    "baselines": "tab:gray", "memories": "tab:blue", "ablations": "tab:orange", "stage 2": "tab:green",
    HYBRIDS: "tab:purple",
}  # fmt: skip


class Line(NamedTuple):
    """What is drawn of a row. `losses`: of each seed; `difference`: to the row that all are compared with, paired by
    seed; `state`: what is said where there is no mean."""

    key: str
    mean: Estimate | None
    difference: Estimate | None
    losses: Sequence[float] = ()
    state: str = "not finished"


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
    places = _find_places(lines)
    means = {line.key: line.mean for line in lines}
    papers = {line.key: _exactly(ROWS[line.key].c4_perplexity) for line in lines}
    with picture(path, title, height=2 + 0.26 * len(lines)) as figure:
        losses, differences, paper = figure.subplots(1, 3, sharey=True, width_ratios=[5, 5, 4])
        losses.set_yticks(list(places.values()), [ROWS[key].title for key in places])
        losses.set_ylim(max(places.values()) + 0.6, -0.6)
        for line, tick in zip(lines, losses.get_yticklabels(), strict=True):
            tick.set_color(_color(line.key))
            if not _is_known(line.mean):
                where = {"transform": losses.get_yaxis_transform(), "va": "center", "color": _color(line.key)}
                losses.text(0.03, places[line.key], line.state, **where)
        seeds = {line.key: line.losses for line in lines if _is_known(line.mean)}
        _draw_panel(losses, places, means, "{:.3f}", means.get(BASE), seeds)
        _draw_panel(differences, places, {line.key: line.difference for line in lines}, "{:+.3f}", _exactly(0.0), {})
        _draw_panel(paper, places, papers, "{:.2f}", _exactly(ROWS[BASE].c4_perplexity), {})
        losses.set_title("here")
        losses.set_xlabel("validation bits per byte")
        differences.set_title(f"here, less {ROWS[BASE].title},\npaired by seed")
        differences.set_xlabel("bits per byte")
        paper.set_title("paper, 150M parameters\n(arXiv 2511.07343)")
        paper.set_xlabel("perplexity on C4")


def _exactly(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value, math.nan)


def _is_known(estimate: Estimate | None) -> bool:
    return estimate is not None and math.isfinite(estimate.value)


def _color(key: str) -> str:
    return COLORS[ROWS[key].group]


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


def _draw_panel(
    axes: Axes, places: dict[str, float], estimates: dict[str, Estimate | None], form: str, reference: Estimate | None,
    seeds: dict[str, Sequence[float]],
) -> None:  # fmt: skip
    """Each row's estimate with its number and a bar of `STANDARD_ERRORS` standard errors where they are known, over the
    losses of its seeds. An outlier, which would squeeze the others, is an arrow at the edge."""
    known = {key: estimate for key, estimate in estimates.items() if _is_known(estimate)}
    kept = without_outliers([estimate.value for estimate in known.values()])
    ends = [reference.value] if _is_known(reference) else []
    for key, losses in seeds.items():
        for loss in losses:
            axes.plot(loss, places[key], "x", color="0.6", label="a seed", zorder=1)
    for key, (value, error) in known.items():
        place, words = places[key], form.format(value)
        style = {"color": _color(key), "va": "center", "fontsize": 8}
        if value not in kept:
            right, at_edge = value > max(kept), axes.get_yaxis_transform()
            axes.plot(
                0.97 if right else 0.03, place, ">" if right else "<", color=_color(key), clip_on=False,
                transform=at_edge, label="beyond the axis, with its number", linestyle="none",
            )  # fmt: skip
            side = {"ha": "right" if right else "left", "transform": at_edge}
            axes.text(0.92 if right else 0.08, place, words, **style, **side)
            continue
        bar = STANDARD_ERRORS * error if math.isfinite(error) else 0.0
        axes.errorbar(value, place, xerr=bar or None, fmt="o", color=_color(key), label=ROWS[key].group)
        right = max([value + bar, *seeds.get(key, ())])
        ends += [value - bar, right]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.annotate(words, (right, place), (5, 0), textcoords="offset points", bbox=white, **style)
    if ends:
        span = max(ends) - min(ends) or 1.0
        axes.set_xlim(min(ends) - 0.08 * span, max(ends) + 0.35 * span)  # with room for the last number
    if _is_known(reference):
        axes.axvline(reference.value, color="black", linestyle="--", linewidth=0.8, zorder=0, label=ROWS[BASE].title)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
