"""The benchmarks at sizes that take no time."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_tnt.train.bench import gate
from modeling_tnt.train.cli import main
from modeling_tnt.train.common import machine

SMALL = {
    "kernels": [
        "--backends", "torch", "--peers", "none", "--memories", "mlp", "--heads", "1", "--head-dim", "16",
        "--shard-length", "32", "--lengths", "32", "64", "--tokens", "64", "--chunk-sizes", "16",
    ],
    "model": ["--lengths", "32", "64", "--tokens", "64", "--chunk-sizes", "16"],
    "decode": ["--contexts", "16", "256", "--read", "20"],
    "context-parallel": ["--ranks", "2", "--seq-lens", "64", "512", "--threads", "1"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_gate(monkeypatch):
    """The reference over many tokens takes longer than everything else here."""
    monkeypatch.setattr(gate, "SHORTEST_SHARD", 16)


@pytest.fixture(autouse=True)
def short_look(monkeypatch):
    """Half a second of sleep in each run."""
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0.0)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "bench"


@pytest.fixture
def bench(output_dir: Path) -> Callable[..., int]:
    """Run `tnt bench NAME` at small sizes and return its exit status; later flags replace earlier ones."""

    def call(name: str, *more: str) -> int:
        always = ["--device", "cpu", "--case-seconds", "0.001", "--output-dir", str(output_dir)]
        return main(["bench", name, *SMALL[name], *always, *more])

    return call


@pytest.fixture
def run(bench: Callable[..., int], output_dir: Path) -> Callable[..., tuple[int, list[dict]]]:
    """The same, with the rows of the file that it writes."""

    def call(name: str, *more: str) -> tuple[int, list[dict]]:
        status = bench(name, *more)
        stored = output_dir / f"{name}.json"
        if stored.exists():
            return status, json.loads(stored.read_text())["rows"]
        with (output_dir / f"{name}.csv").open(newline="") as file:
            return status, list(csv.DictReader(file))

    return call
