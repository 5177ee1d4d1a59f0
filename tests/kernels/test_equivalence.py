"""The equivalence suite of the memory operations: one set of tests for each memory type and backend.

Against the reference: outputs, final states and the gradient of every input, for random upstream gradients of outputs
and final states. Against itself: cuts, packing and batching must not change a result.
"""

from itertools import product

import pytest
import torch
from memory_cases import (
    BACKENDS,
    CASES,
    FAST_BACKENDS,
    FLOAT64_TOLERANCE,
    KINDS,
    LOCAL_CASES,
    MEMORIES,
    PROJECTIONS,
    RULES,
    Case,
    assert_same,
    call,
    calls,
    first_state,
    make_inputs,
    native,
    pick,
    reference_result,
    run,
    run_in_pieces,
    run_packed_separately,
    summarize,
)

GRID = [Case(memory=m, rule=r, projection=p) for m, r, p in product(MEMORIES, RULES, PROJECTIONS)]
GRID += [Case(memory=m, rule=r, projection="shard") for m, r in product(KINDS, RULES)]
GLOBAL_GRID = [
    Case(is_global=True, memory=m, rule=r, shard_length=None)
    for m, r in product((*MEMORIES, *KINDS), ("plain", "momentum", "decay", "both"))
]
BIASES_AND_NORM = [
    Case(memory=m, rule="both", projection="shard", norm=norm, bias=bias, is_global=is_global)
    for m, norm, bias, is_global in product((*MEMORIES, *KINDS), (True, False), (True, False), (True, False))
]
BIASES_AND_NORM = [c.with_(projection="none", shard_length=None) if c.is_global else c for c in BIASES_AND_NORM]

against_reference = pytest.mark.parametrize("backend", FAST_BACKENDS)
every_backend = pytest.mark.parametrize("backend", (*BACKENDS, native))
every_call = calls((*BACKENDS, "native"))  # native is held to the reference in test_native_backend.py
every_case = pytest.mark.parametrize("case", CASES, ids=str)
local_cases = pytest.mark.parametrize("case", LOCAL_CASES, ids=str)


@against_reference
@pytest.mark.parametrize("case", GRID + GLOBAL_GRID, ids=str)
def test_grid(case: Case, backend: str):
    assert_same(run(case, backend), reference_result(case))


@against_reference
@pytest.mark.parametrize("case", BIASES_AND_NORM, ids=str)
def test_biases_and_norm(case: Case, backend: str):
    assert_same(run(case, backend), reference_result(case))


@against_reference
@every_case
@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 17])
def test_lengths_around_chunk_and_shard(case: Case, backend: str, length: int):
    case = case.with_(length=length, batch=1)
    assert_same(run(case, backend), reference_result(case))


@against_reference
@every_case
@pytest.mark.parametrize("sizes", [(1, 4), (1, 1), (8, 8), (64, 64), (5, 10)], ids=str)
def test_chunk_and_shard_sizes(case: Case, backend: str, sizes: tuple[int, int]):
    """Chunks of one token, shards of one chunk, chunks longer than the sequence, sizes that are no power of two."""
    shard_length = None if case.shard_length is None else sizes[1]
    case = case.with_(chunk_size=sizes[0], shard_length=shard_length, length=12, batch=1)
    assert_same(run(case, backend), reference_result(case), FLOAT64_TOLERANCE * case.amplification)


@against_reference
@every_case
@pytest.mark.parametrize("length", [1, 11])
def test_rows_at_different_positions(case: Case, backend: str, length: int):
    """At a shard's start, in mid-chunk, at a chunk's start in mid-shard, and one token before a shard's end."""
    case = case.with_(start=(16, 3, 12, 23), batch=4, length=length)
    assert_same(run(case, backend), reference_result(case))


@against_reference
@every_case
def test_rows_at_the_same_position_in_mid_chunk(case: Case, backend: str):
    case = case.with_(start=(6, 6), length=11)
    assert_same(run(case, backend), reference_result(case))


@against_reference
@every_case
@pytest.mark.parametrize("start", [None, (5, 3, 8, 0)], ids=["fresh", "continued"])
def test_packed_sequences_are_the_reference(case: Case, backend: str, start: tuple[int, ...] | None):
    case = case.with_(batch=1, lengths=(5, 0, 9, 2), length=16, start=start)
    assert_same(run(case, backend), reference_result(case))


@every_call
@pytest.mark.parametrize("start", [None, (5, 3, 8, 0)], ids=["fresh", "continued"])
def test_packed_sequences_are_separate_sequences(case: Case, backend: str, start: tuple[int, ...] | None):
    case = case.with_(batch=1, lengths=(5, 0, 9, 2), length=16, start=start)
    assert_same(run(case, backend), run_packed_separately(case, backend), case.tolerance)


@every_call
@pytest.mark.parametrize("cuts", [(8,), (3, 4, 13), (2, 6, 7, 15, 16), (1, 9, 10, 11)], ids=str)
def test_a_cut_anywhere_changes_nothing(case: Case, backend: str, cuts: tuple[int, ...]):
    """Chunks of 4 and shards of 8 tokens are cut at their borders and inside; gradients flow through the state."""
    case = case.with_(length=18, batch=1)
    whole = reference_result(case) if backend == "reference" else run(case, backend)
    assert_same(run_in_pieces(case, backend, cuts), whole, case.tolerance)


