"""The reference itself: its one-token gradient against formulas, and gradcheck of everything it computes."""

import pytest
import torch
from memory_cases import Case, call, make_inputs
from torch.autograd import gradcheck
from torch.nn import functional as F

from modeling_tnt.kernels import MemoryParams
from modeling_tnt.kernels.memories.kinds import memory_kind
from modeling_tnt.kernels.reference import inner_gradient, memory

TINY = Case(batch=1, heads=2, head_dim=3, hidden=2, chunk_size=2, shard_length=4, length=3, start=(3,))

GRADCHECK_CASES = [
    TINY.with_(projection="shard"),
    TINY.with_(rule="momentum", projection="chunk"),
    TINY.with_(rule="decay", projection="shard_normalized"),
    TINY.with_(rule="both", projection="chunk_normalized"),
    TINY.with_(rule="token_scale"),
    TINY.with_(rule="both", norm=False, bias=False, shard_length=None, projection="shard"),
    TINY.with_(memory="linear", rule="both", projection="shard_normalized"),
    TINY.with_(memory="linear", rule="token_scale", norm=False, bias=False),
    TINY.with_(rule="both", batch=1, lengths=(2, 0, 2), length=4, start=(1, 3, 2)),
    TINY.with_(is_global=True, rule="both"),
    TINY.with_(is_global=True, memory="linear", norm=False),
    TINY.with_(memory="swiglu", rule="both", projection="shard"),
    TINY.with_(memory="mlp3", rule="momentum"),
    TINY.with_(is_global=True, rule="both", update="muon"),
]


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case: Case):
    x = make_inputs(case)

    def fn(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        o, state = call(case, "reference", dict(zip(x, tensors, strict=True)))
        return o, *(t for name, t in state.tensors().items() if name != "position")

    # fast_mode compares one random projection of the Jacobian, which a wrong entry changes with probability one.
    torch.manual_seed(0)
    assert gradcheck(fn, tuple(x.values()), fast_mode=True)


def _params(hidden: int | None, norm: bool, bias: bool) -> MemoryParams:
    torch.manual_seed(0)
    H, D = 2, 5
    shapes = {"w1": (H, D, hidden or D)}
    if bias:
        shapes["b1"] = (H, hidden or D)
    if hidden:
        shapes["w2"] = (H, hidden, D)
        if bias:
            shapes["b2"] = (H, D)
    if norm:
        shapes |= {"norm_weight": (H, D), "norm_bias": (H, D)}
    return MemoryParams(**{name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("hidden", [None, 7])
def test_one_token_gradient_is_the_formula(hidden: int | None, norm: bool, bias: bool):
    """Against PyTorch's own layer norm and gelu for the value, and the chain rule by hand for the gradient."""
    params = _params(hidden, norm, bias)
    k, v = torch.randn(2, 2, 5, dtype=torch.float64)
    kind = memory_kind("mlp" if hidden else "linear")
    gradient = inner_gradient(kind, params, params.fast_weights, k, v)
    value = memory(kind, params, params.fast_weights, k)
    for h in range(2):
        w1, b1, w2, b2, g, beta = (None if x is None else x[h] for x in params[:6])
        z1 = k[h] @ w1 + (b1 if bias else 0)
        a, y = k[h], z1
        if hidden:
            z1.requires_grad_()
            a = F.gelu(z1, approximate="tanh")
            (slope,) = torch.autograd.grad(a.sum(), z1)
            a = a.detach()
            y = a @ w2 + (b2 if bias else 0)
        want = k[h] + F.layer_norm(y, (5,), g, beta, 1e-6) if norm else y
        torch.testing.assert_close(value[h], want.detach(), rtol=1e-12, atol=1e-12)

        error = want.detach() - v[h]
        if norm:
            deviation = (y.var(unbiased=False) + 1e-6).sqrt()
            n = (y - y.mean()) / deviation
            e = error * g
            delta = (e - e.mean() - n * (e * n).mean()) / deviation
        else:
            delta = error
        by_hand = {"w1": torch.outer(a, delta), "b1": delta}
        if hidden:
            delta1 = (w2 @ delta) * slope
            by_hand = {"w1": torch.outer(k[h], delta1), "b1": delta1, "w2": torch.outer(a, delta), "b2": delta}
        for name, got in gradient._asdict().items():
            if getattr(params, name) is None:
                assert got is None
            else:
                torch.testing.assert_close(got[h], by_hand[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_without_a_graph(context):
    case = TINY.with_(rule="both", projection="shard")
    x = make_inputs(case)
    want, _ = call(case, "reference", x)
    with context():
        got, _ = call(case, "reference", x)
    assert torch.equal(got, want) and not got.requires_grad
