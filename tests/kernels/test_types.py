"""The containers: what a cache does with a memory state."""

import pytest
import torch
from memory_cases import Case, call, make_inputs

from modeling_tnt.kernels import FastWeights, MemoryParams, MemoryState, initial_memory_state


def a_state(**changes: object) -> MemoryState:
    case = Case(rule="both", projection="shard", batch=3, length=6).with_(**changes)
    with torch.no_grad():
        return call(case, "reference", make_inputs(case))[1]


@pytest.mark.parametrize("rule", ["plain", "both"])
@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize("projection", ["none", "shard"])
def test_flat_tensors_round_trip(rule: str, memory: str, projection: str):
    state = a_state(rule=rule, memory=memory, projection=projection)
    again = MemoryState.from_tensors(state.tensors())
    assert again.tensors().keys() == state.tensors().keys()
    assert all(again.tensors()[name] is t for name, t in state.tensors().items())
    assert (again.momentum is None, again.projection is None) == (rule == "plain", projection == "none")


def test_unknown_and_missing_names_are_named():
    flat = a_state().tensors()
    with pytest.raises(ValueError, match=r"unknown \['weights.w9'\], missing \[\]"):
        MemoryState.from_tensors(flat | {"weights.w9": flat["weights.w1"]})
    with pytest.raises(ValueError, match=r"missing \['position'\]"):
        MemoryState.from_tensors({name: t for name, t in flat.items() if name != "position"})


def test_rows_are_selected_with_repeats():
    state = a_state()
    rows = [2, 0, 0]
    for name, t in state.index_select(torch.tensor(rows)).tensors().items():
        assert torch.equal(t, torch.stack([state.tensors()[name][row] for row in rows])), name


def test_a_clone_is_independent_and_a_detached_state_has_no_graph():
    case = Case(projection="shard")
    x = make_inputs(case)
    _, state = call(case, "reference", x)
    clone, detached = state.detach().clone(), state.detach()
    detached.weights.w1.zero_()
    assert (clone.weights.w1 != 0).any() and (state.weights.w1 == 0).all()
    assert state.weights.w1.requires_grad and not detached.weights.w1.requires_grad


def test_size_does_not_depend_on_the_length():
    short, long = a_state(length=3), a_state(length=30)
    assert short.nbytes == long.nbytes == sum(t.nbytes for t in long.tensors().values())


def test_initial_state():
    params = MemoryParams(torch.randn(2, 4, 6), w2=torch.randn(2, 6, 4), b2=torch.randn(2, 4))
    state = initial_memory_state(params, 3, with_momentum=True, with_projection=True, dtype=torch.float64)
    assert state.weights.w1.dtype == torch.float64 and state.weights.b1 is None
    assert torch.equal(state.weights.b2, params.b2.double().expand(3, 2, 4))
    assert (state.momentum.w2 == 0).all() and (state.projection == 0).all() and state.position.tolist() == [0, 0, 0]
    bare = initial_memory_state(params, 3, with_momentum=False, with_projection=False)
    assert bare.momentum is None and bare.projection is None


def test_fast_weights_maps_skip_what_is_absent():
    weights = FastWeights(torch.ones(1), b1=torch.ones(1))
    doubled = weights.zip_map(torch.add, weights.map(lambda t: 1 * t))
    assert doubled.w1.item() == 2 and doubled.w2 is None
