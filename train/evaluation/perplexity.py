"""Task `perplexity`: how well held-out rows are predicted on the whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..common.pictures import REFERENCE, assign_colors, picture
from .estimates import Estimate, paired_difference
from .scores import Scores
from .task import Task, report_models

if TYPE_CHECKING:
    from .run import Evaluation


def compare_scores(first: Scores, second: Scores) -> dict[str, Estimate]:
    """Second minus first over the same rows, in nats per token and bits per byte, with paired errors."""
    names = ("nats_per_token", "bits_per_byte")
    return {name: paired_difference(first.parts(name), second.parts(name)) for name in names}


def differences(first: Scores, second: Scores) -> dict[str, Any]:
    """`compare_scores` as JSON."""
    return {name: estimate.to_json() for name, estimate in compare_scores(first, second).items()}


class PerplexityTask(Task):
    """Results are `Scores`."""

    def measure(self, evaluation: Evaluation, label: str) -> Scores:
        return evaluation.read_rows(label)[0]

    def report(self, results: dict[str, Scores]) -> dict[str, Any]:
        return report_models(results, Scores.to_json, differences)

    def describe(self, results: dict[str, Scores]) -> list[str]:
        width = max(map(len, results))
        lines = []
        for name, s in results.items():
            values = f"{s.perplexity}, {s.nats_per_token} nats per token, {s.bits_per_byte} bits per byte"
            lines.append(f"{name:<{width}}  perplexity {values}")
        (base_name, base), *others = results.items()
        for name, s in others:
            lines.append(f"{name} minus {base_name}: {compare_scores(base, s)['bits_per_byte']} bits per byte (paired)")
        return lines

    def draw(self, path: Path, results: dict[str, Scores]) -> None:
        """A histogram of the rows' losses with the mean over all tokens and its standard error; below it, for several
        models, the same of the rows' differences to the first."""
        (first, base), *others = results.items()
        colors = assign_colors(results)
        losses = {name: (s.nats / s.labels.clamp(min=1))[s.labels > 0] for name, s in results.items()}
        title = "How well held-out rows are predicted; bands: mean over all tokens ± 1 standard error"
        with picture(path, title, height=6.5 if others else 4) as figure:
            parts = figure.subfigures(2 if others else 1, 1, squeeze=False).flat
            axes = parts[0].subplots()
            means = {name: s.nats_per_token for name, s in results.items()}
            labels = {name: f"{name}: mean {means[name]}, perplexity {s.perplexity}" for name, s in results.items()}
            _draw_histogram(axes, losses, means, labels, colors)
            axes.set_xlabel("nats per token of a row")
            if others:
                axes = parts[1].subplots()
                means = {name: compare_scores(base, s)["nats_per_token"] for name, s in others}
                labels = {name: f"{name}: mean difference {mean}" for name, mean in means.items()}
                shifts = {name: losses[name] - losses[first] for name, _ in others}
                _draw_histogram(axes, shifts, means, labels, colors)
                axes.axvline(0, label=f"as {first}", **REFERENCE)
                axes.set_xlabel(f"nats per token of a row, minus those of {first} on the same row")


def _draw_histogram(
    axes: Axes, values: dict[str, Tensor], means: dict[str, Estimate], labels: dict[str, str], colors: dict[str, str]
) -> None:
    values = {name: v[v.isfinite()] for name, v in values.items()}  # a model that diverged has others
    every = torch.cat(list(values.values()))
    low, high = (every.min().item(), every.max().item()) if len(every) else (0.0, 1.0)
    margin = 0.02 * (high - low) or 0.05
    bins = min(40, max(10, max(map(len, values.values())) // 4))
    for name, row_values in values.items():
        style = {"bins": bins, "range": (low - margin, high + margin), "color": colors[name]}
        axes.hist(row_values.numpy(), histtype="stepfilled", alpha=0.2, label=f"{name}: rows", **style)
        axes.hist(row_values.numpy(), histtype="step", **style)
        mean, error = means[name]
        axes.axvline(mean, color=colors[name], linestyle="--", label=labels[name])
        axes.axvspan(mean - error, mean + error, color=colors[name], alpha=0.2, linewidth=0)
    axes.set_ylabel("rows")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
