"""Newton-Schulz, and the chunk update made of it, against what they are meant to do."""

import pytest
import torch
from memory_cases import MUON_CASES, Case, call, make_inputs
from torch.autograd import gradcheck

from modeling_tnt.kernels.muon import COEFFICIENTS, STEPS, newton_schulz

SHAPES = ((3, 3), (2, 5), (5, 2), (4, 1))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_maps_singular_values_alone(shape: tuple[int, int]):
    x = random(2, 3, *shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    # 1e-7 is added to the norm that x is divided by, and small singular values grow by up to 485.
    torch.testing.assert_close(newton_schulz(x), u * s.unsqueeze(-2) @ v, atol=1e-4, rtol=0)
    assert 0.67 < s.min() and s.max() < 1.21


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(shape: tuple[int, int]):
    assert gradcheck(newton_schulz, random(2, *shape).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_stays_zero_beside_others_and_gradients_are_finite(dtype: torch.dtype):
    x = random(3, 4, 2, dtype=dtype)
    x[1] = 0
    x.requires_grad_()
    y = newton_schulz(x)
    assert y.dtype == dtype and y[1].abs().max() == 0 and y[0].abs().max() > 0
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_size_of_a_step_does_not_matter(scale: float):
    """Up to the 1e-7 beside its norm, of about 3."""
    x = random(4, 6)
    torch.testing.assert_close(newton_schulz(scale * x), newton_schulz(x), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", MUON_CASES, ids=str)
def test_columns_keep_the_norms_of_the_learned_start(case: Case, backend: str):
    case = case.with_(length=12)
    x = make_inputs(case)
    with torch.no_grad():
        _, state = call(case, backend, x)
    for name in ("w1", "w2") if case.memory == "mlp" else ("w1",):
        learned, initial = getattr(state.weights, name), x[f"params.{name}"].detach()
        torch.testing.assert_close(learned.norm(dim=-2), initial.norm(dim=-2).expand(2, -1, -1))
        assert (learned - initial).abs().max() > 0.1


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", MUON_CASES, ids=str)
def test_without_a_step_nothing_is_learned(case: Case, dtype: torch.dtype, backend: str):
    """Step sizes of zero, momentum and decay as they are: matrices stay, also cut in mid-chunk, and so do gradients."""
    case = case.with_(dtype=dtype, length=14)
    x = make_inputs(case)
    with torch.no_grad():
        x["lr"].zero_()
    o, state = call(case, backend, x)
    initial = x["params.w1"].detach().expand_as(state.weights.w1)
    torch.testing.assert_close(state.weights.w1.detach(), initial)
    grads = torch.autograd.grad(o.sum() + state.weights.w1.sum(), list(x.values()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)


def test_the_backward_keeps_the_state_before_each_chunk_only():
    """Besides the inputs, of which some are kept as they were cut; all of a chunk would be nine times as much."""
    case = Case(is_global=True, update="muon", chunk_size=32, shard_length=None, batch=1, length=512, head_dim=16)
    saved = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = make_inputs(case.with_(hidden=32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, "torch", x, output_final_state=False)
    one_state = sum(x[name].nbytes for name in ("params.w1", "params.b1", "params.w2", "params.b2"))
    inputs = 4 * x["q"].nbytes + x["lr"].nbytes
    assert sum(saved.values()) < 2 * inputs + (512 // 32 + 4) * one_state
