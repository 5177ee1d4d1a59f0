"""Task `position`: the loss by position in the context, as in figure 2 of TTT (arXiv 2407.04620)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.pictures import BARS, assign_colors, count_tokens, draw_curves, picture
from .estimates import Estimate, fit_slope, mean_error, paired_difference, ratio, ratio_influence
from .scores import TokenLosses
from .task import Task, report_models

if TYPE_CHECKING:
    from .run import Evaluation

BINS_PER_DOUBLING = 2
SLOPE_BINS = 4  # the last two doublings


@dataclass(frozen=True)
class PositionCurve:
    """Sums over the predicted tokens of each row and bin; a token's position is how many tokens were read before it.

    edges   [K + 1] ascending: bin k holds the positions edges[k] to edges[k + 1] − 1.
    nats    [n, K] float64, Σ −ln p(token).
    labels  [n, K] int64, how many tokens are predicted.
    """

    edges: list[int]
    nats: Tensor
    labels: Tensor

    def bins(self) -> list[int]:
        """Those that hold tokens."""
        return [k for k in range(len(self.edges) - 1) if self.labels[:, k].sum() > 0]

    def parts(self, k: int) -> tuple[Tensor, Tensor]:
        """The rows' nats and labels in bin k, [n] each."""
        return self.nats[:, k], self.labels[:, k]

    def losses(self) -> dict[int, Estimate]:
        """Nats per token of each bin that holds tokens, with its error over rows, by the bin's index."""
        return {k: ratio(*self.parts(k)) for k in self.bins()}

    def centre(self, k: int) -> float:
        """The geometric middle of bin k, in tokens."""
        return math.sqrt(self.edges[k] * (self.edges[k + 1] - 1))

    def slope(self) -> tuple[Estimate, int, int] | None:
        """Nats per token by which the loss changes with each doubling of the context, in the last `SLOPE_BINS` bins.

        The least-squares slope of the bins' means over log2 of their centres. It is a linear combination of the means,
        so the same combination of the rows' influences gives its error, with the correlation of bins within rows.

        Returns:
            The slope, and the first and last position that it spans; None with fewer than three bins.
        """
        bins = self.bins()[-SLOPE_BINS:]
        if len(bins) < 3:
            return None
        values, influences = zip(*(ratio_influence(*self.parts(k)) for k in bins), strict=True)
        weights = fit_slope(torch.tensor([math.log2(self.centre(k)) for k in bins]))
        value = (weights * torch.tensor(values, dtype=torch.float64)).sum().item()
        error = mean_error((weights[:, None] * torch.stack(influences)).sum(0))
        return Estimate(value, error), self.edges[bins[0]], self.edges[bins[-1] + 1] - 1

    def to_json(self) -> dict[str, Any]:
        slope = self.slope()
        return {
            "bins": [
                {
                    "first_position": self.edges[k], "last_position": self.edges[k + 1] - 1,
                    "tokens": int(self.labels[:, k].sum()), "nats_per_token": loss.to_json(),
                }
                for k, loss in self.losses().items()
            ],
            "slope_of_last_bins": None if slope is None else {
                "nats_per_doubling": slope[0].to_json(), "first_position": slope[1], "last_position": slope[2],
            },
        }  # fmt: skip


def position_edges(seq_len: int) -> list[int]:
    """Edges of bins that cover the positions 1 to seq_len − 1, two bins to a doubling, counted down from the end: so
    the last bins are whole, and the shortest ones, at the start, hold one position each."""
    edges, edge = [seq_len], float(seq_len)
    while edges[-1] > 1:
        edge = min(edge / 2 ** (1 / BINS_PER_DOUBLING), edges[-1] - 1)
        edges.append(max(1, round(edge)))
    return edges[::-1]