@every_call
def test_token_by_token(case: Case, backend: str):
    case = case.with_(length=18, batch=1)
    whole = reference_result(case) if backend == "reference" else run(case, backend)
    assert_same(run_in_pieces(case, backend, range(1, 18)), whole, case.tolerance)


@every_call
def test_a_token_moves_nothing_before_it_and_no_other_row(case: Case, backend: str):
    case = case.with_(batch=3)
    with torch.no_grad():
        x = make_inputs(case)
        before, _ = call(case, backend, x)
        for t in (0, 3, 6, 8, 12):
            changed = {name: tensor.clone() for name, tensor in x.items()}
            for name in ("q", "k", "v", "lr", "momentum", "decay"):
                if name in x:
                    changed[name][1, t] *= 0.5
            after, _ = call(case, backend, changed)
            moved = (after - before).abs().amax((2, 3))
            assert moved[1, t] > 0
            # Exact: what does not depend on a token does not see it in any sum.
            assert moved[0].max() == 0 and moved[2].max() == 0 and moved[1, :t].sum() == 0


@every_call
def test_a_row_does_not_depend_on_its_batch(case: Case, backend: str):
    case = case.with_(batch=3, start=(1, 7, 20))
    x = make_inputs(case)
    o, state = call(case, backend, x)
    states, outputs = [], []
    for row in range(3):
        alone = first_state(case, x).index_select(torch.tensor([row]))
        o_row, state_row = call(case, backend, pick(x, slice(row, row + 1), slice(None)), state=alone)
        outputs.append(o_row)
        states.append(state_row)
    flat = [s.tensors() for s in states]
    joined = type(state).from_tensors({name: torch.cat([t[name] for t in flat]) for name in flat[0]})
    assert_same(summarize(torch.cat(outputs), joined, x), summarize(o, state, x), case.tolerance)


@every_backend
def test_two_shards_in_one_call_are_two_calls(backend: str):
    """Gradients too; the values are among the identities."""
    for case in LOCAL_CASES:
        if case.shard_length is None:
            continue
        case = case.fit(backend).with_(length=16)
        x = make_inputs(case)
        halves = [call(case, backend, pick(x, slice(None), slice(i, i + 8)))[0] for i in (0, 8)]
        assert_same(
            summarize(torch.cat(halves, 1), None, x), summarize(call(case, backend, x)[0], None, x), case.tolerance
        )


@against_reference
@pytest.mark.parametrize("case", [c for c in CASES if c.rule in ("momentum", "decay", "both")], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gates_at_the_ends_of_their_range(case: Case, backend: str, value: float):
    """Exactly 0 and exactly 1, at some tokens and at all: no logarithm of zero, values and gradients as they are."""
    for every, norm in product((1, 3), (True, False)):
        if norm and not case.norm:
            continue
        results = []
        for name in (backend, "reference"):
            x = make_inputs(case.with_(norm=norm))
            with torch.no_grad():
                for gate in ("momentum", "decay"):
                    if gate in x:
                        x[gate][:, ::every] = value
            results.append(summarize(*call(case, name, x), x))
        assert all(t.isfinite().all() for t in results[0].values())
        # A memory that forgets everything answers with nearly nothing, which the norm blows up by 1e3 and more: the
        # gradients through it have condition numbers of 1e9, so with norm only five digits more than float32 are left.
        assert_same(*results, tolerance=1e-8 if norm else FLOAT64_TOLERANCE)


@every_backend
@local_cases
def test_gates_of_zero_are_no_gates(case: Case, backend: str):
    case = case.fit(backend)
    if case.rule == "token_scale":
        case = case.with_(rule="plain")
    plain = case.with_(rule="plain")
    x = make_inputs(plain)
    zeros = torch.zeros_like(x["lr"])
    want, _ = call(plain, backend, x)
    got, _ = call(plain, backend, x | {"momentum": zeros, "decay": zeros})
    assert_same({"o": got}, {"o": want}, case.tolerance)


@against_reference
@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p != "none"])
def test_zero_keys_and_queries(backend: str, projection: str):
    """A zero key adds nothing to the projection, a zero projected query stays zero, and no gradient is NaN."""
    case = Case(projection=projection)
    results = []
    for name in (backend, "reference"):
        x = make_inputs(case)
        with torch.no_grad():
            x["k"][:, :2] = 0
            x["k"][0, 6] = 0
            x["q"][:, 3] = 0
        results.append(summarize(*call(case, name, x), x))
    assert all(t.isfinite().all() for t in results[0].values())
    assert_same(*results)


@against_reference
@local_cases
def test_keys_of_any_length(case: Case, backend: str):
    results = []
    for name in (backend, "reference"):
        x = make_inputs(case)
        with torch.no_grad():
            x["k"] *= 0.2 + 1.5 * torch.rand(x["k"].shape[:-1], generator=torch.Generator().manual_seed(2)).unsqueeze(
                -1
            )
        results.append(summarize(*call(case, name, x), x))
    assert_same(*results)
