"""The arguments of `tnt reproduce table3`: one dataclass and the checks that need no model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..options import find_blocked_folder, option
from .paper import HYBRIDS, ROWS
from .scales import SCALES

# Stages and what tells the runs apart are the scale's and the command's to say.
OVERRIDABLE = ("model", "data", "optimizer", "training", "output")


@dataclass
class Table3Arguments:
    """What `tnt reproduce table3` needs to know; every field is a flag."""

    scale: str = option("small", "reproduction", "; ".join(f"{name}: {scale.help}" for name, scale in SCALES.items()))
    seeds: int = option(3, "reproduction", "seeds 0, 1, ... of each row; standard errors need two, and mean little "
                        "below three")  # fmt: skip
    rows: list[str] = option([], "reproduction", f"rows to train, of {', '.join(ROWS)}; by default all but the "
                            "hybrids")  # fmt: skip
    hybrids: bool = option(False, "reproduction", "train the hybrids, too: models with attention, which the paper does "
                           "not have")  # fmt: skip
    tokens: float | None = option(None, "reproduction", "tokens of the first stage; none: the scale's")
    override: dict[str, Any] = option(
        {}, "reproduction", "recipe fields to replace in every row, e.g. training.micro_batch_size=2 "
        "'data.sources=[\"books\"]'",
    )  # fmt: skip
    device: str | None = option(None, "running", "cuda or cpu; by default cuda if there is one")
    workers: int | None = option(
        None, "running", "runs at once; by default one for each CPU core, of one thread each, and 1 on a GPU"
    )
    time_limit: float | None = option(
        None, "running", "seconds after which runs are stopped and what is finished is reported; the same command goes "
        "on from there",
    )  # fmt: skip
    speed: bool = option(True, "output", "give each row's tokens/s, as its runs timed themselves")
    output_dir: Path | None = option(
        None, "output", "folder for table3.md, table3.png, table3.json and the runs; none: runs/table3-SCALE. What is "
        "finished there is not run again",
    )  # fmt: skip
    overwrite: bool = option(False, "output", "replace the reproduction that output_dir holds")

    def resolve(self) -> Table3Arguments:
        """A copy without None but for `tokens` and `time_limit`. Raises one ValueError that lists every problem."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = self.output_dir or Path(f"runs/table3-{self.scale}")
        workers = self.workers if self.workers is not None else 1 if device == "cuda" else count_cores()
        filled = replace(self, device=device, workers=workers, output_dir=folder)
        problems = [*filled._find_problems(), *find_blocked_folder(folder)]
        if problems:
            raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
        return replace(filled, rows=filled.complete_rows())

    def complete_rows(self) -> list[str]:
        """The chosen rows and those whose runs they need, in the order of the table."""
        known, ours = self._known_rows(), [key for key, row in ROWS.items() if row.group == HYBRIDS]
        wanted = list(self.rows or [key for key in known if key not in ours])
        wanted += [key for key in ours if self.hybrids and key not in wanted]
        for row in wanted:
            needed = (ROWS[row].begins_with, ROWS[row].read_from)
            wanted += [key for key in needed if key is not None and key not in wanted]
        return [key for key in ROWS if key in wanted]

    def _known_rows(self) -> list[str]:
        """Those that the scale trains, and those that are read from their runs."""
        scale = SCALES.get(self.scale)
        return [key for key, row in ROWS.items() if scale is None or row.read_from or key in scale.rows]

    def _find_problems(self) -> Iterable[str]:
        if self.scale not in SCALES:
            yield f"--scale must be one of {', '.join(SCALES)}, got {self.scale!r}"
        for row in self.rows:
            if row not in self._known_rows():
                yield f"--rows must be of {', '.join(self._known_rows())}, got {row!r}"
        for name in ("seeds", "workers"):
            if getattr(self, name) < 1:
                yield f"--{name} must be at least 1, got {getattr(self, name)}"
        for name in ("tokens", "time_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                yield f"--{name.replace('_', '-')} must be positive and finite, got {value}"
        if self.device not in ("cuda", "cpu"):
            yield f"--device must be cuda or cpu, got {self.device!r}"
        elif self.device == "cuda" and not torch.cuda.is_available():
            yield "--device cuda: torch sees no GPU here; use --device cpu, or leave it out"
        elif self.device == "cuda" and self.workers > 1:
            yield f"--workers must be 1 on a GPU, which runs would have to share, got {self.workers}"
        for path in self.override:
            if path.split(".")[0] not in OVERRIDABLE or "." not in path:
                yield f"--override takes fields of {', '.join(OVERRIDABLE)}, e.g. training.seq_len=256, got {path!r}"
            if path in ("training.seed", "output.dir", "output.resume", "output.overwrite"):
                yield f"--override {path}: every run has its own; use --seeds, --output-dir or --overwrite"


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
