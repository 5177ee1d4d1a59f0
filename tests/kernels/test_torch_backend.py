"""What only sizes or settings that the other tests do not reach would show in the torch backend."""

import pytest
import torch
from memory_cases import (
    CASES,
    KINDS,
    MEMORIES,
    Case,
    assert_same,
    call,
    make_inputs,
    random_case,
    reference_result,
    run,
)

from modeling_tnt.kernels.torch_backend import projection, scan

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@pytest.mark.parametrize("packed", [False, True])
def test_shards_in_several_slabs(case: Case, packed: bool, monkeypatch):
    """One shard per slab, and as many as fit into one, are the same computation."""
    case = case.with_(length=25)
    if packed:
        case = case.with_(batch=1, lengths=(8, 13, 0, 4))
    whole = run(case, "torch")
    monkeypatch.setattr(scan, "SLAB_BYTES", 1)
    assert_same(run(case, "torch"), whole)


@pytest.mark.parametrize("case", [c for c in CASES if c.projection.startswith("shard")], ids=str)
@pytest.mark.parametrize("block", [1, 3, 8])
def test_blocks_of_the_projection(case: Case, block: int, monkeypatch):
    case = case.with_(length=25, start=(3, 8))
    monkeypatch.setattr(projection, "BLOCK", block)
    assert_same(run(case, "torch"), reference_result(case))


@pytest.mark.parametrize("shard_length", [128, None])
def test_a_shard_longer_than_a_block(shard_length: int | None):
    case = Case(
        rule="both", projection="shard_normalized", chunk_size=16, shard_length=shard_length, length=150, batch=1
    )
    assert_same(run(case, "torch"), reference_result(case))


@pytest.mark.parametrize("is_global", [False, True])
def test_states_are_kept_at_intervals_only(is_global: bool):
    """Of n states at the start of a chunk about √n are saved for the backward; the inputs are the rest."""
    n = 64
    case = Case(is_global=is_global, chunk_size=1, shard_length=None, batch=1, length=n, head_dim=16, hidden=32)
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = make_inputs(case)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, "torch", x, output_final_state=False)
    one_state = sum(x[name].nbytes for name in ("params.w1", "params.b1", "params.w2", "params.b2"))
    inputs = 5 * x["q"].nbytes + x["lr"].nbytes
    assert sum(saved.values()) < 2 * inputs + (n**0.5 + 4) * one_state < n / 2 * one_state


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed: int):
    """Any combination of sizes, positions, packing and rules; the tolerance allows for a norm of four small numbers."""
    case = random_case(seed, (*MEMORIES, *KINDS))
    assert_same(run(case, "torch"), reference_result(case), tolerance=1e-8)
