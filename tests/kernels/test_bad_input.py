"""Every mistake a caller can make is answered by a message that names the argument, the rule and the value."""

import re

import pytest
import torch
from memory_cases import Case, call, make_inputs

from modeling_tnt.kernels import BACKENDS, MemoryParams, choose_backend, global_memory, local_memory

B, T, H, D, M = 2, 5, 2, 4, 6
PARAMS = MemoryParams(torch.ones(H, D, M), torch.ones(H, M), torch.ones(H, M, D), torch.ones(H, D))
LINEAR = MemoryParams(torch.ones(H, D, D))


def good() -> dict[str, object]:
    """Arguments of a call that works."""
    x = torch.ones(B, T, H, D)
    return {
        "q": x, "k": x, "v": x, "lr": x[..., 0], "params": PARAMS, "chunk_size": 2, "shard_length": 4,
        "backend": "reference",
    }  # fmt: skip


def state_of(**changes: object):
    case = Case(batch=B, length=T, heads=H, head_dim=D, hidden=M, dtype=torch.float32, projection="shard")
    case = case.with_(**changes)
    with torch.no_grad():
        return call(case, "reference", make_inputs(case))[1]


X = torch.ones(B, T, H, D)
GATE = torch.ones(B, T, H)
BAD = {
    "q type": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q dims": ({"q": X[0]}, ValueError, "q must have shape [B, T, H, D], got (5, 2, 4)"),
    "no token": ({"q": X[:, :0]}, ValueError, "got [B, T, H, D] = (2, 0, 2, 4); skip the call when there is no token"),
    "no row": ({"q": X[:0]}, ValueError, "q must not be empty"),
    "q dtype": ({"q": X.long()}, TypeError, "q must be a floating-point tensor, got torch.int64"),
    "k shape": ({"k": X[:, :3]}, ValueError, "k must have shape [B, T, H, D] = (2, 5, 2, 4), got (2, 3, 2, 4)"),
    "v dtype": ({"v": X.double()}, TypeError, "v must have the dtype of q, torch.float32, got torch.float64"),
    "v type": ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
    "k device": ({"k": X.to("meta")}, ValueError, "k is on meta but q is on cpu; move it with .to('cpu')"),
    "lr shape": ({"lr": X}, ValueError, "lr must have shape [B, T, H] = (2, 5, 2), got (2, 5, 2, 4)"),
    "lr dtype": ({"lr": GATE.int()}, TypeError, "lr must be a floating-point tensor, got torch.int32"),
    "momentum": ({"momentum": GATE[0]}, ValueError, "momentum must have shape [B, T, H] = (2, 5, 2), got (5, 2)"),
    "momentum type": ({"momentum": 0.9}, TypeError, "momentum must be a tensor, got float"),
    "decay": ({"decay": GATE[..., 0]}, ValueError, "decay must have shape [B, T, H] = (2, 5, 2), got (2, 5)"),
    "params type": ({"params": tuple(PARAMS)}, TypeError, "params must be a MemoryParams, got tuple"),
    "w1": ({"params": MemoryParams(torch.ones(D, M))}, ValueError, "params.w1 must be a tensor of shape [H, D, M]"),
    "w1 type": ({"params": MemoryParams(None)}, ValueError, "params.w1 must be a tensor of shape [H, D, M]"),
    "w1 heads": (
        {"params": PARAMS._replace(w1=torch.ones(3, D, M))},
        ValueError,
        "params.w1 must have shape [H, D, M] = (2, 4, 6), got (3, 4, 6)",
    ),
    "w2": (
        {"params": PARAMS._replace(w2=torch.ones(H, D, M))},
        ValueError,
        "params.w2 must have shape [H, M, D] = (2, 6, 4), got (2, 4, 6)",
    ),
    "b1": ({"params": PARAMS._replace(b1=torch.ones(H, D))}, ValueError, "params.b1 must have shape [H, M] = (2, 6)"),
    "b2 device": ({"params": PARAMS._replace(b2=torch.ones(H, D, device="meta"))}, ValueError, "params.b2 is on meta"),
    "linear b2": (
        {"params": LINEAR._replace(b2=torch.ones(H, D))},
        ValueError,
        "params.b2 belongs to the second layer; a linear memory (w2=None) must not have it",
    ),
    "linear M": (
        {"params": MemoryParams(torch.ones(H, D, M))},
        ValueError,
        "a linear memory (w2=None) needs params.w1 of shape [H, D, D], got M=6 and D=4",
    ),
    "half a norm": (
        {"params": PARAMS._replace(norm_weight=torch.ones(H, D))},
        ValueError,
        "params.norm_weight and params.norm_bias come together: pass both or neither",
    ),
    "norm shape": (
        {"params": PARAMS._replace(norm_weight=torch.ones(D), norm_bias=torch.ones(D))},
        ValueError,
        "params.norm_weight must have shape [H, D] = (2, 4), got (4,)",
    ),
    "chunk type": ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float"),
    "chunk bool": ({"chunk_size": True}, TypeError, "chunk_size must be an int, got bool"),
    "chunk zero": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "shard type": ({"shard_length": "4"}, TypeError, "shard_length must be an int, got str"),
    "shard zero": ({"shard_length": 0}, ValueError, "shard_length must be at least 1, got 0"),
    "shard multiple": (
        {"chunk_size": 4, "shard_length": 10},
        ValueError,
        "chunk_size=4 must divide shard_length=10; use shard_length=8 or None",
    ),
    "shard too small": (
        {"chunk_size": 4, "shard_length": 2},
        ValueError,
        "chunk_size=4 must divide shard_length=2; use shard_length=4 or None",
    ),
    "projection": (
        {"qk_projection": "global"},
        ValueError,
        "qk_projection='global' is unknown; use one of ('shard', 'chunk', 'none')",
    ),
    "normalize type": ({"normalize_projection": 1}, TypeError, "normalize_projection must be a bool, got int"),
    "normalize nothing": (
        {"qk_projection": "none", "normalize_projection": True},
        ValueError,
        "normalize_projection=True needs a projection",
    ),
    "token scale shape": (
        {"token_scale": torch.ones(3)},
        ValueError,
        "token_scale must have shape [chunk_size] = (2,), got (3,)",
    ),
    "token scale and gates": (
        {"token_scale": torch.ones(2), "decay": GATE},
        ValueError,
        "token_scale excludes momentum and decay",
    ),
    "cu type": ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a tensor, got list"),
    "cu dtype": (
        {"cu_seqlens": torch.tensor([0.0, 5.0])},
        ValueError,
        "cu_seqlens must be a [N + 1] tensor of int32 or int64, got (2,) torch.float32",
    ),
    "cu shape": ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens must be a [N + 1] tensor"),
    "cu rows": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "cu_seqlens needs all sequences packed into one row (B = 1), got B=2",
    ),
    "state type": ({"initial_state": {}}, TypeError, "initial_state must be a MemoryState, got dict"),
    "state rows": (
        {"initial_state": state_of(batch=3)},
        ValueError,
        "initial_state.weights.w1 must have shape [rows, *params] = (2, 2, 4, 6), got (3, 2, 4, 6)",
    ),
    "state of another memory": (
        {"initial_state": state_of(bias=False)},
        ValueError,
        "initial_state.weights.b1 does not match params.b1: one is None, one is not",
    ),
    "state with momentum": (
        {"initial_state": state_of(rule="momentum")},
        ValueError,
        "initial_state.momentum and momentum must both be given or both be None",
    ),
    "state without momentum": (
        {"initial_state": state_of(), "momentum": GATE},
        ValueError,
        "initial_state.momentum and momentum must both be given or both be None",
    ),
    "state without projection": (
        {"initial_state": state_of(projection="none")},
        ValueError,
        "initial_state.projection does not fit qk_projection='shard'",
    ),
    "state with projection": (
        {"initial_state": state_of(), "qk_projection": "none"},
        ValueError,
        "initial_state.projection does not fit qk_projection='none'",
    ),
    "projection shape": (
        {"initial_state": state_of()._replace(projection=torch.ones(B, H, D, M))},
        ValueError,
        "initial_state.projection must have shape [rows, H, D, D] = (2, 2, 4, 4), got (2, 2, 4, 6)",
    ),
    "position": (
        {"initial_state": state_of()._replace(position=torch.zeros(B))},
        ValueError,
        "initial_state.position must be an int64 tensor of shape [rows] = (2,)",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend='cuda' is unknown; use one of 'auto', 'reference', 'torch', 'triton'",
    ),
    "no such backend here": ({"backend": "triton"}, ValueError, "backend='triton' cannot run"),
}


