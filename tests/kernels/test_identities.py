"""The identities of the memory operations: special cases in which they are a known, simple recurrence."""

import pytest
import torch
from memory_cases import BACKENDS
from torch.nn import functional as F

from modeling_tnt.kernels import MemoryParams, local_memory

B, T, H, D, M = 2, 11, 2, 4, 6

# float64 rounding over at most T·D terms of order one.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, T, H, D, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    lr, momentum, decay = 0.1 + 0.8 * torch.rand(3, B, T, H, dtype=torch.float64)
    return q, k, v, lr, momentum, decay


def linear_params(zero: bool = False) -> MemoryParams:
    w1 = torch.randn(H, D, D, dtype=torch.float64)
    return MemoryParams(w1 * 0 if zero else w1)


def mlp_params() -> MemoryParams:
    return MemoryParams(torch.randn(H, D, M, dtype=torch.float64) / 2, w2=torch.randn(H, M, D, dtype=torch.float64) / 2)


def test_one_chunk_of_a_linear_memory_is_causal_linear_attention(backend, tokens):
    q, k, v, lr, *_ = tokens
    o, state = local_memory(
        q, k, v, torch.ones_like(lr), linear_params(zero=True), chunk_size=T, qk_projection="none",
        output_final_state=True, backend=backend,
    )  # fmt: skip
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    torch.testing.assert_close(o, torch.einsum("bhts,bshd->bthd", scores, v), **CLOSE)
    torch.testing.assert_close(state.weights.w1, torch.einsum("bshd,bshe->bhde", k, v), **CLOSE)


def test_chunk_of_one_is_the_delta_rule(backend, tokens):
    q, k, v, lr, *_ = tokens
    params = linear_params()
    o, _ = local_memory(q, k, v, lr, params, chunk_size=1, qk_projection="none", backend=backend)
    w = params.w1.expand(B, H, D, D)
    for t in range(T):
        key = k[:, t].unsqueeze(-1)
        error = (k[:, t].unsqueeze(-2) @ w).squeeze(-2) - v[:, t]
        w = w - lr[:, t, :, None, None] * key * error.unsqueeze(-2)
        torch.testing.assert_close(o[:, t], (q[:, t].unsqueeze(-2) @ w).squeeze(-2), **CLOSE)


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
@pytest.mark.parametrize("with_gates", [False, True])
def test_without_reset_and_projection_it_is_titans(backend, tokens, chunk_size, with_gates):
    """Titans' deep memory (arXiv 2501.00663, eq. 13 and 14) in mini-batches (TTT, arXiv 2407.04620, eq. 6)."""
    q, k, v, lr, momentum, decay = tokens
    params = mlp_params()
    gates = {"momentum": momentum, "decay": decay} if with_gates else {}
    o, _ = local_memory(q, k, v, lr, params, chunk_size=chunk_size, qk_projection="none", backend=backend, **gates)
    for b in range(B):
        for h in range(H):
            w1, w2 = params.w1[h], params.w2[h]
            s1, s2 = torch.zeros_like(w1), torch.zeros_like(w2)
            for t in range(T):
                if t % chunk_size == 0:
                    anchor1, anchor2 = w1, w2
                z = (k[b, t, h] @ anchor1).requires_grad_()
                a = F.gelu(z, approximate="tanh")
                (slope,) = torch.autograd.grad(a.sum(), z)
                error = a.detach() @ anchor2 - v[b, t, h]
                g1 = torch.outer(k[b, t, h], (anchor2 @ error) * slope)
                g2 = torch.outer(a.detach(), error)
                s1 = (momentum[b, t, h] if with_gates else 0) * s1 - lr[b, t, h] * g1
                s2 = (momentum[b, t, h] if with_gates else 0) * s2 - lr[b, t, h] * g2
                w1 = (1 - decay[b, t, h] if with_gates else 1) * w1 + s1
                w2 = (1 - decay[b, t, h] if with_gates else 1) * w2 + s2
                want = F.gelu(q[b, t, h] @ w1, approximate="tanh") @ w2
                torch.testing.assert_close(o[b, t, h], want, **CLOSE)


def test_zero_lr_reads_the_initial_memory(backend, tokens):
    q, k, v, lr, *_ = tokens
    params = mlp_params()
    o, _ = local_memory(
        q, k, v, 0 * lr, params, chunk_size=4, shard_length=8, qk_projection="none", backend=backend
    )  # fmt: skip
    hidden = F.gelu(torch.einsum("bthd,hdm->bthm", q, params.w1), approximate="tanh")
    torch.testing.assert_close(o, torch.einsum("bthm,hmd->bthd", hidden, params.w2), **CLOSE)


def test_zero_lr_reads_at_the_projected_query(backend, tokens):
    """The projection (TNT eq. 7, appendix C) alone: M_t from unit keys of the shard up to and including t."""
    q, k, v, lr, *_ = tokens
    identity = MemoryParams(torch.eye(D, dtype=torch.float64).expand(H, D, D))
    o, _ = local_memory(q, 3 * k, v, 0 * lr, identity, chunk_size=2, shard_length=6, backend=backend)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    scores[:, :, 6:, :6] = 0
    torch.testing.assert_close(o, torch.einsum("bhts,bshd->bthd", scores, k), **CLOSE)


def test_full_decay_remembers_the_current_token_only(backend, tokens):
    q, k, v, lr, *_ = tokens
    ones, zeros = torch.ones_like(lr), torch.zeros_like(lr)
    params = linear_params(zero=True)
    o, state = local_memory(
        q, k, v, lr, params, chunk_size=T, qk_projection="none", momentum=zeros, decay=ones,
        output_final_state=True, backend=backend,
    )  # fmt: skip
    own = lr.unsqueeze(-1) * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(o, own, **CLOSE)
    last = lr[:, -1, :, None, None] * k[:, -1].unsqueeze(-1) * v[:, -1].unsqueeze(-2)
    torch.testing.assert_close(state.weights.w1, last, **CLOSE)


@pytest.mark.parametrize("qk_projection", ["none", "shard", "chunk"])
def test_two_shards_in_one_call_are_two_calls(backend, tokens, qk_projection):
    x = [t[:, :8] for t in tokens]
    params = mlp_params()

    def read(q, k, v, lr, momentum, decay):
        return local_memory(
            q, k, v, lr, params, chunk_size=2, shard_length=4, qk_projection=qk_projection, momentum=momentum,
            decay=decay, output_final_state=True, backend=backend,
        )  # fmt: skip

    o, state = read(*x)
    first, _ = read(*(t[:, :4] for t in x))
    second, last = read(*(t[:, 4:] for t in x))
    torch.testing.assert_close(o, torch.cat([first, second], 1), **CLOSE)
    for name, t in last.tensors().items():
        if name != "position":
            torch.testing.assert_close(state.tensors()[name], t, **CLOSE)
