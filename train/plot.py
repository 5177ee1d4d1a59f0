"""The picture of a run: training loss and validation scores, and below them how the memories' inner loops did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .state import Score

# Title and formula of each panel; the names are those of `memory_health`.
HEALTH_PANELS = {
    "step": ("inner step size", lambda h: h["step_size"]),
    "norm": ("state norm / initial norm", lambda h: h["state_norm"]),
    "loss": ("inner loss after / before update", lambda h: h["loss_after"] / h["loss_before"]),
}
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def save_plot(path: Path, log: list[dict[str, Any]], scores: list[Score]) -> None:
    """Draw a PNG to `path`.

    Args:
        log: the records of log.jsonl: `event` is "step", "memory_health" or "validation".
        scores: the validation scores that are part of the results.
    """
    # Figure and canvas without pyplot: nothing global is changed, and no display is looked for.
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, *health = figure.subplot_mosaic([["training"] * 3, [*HEALTH_PANELS]], height_ratios=[3, 2]).values()
    swaps = _swap_positions(log)
    _draw_loss(loss, [r for r in log if r["event"] == "step"], scores)
    for axes, (title, formula) in zip(health, HEALTH_PANELS.values(), strict=True):
        _draw_health(axes, [r for r in log if r["event"] == "memory_health"], formula, title)
    for axes in (loss, *health):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        for swap in swaps:
            axes.axvline(swap, color="black", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=120)


def _swap_positions(log: list[dict[str, Any]]) -> list[int]:
    """Tokens trained on when a stage after the first began."""
    last: dict[str, int] = {}
    for record in log:
        if record["event"] == "step":
            last[record["stage"]] = record["tokens"]
    return list(last.values())[:-1]


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], scores: list[Score]) -> None:
    tokens = np.array([r["tokens"] for r in steps])
    values = np.array([r["bits_per_byte"] for r in steps])
    axes.plot(tokens, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens, _smooth(values), color="tab:blue", label="training (smoothed)")
    ends = {}
    for record in steps:
        ends[record["stage"]] = record["tokens"]
    markers = iter("ovs^D")
    for i, (key, label, value) in enumerate(scores):
        if key == "bigram":
            axes.axhline(value, color="tab:gray", linestyle="--", label=f"{label}: {value:.3f}")
            continue
        stage = key.removeprefix("after_").partition("_at_")[0]
        axes.plot(
            ends[stage], value, next(markers), color=COLORS[i % len(COLORS)], markersize=7, linestyle="none",
            label=f"validation {label}: {value:.3f}",
        )  # fmt: skip
    shown = np.concatenate([_smooth(values), [value for *_, value in scores]])
    # The first steps, at the logarithm of the vocabulary, would flatten everything that is of interest.
    axes.set_ylim(shown.min() - 0.15, min(shown.max(), 1.5 * max(value for *_, value in scores)) + 0.15)
    axes.set_ylabel("bits per byte")
    axes.set_title("Loss; the dotted line is the swap to smaller local chunks")
    axes.legend(loc="upper right", fontsize=9)


def _draw_health(
    axes: Axes, records: list[dict[str, Any]], formula: Callable[[dict[str, float]], float], title: str
) -> None:
    """One line for each layer and memory; the memories differ by colour, the layers by shade."""
    lines = defaultdict(list)
    for record in records:
        memories: dict[str, dict[str, float]] = defaultdict(dict)
        for key, value in record.items():
            memory, slash, quantity = key.rpartition("/")
            if slash:
                memories[memory][quantity] = np.nan if value is None else value
        for memory, values in memories.items():
            lines[memory].append((record["tokens"], formula(values)))
    memories = list(dict.fromkeys(key.split("/")[1] for key in lines))
    layers = list(dict.fromkeys(key.split("/")[0] for key in lines))
    for key, points in lines.items():
        layer, memory = key.split("/")
        axes.plot(
            *zip(*points, strict=True), color=COLORS[memories.index(memory) % len(COLORS)],
            alpha=0.35 + 0.65 * (1 + layers.index(layer)) / len(layers), marker=".", markersize=3, linewidth=1,
            label=memory if layer == layers[-1] else None,
        )  # fmt: skip
    axes.set_title(title, fontsize=10)
    values = [value for points in lines.values() for _, value in points if value > 0]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if lines:
        axes.legend(fontsize=8)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about 1/30 of the run, corrected for its start."""
    decay = 1 - min(1.0, 30 / max(30, len(values)))
    smoothed, average, weight = [], 0.0, 0.0
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return np.array(smoothed)
