"""What is written down of a measurement, units in the names. In a CSV file None is an empty cell."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common.files import atomic_file


@dataclass(frozen=True)
class Row:
    """What all benchmarks write. `status`: see `attempt`; `reason`: why it is not "ok", or a remark on the time.
    `cpus_used_by_others`: how many CPUs other processes kept busy while it was timed, see `machine.OtherProcesses`."""

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
    cpus_used_by_others: float | None = None
    dtype: str = ""
    machine: str = ""
    versions: str = ""

    @property
    def name(self) -> str:
        """Who was measured, in a table."""
        return self.contender


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

    @property
    def curve(self) -> str:
        """Who was measured at any chunk size."""
        return self.contender if self.memory is None else f"{self.contender} {self.memory}"

    @property
    def name(self) -> str:
        return self.curve if self.chunk_size is None else f"{self.curve} C={self.chunk_size}"


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


@dataclass(frozen=True)
class ContextRow(Row):
    """A training step that `ranks` processes share, measured or (`source`) predicted.

    speed_up       times as fast as one rank in the same run; `efficiency`: this a rank.
    sent_bytes_per_token  states and inputs of convolutions that all ranks send in both passes, a token of the step.
    wait_mean, wait_longest  time that a rank waits for states, as a share of the step: the mean rank's, the largest.
    cores          that the ranks share; None: each has a device of its own. Fewer cores than ranks are oversubscribed.
    predicted_…    what the model of compute and wait says; `ratio`: measured to predicted time. `predicted_idle`: the
                   mean rank's time without work, also at the sum of the loss and behind its own end.
    boundary_bytes  that cross one cut in both passes of all layers.
    """

    ranks: int = 1
    threads: int | None = None
    cores: int | None = None
    preset: str = ""
    backend: str = ""
    source: str = "measured"
    longest_part: int | None = None
    speed_up: float | None = None
    efficiency: float | None = None
    boundary_bytes: int | None = None
    sent_bytes_per_token: float | None = None
    wait_mean: float | None = None
    wait_longest: float | None = None
    predicted_ms: float | None = None
    predicted_speed_up: float | None = None
    predicted_wait_mean: float | None = None
    predicted_wait_longest: float | None = None
    predicted_idle: float | None = None
    ratio: float | None = None


def name_with_backend(name: str, backend: str, backends: Sequence[str]) -> str:
    """`name`, and the backend where several are compared."""
    return name if len(backends) == 1 else f"{name} {backend}"


def save_rows(path: Path, rows: Sequence[Row], arguments: dict[str, Any]) -> None:
    """Write all rows, whole or not at all: as CSV, or as JSON with the run's arguments, by the file's name."""
    cells = [asdict(row) for row in rows]
    with atomic_file(path) as fresh, fresh.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".json":
            file.write(json.dumps({"arguments": arguments, "rows": cells}, indent=2) + "\n")
        else:
            writer = csv.DictWriter(file, cells[0])
            writer.writeheader()
            writer.writerows(cells)
