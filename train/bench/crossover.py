"""From which length on one model trains faster than another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.pictures import short_count
from ..common.timing import OK
from .rows import ModelRow

LLAMA = "llama"


def find_crossover(ours: dict[int, float], other: dict[int, float]) -> float | str | None:
    """From which length on `ours` is faster than `other` (tokens per second by length).

    Returns:
        The length, interpolated between the two lengths that it lies between (both axes logarithmic); "always" when
        it is faster at every length at which both were timed; None when it is not at the longest, or there is none.
    """
    lengths = sorted(set(ours) & set(other))
    gains = [math.log(ours[T] / other[T]) for T in lengths]
    if not gains or gains[-1] <= 0:
        return None
    last_slower = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last_slower is None:
        return "always"
    low, high = gains[last_slower], gains[last_slower + 1]
    share = -low / (high - low)
    return lengths[last_slower] ** (1 - share) * lengths[last_slower + 1] ** share


def summarize_crossovers(rows: Sequence[ModelRow]) -> str:
    """For each of our models, from which length on its training steps are faster than the Llama's."""
    speeds: dict[str, dict[int, float]] = {row.contender: {} for row in rows}
    for row in rows:
        if row.status == OK:
            speeds[row.contender][row.length] = row.tokens_per_second
    llama = speeds.pop(LLAMA, {})
    lines = [f"  {name:<14} {_describe_crossover(ours, llama)}" for name, ours in speeds.items()]
    return "\n".join(["faster than the Llama from a length of", *lines])


def _describe_crossover(ours: dict[int, float], llama: dict[int, float]) -> str:
    shared = sorted(set(ours) & set(llama))
    if not shared:
        return "not measured: no length at which both were timed"
    found = find_crossover(ours, llama)
    longest = shared[-1]
    ratio = f"{ours[longest] / llama[longest]:.2f} times the Llama's tokens/s at {short_count(longest)}"
    if found is None:
        return f"none up to {short_count(longest)} ({ratio})"
    if found == "always":
        return f"{short_count(shared[0])} or less, the shortest that was timed ({ratio})"
    return f"{found:,.0f} tokens, interpolated ({ratio})"
