"""Back through o = x + LN(y) to the rows y (step 1 of the derivation)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .global_rows import (
    Span,
    by_head,
    empty_rows,
    load_tile,
    load_vector,
    program_rows,
    row_grid,
    store_row_sum,
    store_tile,
    token_place,
)
from .math import normalise, normalise_backward


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def output_backward_kernel(
    y,  # [N, C, D] float32
    b,  # [N, D] float32, or None
    norm_weight,  # [H, D] float32
    grad_o,  # [J · L, H, D]
    grad_y,  # [N, C, D] out
    grad_norm_weight, grad_norm_bias,  # [programs, D] float32 out
    FIRST, SHARDS, L, C,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    rows = load_tile(y, row, valid, D, D)
    if b is not None:
        rows += load_vector(b, n, D, D)
    normal, rstd = normalise(rows, axis=1)
    grad = load_tile(grad_o, token_place(n, c, FIRST, SHARDS, L, C, H), valid, D, D)
    store_row_sum(grad_norm_weight, grad * normal, D)
    store_row_sum(grad_norm_bias, grad, D)
    grad = normalise_backward(normal, rstd, grad * load_vector(norm_weight, n % H, D, D), axis=1)
    store_tile(grad_y, grad, row, valid, D, D)


def output_backward(
    y: Tensor, bias: Tensor | None, norm_weight: Tensor, grad_o: Tensor, dtype: torch.dtype, span: Span
) -> tuple[Tensor, Tensor, Tensor]:
    """ȳ [N, C, D] of `dtype` from grad_o [J, L, H, D], and the norm's gradients [H, D]; see the kernel for the rest."""
    D = y.shape[-1]
    grid, R = row_grid(y)
    grad_y = empty_rows(y, D, dtype)
    sums = y.new_empty((2, *grid, D)).unbind()
    output_backward_kernel[grid](y, bias, norm_weight, grad_o, grad_y, *sums, *span.places, D, R)
    return grad_y, *(by_head(s, span) for s in sums)
