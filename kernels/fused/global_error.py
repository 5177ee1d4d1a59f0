"""The inner loss's gradient at the memory's output: from z2 to δ2 (with the residual norm, or without)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_inputs import GlobalInputs
from .global_rows import (
    Span,
    load_column,
    load_tile,
    load_vector,
    program_rows,
    row_grid,
    store_tile,
    token_place,
)
from .math import normalise, normalise_backward


@triton.jit
def output_gradient(y, k, v, norm_weight, norm_bias, NORM: tl.constexpr):
    """δ2 = ∂ ½‖f(W, k) − v‖² / ∂y for rows y of the last layer, and what leads there: n, rstd and f(W, k) − v."""
    if NORM:
        n, rstd = normalise(y, axis=1)
        error = n * norm_weight + norm_bias + k - v
        delta = normalise_backward(n, rstd, error * norm_weight, axis=1)
    else:
        n, rstd = 0.0, 0.0
        error = y - v
        delta = error
    return n, rstd, error, delta


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def error_kernel(
    z,  # [N, C, D] float32
    b,  # [N, D] float32, or None
    k,  # [N, C, D]
    v,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    gain, momentum_gain,  # [J · L, H] float32; the second one None without momentum
    delta,  # [N, C, D] out: δ2, or None
    wide,  # [N, C, WIDTH · D] out: gain · δ2 in columns COLUMN …, momentum_gain · δ2 in the D after them
    FIRST, SHARDS, L, C,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, COLUMN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    place = token_place(n, c, FIRST, SHARDS, L, C, H)
    y = load_tile(z, row, valid, D, D)
    if b is not None:
        y += load_vector(b, n, D, D)
    weight, bias, keys = 0.0, 0.0, 0.0
    NORM: tl.constexpr = norm_weight is not None
    if NORM:
        weight = load_vector(norm_weight, n % H, D, D)
        bias = load_vector(norm_bias, n % H, D, D)
        keys = load_tile(k, row, valid, D, D)
    _, _, _, d = output_gradient(y, keys, load_tile(v, place, valid, D, D), weight, bias, NORM)
    if delta is not None:
        store_tile(delta, d, row, valid, D, D)
    store_tile(wide + COLUMN, d * load_column(gain, place, valid), row, valid, WIDTH * D, D)
    if momentum_gain is not None:
        scaled = d * load_column(momentum_gain, place, valid)
        store_tile(wide + COLUMN + D, scaled, row, valid, WIDTH * D, D)


def error(
    z: Tensor,
    bias: Tensor | None,
    k: Tensor,
    inputs: GlobalInputs,
    delta: Tensor | None,
    wide: Tensor,
    span: Span,
) -> None:
    """Write δ2 to `delta` if it is there, and times each gain to the last columns of `wide`; see the kernel."""
    D = z.shape[-1]
    width = wide.shape[-1] // D
    column = (width - inputs.gain_count) * D
    grid, R = row_grid(z)
    error_kernel[grid](
        z, bias, k, inputs.v, *inputs.norm, *inputs.gains, delta, wide, *span.places, D, width, column, R
    )
