"""The picture of a run: training loss and validation scores, and below them whether its memories learn."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..common.pictures import COLORS, REFERENCE, make_y_logarithmic, picture
from .health import HARDLY_LEARNS, LOSS_RATIO, QUANTITIES, STATE_NORM, Quantity, Reading, read_health
from .state import Score

# Of scores when all colours are used up.
MARKERS = "os^vDP*X"


def save_plot(path: Path, log: list[dict[str, Any]], scores: list[Score]) -> None:
    """Draw a PNG to `path`.

    Args:
        log: the records of log.jsonl: `event` is "step", "memory_health" or "validation".
        scores: the validation scores that are part of the results.
    """
    health = read_health(log)
    heights = [4 + 0.2 * len(scores), 3.6][: 2 if health else 1]
    title = "Loss in training" + (", and whether memories learn while they read" if health else "")
    with picture(path, title, height=sum(heights)) as figure:
        upper, *lower = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
        panels = [upper.subplots()]
        _draw_loss(panels[0], log, scores)
        for part in lower:
            below = part.subplots(1, len(QUANTITIES))
            for axes, quantity in zip(below, QUANTITIES, strict=True):
                _draw_health(axes, health, quantity)
            panels += list(below)
        for axes in panels:
            axes.set_xlabel("training tokens")
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            for swap in _find_swaps(log):
                axes.axvline(swap, linestyle=":", label="a later stage begins", **REFERENCE)


def _find_swaps(log: list[dict[str, Any]]) -> list[int]:
    """Tokens trained on when a stage after the first began."""
    last: dict[str, int] = {}
    for record in log:
        if record["event"] == "step":
            last[record["stage"]] = record["tokens"]
    return list(last.values())[:-1]


def _draw_loss(axes: Axes, log: list[dict[str, Any]], scores: list[Score]) -> None:
    steps = [record for record in log if record["event"] == "step"]
    tokens, losses = (np.array([record[name] for record in steps]) for name in ("tokens", "bits_per_byte"))
    span = max(1, round(len(steps) / 30))
    smoothed = exponential_mean(losses, span)
    axes.plot(tokens, losses, color=COLORS[0], alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(tokens, smoothed, color=COLORS[0], label=f"training, exponential mean over {span} steps")
    measured = {record["name"]: record for record in log if record["event"] == "validation"}
    for i, score in enumerate(scores):
        error = f" ± {score.standard_error:.3f}" if math.isfinite(score.standard_error) else ""
        label = f"validation {score.label}: {score.bits_per_byte:.3f}{error}"
        if score.key not in measured:  # of no step of the run: the bigram model
            axes.axhline(score.bits_per_byte, color="tab:gray", linestyle="--", label=label)
            continue
        # Two scores have one place at the end of a stage, the second at the chunks of the next: a ring around a point.
        place = measured[score.key]
        ring = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.5} if place["step"] == 0 else {}
        color, marker = COLORS[(i + 1) % len(COLORS)], MARKERS[(i + 1) // len(COLORS) % len(MARKERS)]
        axes.plot(
            place["tokens"], score.bits_per_byte, marker, color=color, linestyle="none", label=label, zorder=3,
            **({"markersize": 5} | ring),
        )  # fmt: skip
    values = [value for value in (score.bits_per_byte for score in scores) if math.isfinite(value)]
    shown = [*smoothed, *values]
    # The first steps, at the logarithm of the vocabulary, would flatten everything that is of interest.
    top = min(max(shown), 1.5 * max(values, default=math.inf))
    axes.set_ylim(min([*shown, *losses]) - 0.15, top + 0.15)
    above = int((losses > top + 0.15).sum())
    if above:
        axes.set_title(f"{above} of {len(losses)} steps, up to {losses.max():.2f}, lie above this picture")
    axes.set_ylabel("bits per byte")


def _draw_health(axes: Axes, health: dict[str, list[Reading]], quantity: Quantity) -> None:
    """One line for each layer and memory; the memories differ by colour, the layers by shade."""
    layers, memories = (list(dict.fromkeys(key.split("/")[part] for key in health)) for part in (0, 1))
    drawn = []
    for key, readings in health.items():
        layer, memory = key.split("/")
        values = [quantity.of(reading.values) for reading in readings]
        drawn += [value for value in values if value > 0]
        axes.plot(
            [reading.tokens for reading in readings], values, color=COLORS[memories.index(memory) % len(COLORS)],
            alpha=0.35 + 0.65 * (1 + layers.index(layer)) / len(layers), marker=".", linewidth=1,
            label=f"{memory} memory, darker in later layers" if layer == layers[-1] else None,
        )  # fmt: skip
    axes.set_title(f"{quantity.title}\n{quantity.good}")
    if quantity is LOSS_RATIO:
        axes.axhline(HARDLY_LEARNS, linestyle="--", label=f"{HARDLY_LEARNS}: hardly learns above it", **REFERENCE)
    elif quantity is STATE_NORM:
        axes.axhline(1, linestyle="-.", label="1: where the state begins", **REFERENCE)
    if drawn and max(drawn) > 10 * min(drawn):
        make_y_logarithmic(axes)


def exponential_mean(values: np.ndarray, span: int) -> np.ndarray:
    """The mean of all values so far, each weighted by exp(−its age / span)."""
    decay = math.exp(-1 / span)
    totals = np.array(list(accumulate(values, lambda total, value: decay * total + value)))
    return totals / np.cumsum(decay ** np.arange(len(values)))
