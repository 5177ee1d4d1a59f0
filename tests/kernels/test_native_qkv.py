"""Convolution, silu and unit length of q, k and v by the native kernels, beside torch's operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_tnt.kernels import backends

pytestmark = pytest.mark.native

# Rows, tokens, heads, head dim, taps, boundaries of packed sequences. 70 tokens: three of the blocks that threads take.
CASES = (
    (2, 70, 2, 32, 4, None),
    (1, 100, 3, 16, 4, (0, 3, 3, 40, 41, 100)),
    (1, 33, 1, 64, 1, None),
    (3, 2, 2, 16, 4, None),  # sequences shorter than the convolution
)


def leaves(case: tuple, dtype: torch.dtype) -> list[Tensor]:
    B, T, H, D, K, _ = case
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, H * D)] * 3 + [(3 * H * D, K)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def by_torch(case: tuple, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> list[Tensor]:
    _, T, H, D, K, boundaries = case
    ends = (0, T) if boundaries is None else boundaries
    x = torch.cat([q, k, v], dim=-1)
    pieces = []
    for start, end in zip(ends, ends[1:], strict=False):
        padded = F.pad(x[:, start:end], (0, 0, K - 1, 0))
        pieces.append(sum(weight[:, j] * padded[:, j : j + end - start] for j in range(K)))
    q, k, v = F.silu(torch.cat(pieces, dim=1)).unflatten(-1, (3, H, D)).unbind(-3)
    return [F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6), v]


def by_native(case: tuple, *x: Tensor) -> list[Tensor]:
    boundaries = None if case[-1] is None else torch.tensor(case[-1])
    kernels = backends.qkv_kernels("native", x[0], case[3])
    return list(kernels.qkv(*x, boundaries, case[3]))


def with_gradients(read, case: tuple, dtype: torch.dtype) -> list[Tensor]:
    x = leaves(case, dtype)
    out = read(case, *x)
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64)).sum() for o in out)
    return [t.detach().double() for t in (*out, *torch.autograd.grad(loss, x))]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_equal_to_torch(case, dtype, tolerance):
    """Some dozens of roundings of 6e-8, or of 4e-3 in bfloat16, relative to the length of each tensor."""
    want = with_gradients(by_torch, case, torch.float64)
    for result, expected in zip(with_gradients(by_native, case, dtype), want, strict=True):
        assert (result - expected).norm() <= tolerance * expected.norm()


def test_the_number_of_threads_changes_nothing():
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(with_gradients(by_native, CASES[0], torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_head_of_zeros_stays_zero_and_has_a_finite_gradient():
    case = CASES[3]
    q, k, v, weight = leaves(case, torch.float32)
    q = torch.zeros_like(q).requires_grad_()
    out = by_native(case, q, k, v, weight)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    out[0].sum().backward()
    want = torch.zeros(q.shape, dtype=torch.float64, requires_grad=True)
    by_torch(case, want, *(t.detach().double() for t in (k, v, weight)))[0].sum().backward()
    torch.testing.assert_close(q.grad.double(), want.grad, rtol=1e-5, atol=0)


def test_what_the_kernels_are_not_made_for_is_left_to_torch():
    x = torch.randn(1, 4, 32)
    assert backends.qkv_kernels("torch", x, 16) is None
    assert backends.qkv_kernels("auto", x.double(), 16) is None
    assert backends.qkv_kernels("auto", x, 8) is None