def bin_positions(losses: TokenLosses, edges: list[int]) -> PositionCurve:
    """Sum the losses of a batch in bins of positions. In rows of marked documents a position is counted from the
    document's start, or from the row's if the document began before it: it is what the model has read."""
    index = torch.bucketize(losses.context.contiguous(), torch.tensor(edges), right=True) - 1
    index = index.clamp(min=0)  # the first tokens of documents, which are not predicted
    empty = torch.zeros(len(index), len(edges) - 1, dtype=torch.float64)
    nats = empty.scatter_add(1, index, losses.nats.double())
    labels = empty.scatter_add(1, index, losses.scored.double()).long()
    return PositionCurve(edges, nats, labels)


def join_positions(curves: list[PositionCurve]) -> PositionCurve:
    """The curve of all rows of several curves with equal edges."""
    return PositionCurve(curves[0].edges, torch.cat([c.nats for c in curves]), torch.cat([c.labels for c in curves]))


def compare_positions(first: PositionCurve, second: PositionCurve) -> dict[int, Estimate]:
    """Second minus first in each bin, in nats per token, with paired errors over the same rows."""
    return {k: paired_difference(first.parts(k), second.parts(k)) for k in first.bins()}


def _differences(first: PositionCurve, second: PositionCurve) -> list[dict[str, Any]]:
    return [
        {
            "first_position": first.edges[k], "last_position": first.edges[k + 1] - 1,
            "nats_per_token": difference.to_json(),
        }
        for k, difference in compare_positions(first, second).items()
    ]  # fmt: skip


class PositionTask(Task):
    """Results are `PositionCurve`s."""

    def measure(self, evaluation: Evaluation, label: str) -> PositionCurve:
        return evaluation.read_rows(label)[1]

    def report(self, results: dict[str, PositionCurve]) -> dict[str, Any]:
        return report_models(results, PositionCurve.to_json, _differences)

    def describe(self, results: dict[str, PositionCurve]) -> list[str]:
        """What the last doublings of context still gain."""
        lines = []
        for name, curve in results.items():
            slope = curve.slope()
            if slope is None:
                lines.append(f"{name}: rows are too short to tell whether more context helps")
                continue
            (value, error), first, last = slope
            words = (
                "more context helps"
                if value < -2 * error
                else "it gets worse"
                if value > 2 * error
                else "no clear gain"
            )
            lines.append(
                f"{name}: {slope[0]} nats per token with each doubling of the context from {first:,} to {last:,} tokens"
                + (f" ({words})" if math.isfinite(error) else "")
            )
        return lines

    def draw(self, path: Path, results: dict[str, PositionCurve]) -> None:
        """The curves with their standard errors; beside them the last four doublings, with the fitted slopes."""
        longest = max(curve.edges[-1] for curve in results.values())
        losses = {
            name: {curve.centre(k): loss for k, loss in curve.losses().items()} for name, curve in results.items()
        }
        powers = [2**i for i in range(longest.bit_length()) if 2**i <= longest]
        with picture(path, f"Loss by how much was read; {BARS}", height=4.4) as figure:
            whole, end = figure.subplots(1, 2)
            for axes, begin in ((whole, 0), (end, longest / 16)):
                shown = {name: {x: loss for x, loss in of.items() if x >= begin} for name, of in losses.items()}
                draw_curves(axes, shown)
                count_tokens(axes, [x for x in powers if x >= begin])
                axes.set_xlabel("tokens read before the predicted one")
                axes.set_ylabel("nats per token")
            for (name, curve), color in zip(results.items(), assign_colors(results).values(), strict=True):
                slope = curve.slope()
                if slope is not None:
                    x = [x for x in losses[name] if slope[1] <= x <= slope[2]]
                    middle = sum(map(math.log2, x)) / len(x)
                    level = sum(losses[name][each].value for each in x) / len(x)
                    y = [level + slope[0].value * (math.log2(each) - middle) for each in x]
                    end.plot(x, y, color=color, linewidth=4, alpha=0.3, label=f"{name}: {slope[0]} nats a doubling")
            whole.set_title("All positions")
            end.set_title("The last doublings: does more context keep helping?")
