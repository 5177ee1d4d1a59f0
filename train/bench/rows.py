"""What is written down of a measurement: one row of the CSV, units in the names; None is an empty cell."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .timing import Timing


@dataclass(frozen=True)
class Row:
    """What all benchmarks write. `status`: see `attempt`; `reason`: why it is not "ok", or a remark on the time."""

    contender: str
    length: int
    batch: int
    status: str
    reason: str = ""
    repeats: int | None = None
    ms_median: float | None = None
    ms_lowest: float | None = None
    ms_highest: float | None = None
    tokens_per_second: float | None = None
    peak_extra_bytes: int | None = None
    peak_bytes: int | None = None
    dtype: str = ""
    machine: str = ""
    versions: str = ""


@dataclass(frozen=True)
class KernelRow(Row):
    """A call of a memory operation, or of a peer's. Operations and bytes are counted, see `costs`."""

    memory: str | None = None
    mode: str = ""
    chunk_size: int | None = None
    heads: int = 0
    head_dim: int = 0
    expansion: int | None = None
    shard_length: int | None = None
    qk_projection: str | None = None
    operations: int | None = None
    operations_per_second: float | None = None
    bytes_moved: int | None = None
    bytes_per_second: float | None = None
    gate_error: float | None = None
    gate_tensor: str = ""


@dataclass(frozen=True)
class ModelRow(Row):
    """A training step. `loss` is the last one, in nats per token."""

    chunk_size: int | None = None
    parameters: int | None = None
    loss: float | None = None
    backend: str = ""
    attention: str = ""
    compiled: bool = False


@dataclass(frozen=True)
class DecodeRow(Row):
    """The step of one token behind `length` tokens. `relative`: its median to that of the peer in the same run."""

    preset: str = ""
    backend: str = ""
    parameters: int | None = None
    cache_bytes: int | None = None
    relative: float | None = None


def timing_fields(timing: Timing, tokens: int) -> dict[str, Any]:
    """The fields of `Row` that a measurement fills in."""
    return {
        "repeats": timing.repeats,
        "ms_median": 1e3 * timing.median,
        "ms_lowest": 1e3 * timing.lowest,
        "ms_highest": 1e3 * timing.highest,
        "tokens_per_second": tokens / timing.median,
        "peak_extra_bytes": timing.peak_extra_bytes,
        "peak_bytes": timing.peak_bytes,
    }


class CsvLog:
    """A CSV file that holds every row as soon as it is known, so that a killed run keeps what it has measured."""

    def __init__(self, path: Path, row_class: type):
        self.path, self.names = path, [f.name for f in fields(row_class)]

    def __enter__(self) -> CsvLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8", newline="", buffering=1)
        self._writer = csv.writer(self._file)
        self._writer.writerow(self.names)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, row: Row) -> None:
        self._writer.writerow([getattr(row, name) for name in self.names])
        self._file.flush()
