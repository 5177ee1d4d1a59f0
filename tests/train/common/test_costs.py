"""Counted operations and bytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from modeling_tnt.train.common.costs import (
    BOTH,
    FORWARD,
    attention_bytes,
    attention_operations,
    memory_bytes,
    memory_operations,
)

BENCH_MEMORY = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"


def test_operations_and_bytes():
    shape = {"head_dim": 64, "expansion": 2, "chunk_size": 16}
    both = memory_operations(BOTH, memory="mlp", qk_projection="none", **shape)
    forward = memory_operations(FORWARD, memory="mlp", qk_projection="none", **shape)
    assert both - 16 * 16 * (64 + 128) == 52 * 64 * 128
    assert 26 * (forward - 4 * 16 * (64 + 128)) == 7 * (both - 16 * 16 * (64 + 128))
    assert memory_operations(BOTH, memory="linear", qk_projection="none", **shape) == 22 * 64**2 + 16 * 16 * 64
    chunk, shard = (memory_operations(FORWARD, memory="mlp", qk_projection=p, **shape) for p in ("chunk", "shard"))
    assert (chunk - forward, shard - chunk) == (4 * 16 * 64, 4 * 64**2)
    assert attention_operations(FORWARD, head_dim=64, length=1024) * 7 == 2 * attention_operations(
        BOTH, head_dim=64, length=1024
    )
    assert memory_bytes(FORWARD, head_dim=64, itemsize=2) == 4 * 128 + 4
    assert memory_bytes(BOTH, head_dim=64, itemsize=2) == 11 * 128 + 12
    assert attention_bytes(BOTH, head_dim=64, itemsize=2) == 12 * 128


@pytest.mark.parametrize("projection", ["none", "shard"])
def test_both_benchmarks_count_alike(projection: str):
    spec = importlib.util.spec_from_file_location("bench_memory", BENCH_MEMORY)
    bench_memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_memory)
    args = bench_memory.parse(["--qk-projection", projection, "--length", "1", "--batch", "1", "--heads", "1"])
    ours = memory_operations(
        BOTH, memory="mlp", head_dim=args.head_dim, expansion=args.expansion, chunk_size=16, qk_projection=projection
    )
    assert ours == bench_memory.operations(args, 16, "operation")
