"""Task `perplexity`: how well held-out rows are predicted on the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .estimates import Estimate, mean_error, ratio_influence
from .figures import COLORS, new_figure, save_figure
from .scores import Scores


def compare_scores(first: Scores, second: Scores) -> dict[str, Estimate]:
    """Second minus first over the same rows, in nats per token and bits per byte, with paired errors.

    Each row's influence on both is subtracted before the error is taken, so that what makes a row hard for both models
    cancels. The errors of the two values themselves are far larger and say nothing of the difference.
    """
    result = {}
    for name in ("nats_per_token", "bits_per_byte"):
        (a, influence_a), (b, influence_b) = (ratio_influence(*scores.parts(name)) for scores in (first, second))
        result[name] = Estimate(b - a, mean_error(influence_b - influence_a))
    return result


def report_perplexity(scores: dict[str, Scores]) -> dict[str, Any]:
    """What perplexity.json holds of each model, the first being what the others are compared with."""
    (_, base), *others = scores.items()
    return {
        "models": {name: s.to_json() for name, s in scores.items()},
        "minus_first_model": {
            name: {k: v.to_json() for k, v in compare_scores(base, s).items()} for name, s in others
        },
    }  # fmt: skip


def describe_perplexity(scores: dict[str, Scores]) -> list[str]:
    """Lines for the terminal."""
    width = max(map(len, scores))
    lines = []
    for name, s in scores.items():
        values = f"{s.perplexity}, {s.nats_per_token} nats per token, {s.bits_per_byte} bits per byte"
        lines.append(f"{name:<{width}}  perplexity {values}")
    (base_name, base), *others = scores.items()
    for name, s in others:
        lines.append(f"{name} minus {base_name}: {compare_scores(base, s)['bits_per_byte']} bits per byte (paired)")
    return lines


def draw_perplexity(path: Path, scores: dict[str, Scores]) -> None:
    """A histogram of the rows' losses, with the mean over all tokens and its standard error."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    losses = {name: (s.nats / s.labels.clamp(min=1))[s.labels > 0].numpy() for name, s in scores.items()}
    low, high = min(map(min, losses.values())), max(map(max, losses.values()))
    margin = 0.02 * (high - low) or 0.05
    bins = min(40, max(8, max(map(len, losses.values())) // 4))
    for color, (name, values) in zip(COLORS, losses.items(), strict=False):
        mean = scores[name].nats_per_token
        axes.hist(values, bins=bins, range=(low - margin, high + margin), color=color, alpha=0.35)
        label = f"{name}: {mean} nats per token, perplexity {scores[name].perplexity}"
        axes.axvline(mean.value, color=color, label=label)
        axes.axvspan(mean.value - mean.standard_error, mean.value + mean.standard_error, color=color, alpha=0.2)
    axes.set_xlabel("nats per token of a row")
    axes.set_ylabel("rows")
    axes.set_title("Held-out loss: rows, and the mean of all tokens ± its standard error", fontsize=11)
    # Above the bars, which may be anywhere.
    axes.set_ylim(top=axes.get_ylim()[1] * (1.12 + 0.08 * len(scores)))
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
