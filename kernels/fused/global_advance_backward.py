"""Back over the state after a chunk, for one tensor of the memory (step 4 of the derivation, what touches no token)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_advance import BLOCK, load_coefficient, program_entries, shard_stride


@triton.jit(do_not_specialize=["NEXT", "STRIDE"])
def advance_backward_kernel(
    w,  # [N, F] float32
    s,  # [N, F] float32, or None
    end_decay, end_momentum, momentum_decay,  # [shards, H] float32, shards STRIDE apart, or None
    next_grad_w, next_grad_s,  # [NEXT, F] float32: of the memories that have another chunk, the first ones
    end_grad_w, end_grad_s,  # [N, F] float32: of the other memories
    grad_w,  # [N, F] float32: what reads have given; what the state after the chunk gives is added
    grad_s,  # [N, F] float32 out
    wide,  # [N, F / LAST, WIDTH · LAST] out: W, minus the gradient of W after the chunk, with momentum minus that of S
    dots,  # [N, DOTS, 3] float32 out: this program's part of the gradients of the three coefficients, or None
    NEXT, STRIDE, DOT,  # DOT: the first of this tensor's programs in dots
    H: tl.constexpr, F: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr, DOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, f, valid = program_entries(F, BLOCK)
    entry = n * F + f
    beside = n * F * WIDTH + f // LAST * (LAST * WIDTH) + f % LAST
    if n < NEXT:
        after_w = tl.load(next_grad_w + entry, mask=valid, other=0.0)
    else:
        after_w = tl.load(end_grad_w + entry, mask=valid, other=0.0)
    old_w = tl.load(w + entry, mask=valid, other=0.0)
    tl.store(wide + beside, old_w.to(wide.dtype.element_ty), mask=valid)
    tl.store(wide + beside + LAST, (-after_w).to(wide.dtype.element_ty), mask=valid)
    before_w = after_w
    if end_decay is not None:
        before_w *= load_coefficient(end_decay, n, STRIDE, H)
    before_w += tl.load(grad_w + entry, mask=valid, other=0.0)
    tl.store(grad_w + entry, before_w, mask=valid)
    part = n * DOTS + DOT + tl.program_id(0) % tl.cdiv(F, BLOCK)
    if end_decay is not None:
        tl.store(dots + part * 3, tl.sum(after_w * old_w))
    if s is not None:
        if n < NEXT:
            after_s = tl.load(next_grad_s + entry, mask=valid, other=0.0)
        else:
            after_s = tl.load(end_grad_s + entry, mask=valid, other=0.0)
        old_s = tl.load(s + entry, mask=valid, other=0.0)
        before_s = after_w * load_coefficient(end_momentum, n, STRIDE, H)
        before_s += after_s * load_coefficient(momentum_decay, n, STRIDE, H)
        tl.store(grad_s + entry, before_s, mask=valid)
        tl.store(wide + beside + 2 * LAST, (-after_s).to(wide.dtype.element_ty), mask=valid)
        tl.store(dots + part * 3 + 1, tl.sum(after_w * old_s))
        tl.store(dots + part * 3 + 2, tl.sum(after_s * old_s))


def advance_backward(
    state: tuple[Tensor, Tensor | None],
    coefficients: tuple[Tensor | None, Tensor | None, Tensor | None],
    following: tuple[Tensor, Tensor | None],
    end: tuple[Tensor, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    wide: Tensor,
    dots: Tensor | None,
    dot: int,
) -> None:
    """Turn one tensor's gradients after a chunk of a span into those before it, as far as no token is concerned.

    Args:
        state, coefficients: as in `advance`.
        following: gradients of weights and momentum before the chunks that come next, [fewer shards, H, …] float32.
        end: those of the state after the shards that have none, [shards, H, …] float32.
        grads: those before the chunk [shards, H, …] float32; the weights' has what the reads give and is added to.
        wide, dots, dot: see the kernel.
    """
    w, s = state
    shards, heads = w.shape[:2]
    F, last = w[0, 0].numel(), w.shape[-1]
    advance_backward_kernel[(shards * heads * triton.cdiv(F, BLOCK),)](
        w, s, *coefficients, *following, *end, *grads, wide, dots, following[0].shape[0] * heads,
        shard_stride(coefficients), dot, heads, F, last, wide.shape[-1] // last,
        0 if dots is None else dots.shape[1], BLOCK,
    )  # fmt: skip
