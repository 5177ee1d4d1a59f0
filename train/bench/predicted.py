"""Measured times beside predicted ones, which `tests/benchmarks/predict.py --write` stores in predicted.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..common.timing import OK
from .report import align
from .rows import KernelRow

STORED = Path(__file__).with_name("predicted.json")


class Predictions(NamedTuple):
    """`entries`: the fields of a row that must agree, with the time in "ms". `card`: what they are for."""

    card: str
    clock_ghz: float
    entries: list[dict[str, Any]]

    def ms_of(self, row: KernelRow) -> float | None:
        """The predicted time of a row; None where none fits.

        Shards are independent, so a time holds for rows of any length that shards divide.
        """
        for entry in self.entries:
            wanted = {name: value for name, value in entry.items() if name not in ("ms", "tokens")}
            same = all(getattr(row, name) == value for name, value in wanted.items())
            if same and row.batch * row.length == entry["tokens"] and row.length % entry["shard_length"] == 0:
                return entry["ms"]
        return None


def load_predictions(path: Path = STORED) -> Predictions:
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Predictions(stored["card"], stored["clock_ghz"], stored["predictions"])


def summarize_predictions(rows: Sequence[KernelRow], device: str) -> str:
    """A table of the rows that were measured on a GPU and are predicted, or in a sentence why there is none."""
    predictions = load_predictions()
    where = f"an {predictions.card} at {predictions.clock_ghz:g} GHz"
    if device != "cuda":
        return (
            f"measured beside predicted: needs a GPU, this run used the CPU. Predictions are for {where}; "
            "run `tnt bench kernels --quick` on one"
        )
    measured = [row for row in rows if row.status == OK]
    pairs = [(row, ms) for row in measured if (ms := predictions.ms_of(row)) is not None]
    if not pairs:
        return (
            "measured beside predicted: none of the cases that were timed is predicted; predictions are for the "
            f"default sizes of `tnt bench kernels --quick` on {where}"
        )
    head = ["", "tokens in a row", "mode", "measured ms", "predicted ms", "ratio"]
    lines = [
        [row.name, str(row.length), row.mode, f"{row.ms_median:.3g}", f"{ms:.3g}", f"{row.ms_median / ms:.2f}"]
        for row, ms in pairs
    ]
    title = f"measured on {pairs[0][0].machine} beside predicted for {where}, not calibrated: ±40%, ratios ±20%"
    return f"{title}\n{align([head, *lines])}"
