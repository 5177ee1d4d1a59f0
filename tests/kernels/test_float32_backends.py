"""The backends that compute in float32, each on the same cases, against the reference: see float32_checks.py.

What a backend alone has is tested in test_triton_backend.py and test_native_backend.py.
"""

import importlib.util
from itertools import product

import pytest
import torch
from float32_checks import (
    GRID,
    LOCAL,
    SMALL,
    Change,
    assert_right,
    gates_of_one,
    gates_of_zero,
    inputs,
    read,
    run,
    run_in_pieces,
    some_gates_of_zero_and_one,
    zero_keys,
)
from memory_cases import GLOBAL_CASES, MEMORIES, PROJECTIONS, Case, native, summarize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(params=[pytest.param("triton", marks=no_triton), native])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_rule_projection_and_memory(case: Case, backend: str):
    """Outputs, final states and every gradient, for random upstream gradients of outputs and states."""
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("memory, norm, bias", list(product(MEMORIES, (True, False), (True, False))))
def test_norm_and_biases(memory: str, norm: bool, bias: bool, backend: str):
    """In chunks of two of Triton's tiles, whose anchors are kept apart."""
    case = Case(memory=memory, norm=norm, bias=bias, rule="both", projection="shard", **SMALL)
    case = case.with_(chunk_size=20, shard_length=20, length=22, batch=1, heads=1)
    assert_right(run(case, backend), case)


# One token a chunk, a tile, a tile and a token, several tiles, a chunk that is longer than the sequence.
SIZES = [(1, 4, 6), (5, 10, 13), (16, 16, 33), (17, 34, 37), (40, 40, 45), (64, 64, 35)]


@pytest.mark.parametrize("i, chunk_size, shard_length, length", [(i, *sizes) for i, sizes in enumerate(SIZES)])
@pytest.mark.parametrize("turn", range(2))
def test_chunk_and_shard_sizes(i: int, chunk_size: int, shard_length: int, length: int, turn: int, backend: str):
    case = LOCAL[(i + 4 * turn) % len(LOCAL)]
    case = case.with_(chunk_size=chunk_size, shard_length=case.shard_length and shard_length, length=length)
    case = case.with_(batch=1, heads=1)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_lengths_around_chunk_and_shard(length: int, backend: str):
    case = LOCAL[length % len(LOCAL)].with_(length=length, batch=2, heads=1)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("case", [LOCAL[i] for i in (1, 2, 3, 4, 6)], ids=str)
def test_rows_at_different_positions(case: Case, backend: str):
    """At a shard's start, in mid-chunk, at a chunk's start in mid-shard, and one token before a shard's end."""
    case = case.with_(start=(16, 3, 12, 23), batch=4, length=5, heads=1)
    assert_right(run(case, backend), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LOCAL[2:5], ids=str)
def test_a_start_in_the_second_tile_of_a_chunk(case: Case, backend: str):
    case = case.with_(chunk_size=40, shard_length=40, start=(21, 16), length=21, heads=1)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize(
    "case, start", [(LOCAL[2], (5, 3, 8, 0)), (LOCAL[3], None), (LOCAL[4], (5, 3, 8, 0)), (LOCAL[6], None)], ids=str
)
def test_packed_sequences(case: Case, start: tuple[int, ...] | None, backend: str):
    """One of them empty: it keeps its state."""
    case = case.with_(batch=1, heads=1, lengths=(5, 0, 9, 2), length=16, start=start)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("case", LOCAL, ids=str)
def test_a_cut_anywhere_changes_nothing(case: Case, backend: str):
    """Chunks of 4 and shards of 8 tokens are cut inside and at a border; gradients flow through the states."""
    case = case.with_(length=11, batch=1, heads=1)
    cuts = [(3, 8), (2, 6, 7)][case.memory == "linear"]
    assert_right(run_in_pieces(case, backend, cuts), case)


@pytest.mark.parametrize(
    "rule, projection, start",
    [("both", "shard", None), ("both", "shard", (3,)), ("token_scale", "chunk_normalized", (3,)),
     ("plain", "none", None)],
)  # fmt: skip
def test_a_backward_of_several_groups(rule: str, projection: str, start: tuple[int, ...] | None, backend: str):
    """7 chunks in three groups of at most three."""
    case = Case(memory="linear", rule=rule, projection=projection, chunk_size=2, shard_length=None, **SMALL)
    case = case.with_(length=13, batch=1, heads=1, start=start)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p != "none"])
def test_zero_keys_and_queries(projection: str, backend: str):
    """A zero key adds nothing to the projection, a zero projected query stays zero, and no gradient is NaN."""
    case = Case(projection=projection, batch=1, heads=1, length=9, **SMALL)
    assert_right(run(case, backend, zero_keys), case, zero_keys)


@pytest.mark.parametrize("change", [gates_of_zero, gates_of_one, some_gates_of_zero_and_one])
@pytest.mark.parametrize("rule", ["momentum", "decay", "both"])
def test_gates_at_the_ends_of_their_range(rule: str, change: Change, backend: str):
    """Without a norm: weights that have decayed to nothing would be blown up by it."""
    case = Case(memory="linear", rule=rule, norm=False, batch=1, heads=1, length=9, **SMALL)
    assert_right(run(case, backend, change), case, change)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 4)], ids=str)
def test_head_dims_and_expansions(sizes: tuple[int, int, int], backend: str):
    head_dim, hidden, chunk_size = sizes
    case = Case(rule="both", projection="shard", dtype=torch.float32, head_dim=head_dim, hidden=hidden)
    case = case.with_(chunk_size=chunk_size, shard_length=chunk_size, length=chunk_size + 1, batch=1)
    assert_right(run(case, backend), case)


@pytest.mark.slow
@pytest.mark.parametrize("memory, head_dim, hidden", [("mlp", 64, 128), ("linear", 128, 128)])
def test_wide_heads(memory: str, head_dim: int, hidden: int, backend: str):
    case = Case(memory=memory, projection="shard", dtype=torch.float32, head_dim=head_dim, hidden=hidden)
    case = case.with_(length=5, batch=1, heads=1)
    assert_right(run(case, backend), case)


@pytest.mark.parametrize("case", [case.with_(**SMALL) for case in GLOBAL_CASES], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_global_memory(case: Case, packed: bool, backend: str):
    if packed:
        case = case.with_(start=(5, 3, 8, 0), batch=1, lengths=(5, 0, 9, 2), length=16)
    case = case.with_(heads=1)
    assert_right(run(case, backend), case)


def test_inputs_may_be_strided(backend: str):
    """As views of one projection's output."""
    case = LOCAL[1].with_(batch=1, length=3)
    x = inputs(case)
    wide = torch.stack([x["q"], x["k"], x["v"]], 2).detach()
    views = dict(zip("qkv", wide.unbind(2), strict=True)) | {"lr": x["lr"].detach().mT.contiguous().mT}
    assert not any(t.is_contiguous() for t in views.values())
    views = x | {name: t.requires_grad_() for name, t in views.items()}
    got, want = (summarize(*read(case, backend, inputs_), inputs_) for inputs_ in (views, x))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
def test_activation_checkpointing(backend: str):
    case = Case(memory="linear", rule="both", projection="shard", batch=1, heads=1, length=9, start=(3,), **SMALL)
    x = inputs(case)

    def reading(*tensors: Tensor) -> tuple:
        return read(case, backend, dict(zip(x, tensors, strict=True)))

    want = summarize(*reading(*x.values()), x)
    got = summarize(*checkpoint(reading, *x.values(), use_reentrant=False), x)
    assert all(torch.equal(got[name], want[name]) for name in want)
