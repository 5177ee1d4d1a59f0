"""How the backends that compute in float32 are held to the reference, and the cases that they share.

The reference runs in float64 on the same float32 numbers. A result may be off by 2e-5 of its tensor's largest entry
(float32 rounds at 6e-8, and some hundred roundings go into an entry), or, where the memory itself amplifies rounding (a
norm that divides by a small deviation), by 8 times what the torch backend in float32 is off on the same numbers, but
never by more than 1e-2: a wrong term is above that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import torch
from memory_cases import (
    LOCAL_CASES,
    MEMORIES,
    PROJECTIONS,
    RULES,
    Case,
    Result,
    call,
    first_state,
    make_inputs,
    pick,
    summarize,
)
from torch import Tensor

from modeling_tnt.kernels import MemoryState

ROUNDING = 2e-5
SMALLEST = 0.1  # a tensor counts as no smaller than this: a gradient may vanish but for rounding
AMPLIFIED = 8
LIMIT = 1e-2

# The least that the kernels take: 16 entries a head, 16 hidden units. In float32 a tile has 16 rows: shorter chunks are
# padded, longer ones have several tiles.
SMALL = {"head_dim": 16, "hidden": 16, "dtype": torch.float32}
LOCAL = [case.with_(**SMALL) for case in LOCAL_CASES]
# Chunks of 2 in shards of 6: the backward goes through two groups, of two chunks and of one, and a shorter shard.
GRID = [
    Case(
        memory=memory, rule=rule, projection=projection, norm=i % 3 != 0, bias=i % 4 < 2, chunk_size=2, shard_length=6,
        batch=1, heads=1, length=8, seed=i, **SMALL,
    )
    for i, (projection, rule, memory) in enumerate(product(PROJECTIONS, RULES, MEMORIES))
]  # fmt: skip

Change = Callable[[dict[str, Tensor]], None]


def device_of(backend: str) -> str:
    """Where a backend runs here: Triton's kernels in their interpreter, or compiled where there is a GPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def inputs(case: Case, change: Change | None = None) -> dict[str, Tensor]:
    """The inputs of a case, on the CPU; `change` writes into them before.

    Where projected queries are normalised, no query is nearly orthogonal to its key: the first of a chunk would be
    projected to nearly nothing, and its gradient be a difference of large numbers.
    """
    x = make_inputs(case)
    if case.projection.endswith("_normalized"):
        with torch.no_grad():
            along = (x["q"] * x["k"]).sum(-1, keepdim=True)
            x["q"] += 2 * torch.where(along < 0, -1, 1) * x["k"]
    if change is not None:
        with torch.no_grad():
            change(x)
    return x


def read(
    case: Case, backend: str, x: dict[str, Tensor], state: MemoryState | None = None
) -> tuple[Tensor, MemoryState]:
    """o and final state of a backend, on the CPU, from inputs there."""
    device = device_of(backend)
    if state is None and case.start is not None:
        state = first_state(case, x)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], device=device)
    state = None if state is None else state.map(lambda t: t.to(device))
    moved = {name: t.to(device) for name, t in x.items()}
    o, state = call(case, backend, moved, state=state, cu_seqlens=cu_seqlens)
    return o.cpu(), state.map(Tensor.cpu)


def run(case: Case, backend: str, change: Change | None = None) -> Result:
    x = inputs(case, change)
    return summarize(*read(case, backend, x), x)


def run_in_pieces(case: Case, backend: str, cuts: Sequence[int]) -> Result:
    """The same call cut before the given tokens; each piece goes on from the final state of the one before."""
    x = inputs(case)
    outputs, state = [], None
    for start, end in zip([0, *cuts], [*cuts, case.length], strict=True):
        o, state = read(case, backend, pick(x, slice(None), slice(start, end)), state)
        outputs.append(o)
    return summarize(torch.cat(outputs, 1), state, x)


@cache
def oracle(case: Case, backend: str, dtype: torch.dtype, change: Change | None) -> Result:
    """Another backend on the same numbers, in another precision."""
    x = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs(case, change).items()}
    return summarize(*call(case, backend, x), x)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_right(got: Result, case: Case, change: Change | None = None, rounding: float = ROUNDING) -> None:
    """Each tensor of `got` is the reference's, to the tolerance of this file or the given one."""
    want = oracle(case, "reference", torch.float64, change)
    assert got.keys() == want.keys()
    assert torch.equal(got["position"], want["position"])
    wrong = []
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        error, size = largest(got[name].double() - expected), max(largest(expected), SMALLEST)
        allowed = rounding * size
        if allowed < error:
            single = oracle(case, "torch", torch.float32, change)[name].double()
            allowed = min(max(allowed, AMPLIFIED * largest(single - expected)), LIMIT * size)
        if not error <= allowed:  # also true for NaN
            wrong.append(f"{name}: off by {error:.2e}, allowed {allowed:.2e}, largest entry {size:.2e}")
    assert not wrong, "\n".join(wrong)


def zero_keys(x: dict[str, Tensor]) -> None:
    x["k"][:, :2] = 0
    x["k"][0, 6] = 0
    x["q"][:, 3] = 0


def gates_of_zero(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name].fill_(0)


def gates_of_one(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name].fill_(1)


def some_gates_of_zero_and_one(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name][:, ::3] = 1
        x[name][:, 1::3] = 0
