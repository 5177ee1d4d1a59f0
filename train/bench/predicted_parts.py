"""Predicted times of parts of a row, which `tests/benchmarks/predict.py --parts` stores in predicted_parts.json."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .context_model import LayerTimes, PartTable, PartTimes

STORED = Path(__file__).with_name("predicted_parts.json")


class Card(NamedTuple):
    """What they are for."""

    name: str
    clock_ghz: float

    def __str__(self) -> str:
        return f"{self.name} at {self.clock_ghz:g} GHz"


def predicted_presets() -> list[str]:
    return list(_stored()["presets"])


def predicted_card() -> Card:
    return Card(_stored()["card"], _stored()["clock_ghz"])


class Parts(NamedTuple):
    """Times of one row of a preset: of whole ones, and of the parts of ranks that get states and hand them on."""

    whole: PartTable
    middle: PartTable


def load_parts(preset: str) -> Parts:
    return Parts(*(_read_table(_stored()["presets"][preset][kind]) for kind in Parts._fields))


def _read_table(entries: list[dict[str, Any]]) -> PartTable:
    return PartTable(tuple(entry["tokens"] for entry in entries), tuple(map(_read_times, entries)))


def to_entry(tokens: int, times: PartTimes) -> dict[str, Any]:
    """What is stored of a part, in milliseconds."""

    def layer(times: LayerTimes) -> dict[str, Any]:
        serial = [_to_ms(seconds) for seconds in times.serial]
        return {"before": _to_ms(times.before), "serial": serial, "after": _to_ms(times.after)}

    ends = {"ends_forward": _to_ms(times.ends_forward), "ends_backward": _to_ms(times.ends_backward)}
    return {"tokens": tokens, "forward": layer(times.forward), "backward": layer(times.backward)} | ends


def _read_times(entry: dict[str, Any]) -> PartTimes:
    def layer(times: dict[str, Any]) -> LayerTimes:
        return LayerTimes(times["before"] / 1e3, tuple(ms / 1e3 for ms in times["serial"]), times["after"] / 1e3)

    return PartTimes(
        layer(entry["forward"]), entry["ends_forward"] / 1e3, entry["ends_backward"] / 1e3, layer(entry["backward"])
    )


def _to_ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


@cache
def _stored() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8"))
