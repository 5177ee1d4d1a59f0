"""Whether the memories of a run learn while they read: what loss.png shows of `memory_health`, and a warning."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

# From here on a memory counts as one that does not learn. `loss_after` is that of the tokens which it was just updated
# on, so that any real step lowers it.
HARDLY_LEARNS = 0.98
HARDLY_MOVES = 1e-3
LAST_READINGS = 8


class Quantity(NamedTuple):
    """What is shown of a memory: a name, what is good, and how it follows from one record of `memory_health`."""

    title: str
    good: str
    of: Callable[[dict[str, float]], float]


STEP_SIZE = Quantity("inner step size", "good: above 0", lambda h: h["step_size"])
STATE_NORM = Quantity("state norm / initial norm", "good: leaves 1, stays finite", lambda h: h["state_norm"])
LOSS_RATIO = Quantity(
    "inner loss after / before an update", f"good: below {HARDLY_LEARNS}",
    lambda h: h["loss_after"] / h["loss_before"] if h["loss_before"] else math.nan,
)  # fmt: skip
QUANTITIES = (STEP_SIZE, STATE_NORM, LOSS_RATIO)


class Reading(NamedTuple):
    """One record of a memory: the tokens trained on until then, and its numbers; nan where not finite."""

    tokens: int
    values: dict[str, float]


def read_health(log: list[dict[str, Any]]) -> dict[str, list[Reading]]:
    """The readings of each memory, "layer0/local0", in the records of log.jsonl."""
    readings: dict[str, list[Reading]] = defaultdict(list)
    for record in log:
        if record["event"] != "memory_health":
            continue
        memories: dict[str, dict[str, float]] = defaultdict(dict)
        for key, value in record.items():
            memory, slash, quantity = key.rpartition("/")
            if slash:
                memories[memory][quantity] = math.nan if value is None else value
        for memory, values in memories.items():
            readings[memory].append(Reading(record["tokens"], values))
    return dict(readings)


def find_idle_memories(log: list[dict[str, Any]]) -> list[str]:
    """A sentence for each way in which memories do not learn while they read; none when all do.

    By the median of the last readings, as one is of a single row.
    """
    broken, ratios, still = [], {}, []
    readings = read_health(log)
    for memory, of_memory in readings.items():
        last = [reading.values for reading in of_memory[-LAST_READINGS:]]
        found = [ratio for ratio in map(LOSS_RATIO.of, last) if math.isfinite(ratio)]
        if not all(map(math.isfinite, last[-1].values())):
            broken.append(memory)
        elif found and median(found) > HARDLY_LEARNS:
            ratios[memory] = median(found)
        if all(abs(STATE_NORM.of(reading.values) - 1) < HARDLY_MOVES for reading in of_memory):
            still.append(memory)
    sentences = {
        "have numbers that are not finite": broken,
        f"hardly learn while they read: the loss after an update is up to {max(ratios.values(), default=0):.3f} of "
        "that before it": list(ratios),
        "have a state that never leaves its initial norm": still,
    }  # fmt: skip
    return [
        f"{len(memories)} of {len(readings)} memories {words} ({_name_some(memories)})"
        for words, memories in sentences.items()
        if memories
    ]


def _name_some(memories: list[str]) -> str:
    return ", ".join(memories[:3]) + (f" and {len(memories) - 3} more" if len(memories) > 3 else "")