@pytest.mark.parametrize("name", BAD)
def test_local_memory(name: str):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        local_memory(**good() | changes)


@pytest.mark.parametrize(
    "ends, shown",
    [([0, 4], "[0, 4]"), ([1, 5], "[1, 5]"), ([0, 3, 2, 5], "[0, 3, 2, 5]"), ([0] * 30 + [4], "0, '…']")],
)
def test_packing(ends: list[int], shown: str):
    packed = good() | {name: good()[name][:1] for name in ("q", "k", "v", "lr")}
    message = f"cu_seqlens must rise from 0 to T=5, got {'[0, 0' if len(ends) > 20 else shown}"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        local_memory(**packed, cu_seqlens=torch.tensor(ends))
    assert shown in str(caught.value)


def test_global_memory_is_checked_too():
    arguments = good() | {"lr": X}
    del arguments["shard_length"]
    with pytest.raises(ValueError, match=r"lr must have shape"):
        global_memory(**arguments)
    with pytest.raises(ValueError, match=r"initial_state.projection does not fit qk_projection='none'"):
        global_memory(**arguments | {"lr": GATE, "initial_state": state_of()})


@pytest.mark.parametrize("operation", [local_memory, global_memory])
def test_a_misspelt_argument_is_refused(operation):
    with pytest.raises(TypeError, match="chunk_sizes"):
        operation(X, X, X, GATE, PARAMS, chunk_size=2, chunk_sizes=2)


def test_good_arguments_are_good():
    """Every case above differs from this one by what it names only."""
    o, state = local_memory(**good())
    assert o.shape == X.shape and state is None


def test_auto_says_what_it_picks_and_why():
    choice = choose_backend("cpu")
    assert choice.name in BACKENDS and "cpu" in choice.reason
