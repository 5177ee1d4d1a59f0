"""The state after a chunk, one tensor of it: W ← B W + F S − Σ gain a δ and S ← m S − Σ momentum_gain a δ."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Entries of one program's part of a tensor.
BLOCK = 1024


@triton.jit
def program_entries(F, BLOCK: tl.constexpr):
    """This program's memory n (int64), entries [BLOCK] of its tensor, and which of them exist."""
    blocks = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    f = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), f, f < F


@triton.jit
def load_coefficient(pointer, n, STRIDE, H: tl.constexpr):
    """The scalar of memory n, (shard, head), in [shards, H] whose shards are STRIDE apart."""
    return tl.load(pointer + n // H * STRIDE + n % H)


@triton.jit(do_not_specialize=["NEXT", "STRIDE"])
def advance_kernel(
    w,  # [N, F] float32
    s,  # [N, F] float32, or None
    p,  # [N, F / LAST, S · LAST] float32: Σ gain a δ, and beside it with momentum (S = 2) Σ momentum_gain a δ
    end_decay, end_momentum, momentum_decay,  # [shards, H] float32, shards STRIDE apart, or None
    next_w, next_s,  # [NEXT, F] float32 out: of the memories that have another chunk, the first ones
    next_operand,  # [NEXT, F] out: next_w as an operand of products, or None
    end_w, end_s,  # [N, F] float32 out: of the other memories
    NEXT, STRIDE,
    H: tl.constexpr, F: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, f, valid = program_entries(F, BLOCK)
    entry = n * F + f
    beside = n * F * WIDTH + f // LAST * (LAST * WIDTH) + f % LAST
    new_w = tl.load(w + entry, mask=valid, other=0.0)
    if end_decay is not None:
        new_w *= load_coefficient(end_decay, n, STRIDE, H)
    new_w -= tl.load(p + beside, mask=valid, other=0.0)
    if s is not None:
        old_s = tl.load(s + entry, mask=valid, other=0.0)
        new_w += old_s * load_coefficient(end_momentum, n, STRIDE, H)
        new_s = old_s * load_coefficient(momentum_decay, n, STRIDE, H)
        new_s -= tl.load(p + beside + LAST, mask=valid, other=0.0)
    if n < NEXT:
        tl.store(next_w + entry, new_w, mask=valid)
        if next_operand is not None:
            tl.store(next_operand + entry, new_w.to(next_operand.dtype.element_ty), mask=valid)
        if s is not None:
            tl.store(next_s + entry, new_s, mask=valid)
    else:
        tl.store(end_w + entry, new_w, mask=valid)
        if s is not None:
            tl.store(end_s + entry, new_s, mask=valid)


def advance(
    state: tuple[Tensor, Tensor | None],
    products: Tensor,
    coefficients: tuple[Tensor | None, Tensor | None, Tensor | None],
    following: tuple[Tensor, Tensor | None, Tensor | None],
    end: tuple[Tensor, Tensor | None],
) -> None:
    """One tensor of the state, weights and momentum, after a chunk of a span.

    Args:
        state: [shards, H, …] float32, contiguous, momentum or None.
        products: [shards · H, …, S · last] float32, see the kernel.
        coefficients: end_decay, end_momentum, momentum_decay, each [shards, H] with one stride, or None.
        following: weights, momentum, operand of the chunks that come next, [fewer shards, H, …].
        end: weights and momentum [shards, H, …] of the shards that have none.
    """
    w, s = state
    shards, heads = w.shape[:2]
    F, last = w[0, 0].numel(), w.shape[-1]
    advance_kernel[(shards * heads * triton.cdiv(F, BLOCK),)](
        w, s, products, *coefficients, *following, *end, following[0].shape[0] * heads, shard_stride(coefficients),
        heads, F, last, products.shape[-1] // last, BLOCK,
    )  # fmt: skip


def shard_stride(coefficients: tuple[Tensor | None, ...]) -> int:
    """Entries from one shard to the next, of those that are there."""
    return next((c.stride(0) for c in coefficients if c is not None), 0)
