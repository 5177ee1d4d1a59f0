"""The global memory's answer: o = x + LN(y), or y without the residual norm."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_inputs import GlobalInputs
from .global_rows import Span, load_tile, load_vector, program_rows, row_grid, store_tile, token_place
from .math import normalise


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def output_kernel(
    y,  # [N, C, D] float32
    b,  # [N, D] float32, or None
    x,  # [N, C, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    o,  # [J · L, H, D] out
    FIRST, SHARDS, L, C,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    out = load_tile(y, row, valid, D, D)
    if b is not None:
        out += load_vector(b, n, D, D)
    if norm_weight is not None:
        normal, _ = normalise(out, axis=1)
        out = normal * load_vector(norm_weight, n % H, D, D) + load_vector(norm_bias, n % H, D, D)
        out += load_tile(x, row, valid, D, D)
    store_tile(o, out, token_place(n, c, FIRST, SHARDS, L, C, H), valid, D, D)


def output(
    y: Tensor,
    bias: Tensor | None,
    x: Tensor,
    inputs: GlobalInputs,
    o: Tensor,
    span: Span,
) -> None:
    """Write the span's part of o [J, L, H, D]; see the kernel for the other shapes."""
    grid, R = row_grid(y)
    output_kernel[grid](y, bias, x, *inputs.norm, o, *span.places, y.shape[-1], R)
