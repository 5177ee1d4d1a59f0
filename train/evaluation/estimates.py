"""Means and proportions with their standard errors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit. The error is nan where it cannot be known (a single row)."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        """The value, and its error if there is one, to two digits of the error."""
        if not math.isfinite(self.standard_error):
            return f"{self.value:.4g}"
        digits = 3 if self.standard_error == 0 else max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.value:.{digits}f} ± {self.standard_error:.{digits}f}"

    def interval(self) -> tuple[float, float]:
        """One standard error to either side."""
        return self.value - self.standard_error, self.value + self.standard_error

    def exp(self) -> Estimate:
        """exp of the value, its error by the delta method: `SE(exp r) = exp(r) SE(r)`."""
        try:
            value = math.exp(self.value)
        except OverflowError:
            value = math.inf
        return Estimate(value, value * self.standard_error)

    def to_json(self) -> dict[str, float | None]:
        """As a dict that is valid JSON: what is not finite becomes None."""
        return {name: x if math.isfinite(x) else None for name, x in self._asdict().items()}


def ratio(numerator: Tensor, denominator: Tensor) -> Estimate:
    """`r = Σ x_i / Σ y_i` over rows i, with the standard error of a ratio of sums by the delta method.

    `SE = sqrt(n / (n − 1) · Σ (x_i − r y_i)²) / Σ y_i`. With equal y_i this is the usual error of a mean. Rows count as
    independent draws; rows cut from one document resemble each other, so that the error is then somewhat too small.

    Args:
        numerator: [n], e.g. nats of each row.
        denominator: [n], e.g. tokens or bytes of each row; 0 in some rows, but not in all.

    Raises:
        ValueError: if the denominators sum to zero.
    """
    value, influence = ratio_influence(numerator, denominator)
    return Estimate(value, mean_error(influence))


def ratio_influence(numerator: Tensor, denominator: Tensor) -> tuple[float, Tensor]:
    """`r = Σ x_i / Σ y_i` and each row's influence on it, `n (x_i − r y_i) / Σ y_i` [n], float64, which sums to zero.

    A linear combination of ratios over the same rows has the same combination of influences, and the error
    `mean_error` of that: it takes care of their correlation.
    """
    x, y = numerator.double(), denominator.double()
    total = y.sum().item()
    if total == 0:
        raise ValueError("there is nothing to divide by: no row has any of what is counted (tokens, or bytes)")
    value = x.sum().item() / total
    return value, (x - value * y) * (len(x) / total)


def paired_difference(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Estimate:
    """Second minus first of two ratios over the same rows, each given as its numerators and denominators, [n] each.

    Each row's influence on both is subtracted before the error is taken, so that what makes a row hard for both models
    cancels. The errors of the two values themselves are far larger and say nothing of the difference.
    """
    (a, influence_a), (b, influence_b) = ratio_influence(*first), ratio_influence(*second)
    return Estimate(b - a, mean_error(influence_b - influence_a))


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of values [n]: `sqrt(Σ (x − mean)² / (n (n − 1)))`; nan for n = 1."""
    if len(values) < 2:
        return math.nan
    return (values.double().std(correction=1) / math.sqrt(len(values))).item()


def mean(values: Tensor) -> Estimate:
    """The mean of values [n] and its standard error."""
    return Estimate(values.double().mean().item(), mean_error(values))


class Proportion(NamedTuple):
    """Successes among independent trials."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials

    def interval(self, z: float = 1.0) -> tuple[float, float]:
        """Wilson's score interval (1927) of ±z standard errors: `(p + z²/2n ± z sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n)`.

        Unlike `p ± sqrt(p(1−p)/n)` it has a width at 0 and at 1, and stays between them.
        """
        n, p = self.trials, self.value
        centre, scale = (p + z * z / (2 * n)) / (1 + z * z / n), 1 + z * z / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
        # At 0 and 1 the interval ends exactly there, but for rounding.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))

    @property
    def standard_error(self) -> float:
        """Half the width of Wilson's interval of one standard error."""
        low, high = self.interval()
        return (high - low) / 2

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "value": self.value, "standard_error": self.standard_error, "low": low, "high": high,
            "successes": self.successes, "trials": self.trials,
        }  # fmt: skip


def fit_slope(x: Tensor) -> Tensor:
    """The weights w [n] for which `Σ w y` is the least-squares slope of y over x [n]: `(x − mean) / Σ (x − mean)²`."""
    centred = x.double() - x.double().mean()
    return centred / centred.square().sum()
