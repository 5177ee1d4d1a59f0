"""The hidden layer's part of the backward through δ1 = u ⊙ φ'(z1), u = δ2 W2ᵀ (step 5 of the derivation)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_inputs import GlobalInputs
from .global_rows import (
    Span,
    empty_rows,
    load_column,
    load_tile,
    load_vector,
    program_rows,
    row_grid,
    store_column,
    store_tile,
    token_place,
)
from .math import gelu_curvature, gelu_sigmoid, gelu_slope


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def curvature_kernel(
    z,  # [N, C, M] float32
    b,  # [N, M] float32, or None
    u,  # [N, C, M] float32; out: δ̄1 ⊙ u ⊙ φ''
    t,  # [N, C, S · M] float32: K times minus the gradients of the state after the chunk, S = 2 with momentum, else 1
    wide_b,  # [N, WIDTH · M] float32: in columns M … the same for the bias, or None
    gain, momentum_gain,  # [J · L, H] float32; the second one None without momentum
    grad_gain, grad_momentum_gain,  # [J · L, H] float32 out
    grad_u,  # [N, C, M] out: δ̄1 ⊙ φ'
    wide,  # [N, C, WIDTH · M] out: gain · δ1 in columns M …, momentum_gain · δ1 in columns 2 M …
    FIRST, SHARDS, L, C,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    place = token_place(n, c, FIRST, SHARDS, L, C, H)
    x = load_tile(z, row, valid, M, M)
    if b is not None:
        x += load_vector(b, n, M, M)
    sigmoid = gelu_sigmoid(x)
    slope = gelu_slope(x, sigmoid)
    upstream = load_tile(u, row, valid, M, M)
    delta = upstream * slope

    e = load_column(gain, place, valid)
    along = load_tile(t, row, valid, (WIDTH - 1) * M, M)
    if wide_b is not None:
        along += load_vector(wide_b + M, n, WIDTH * M, M)
    grad_delta = e * along
    store_column(grad_gain, tl.sum(delta * along, axis=1, keep_dims=True), place, valid)
    store_tile(wide + M, delta * e, row, valid, WIDTH * M, M)
    if momentum_gain is not None:
        e = load_column(momentum_gain, place, valid)
        along = load_tile(t + M, row, valid, (WIDTH - 1) * M, M)
        if wide_b is not None:
            along += load_vector(wide_b + 2 * M, n, WIDTH * M, M)
        grad_delta += e * along
        store_column(grad_momentum_gain, tl.sum(delta * along, axis=1, keep_dims=True), place, valid)
        store_tile(wide + 2 * M, delta * e, row, valid, WIDTH * M, M)

    store_tile(grad_u, grad_delta * slope, row, valid, M, M)
    store_tile(u, grad_delta * upstream * gelu_curvature(x, sigmoid), row, valid, M, M)


def curvature(
    z: Tensor,
    bias: Tensor | None,
    u: Tensor,
    t: Tensor,
    wide_bias: Tensor | None,
    inputs: GlobalInputs,
    grads: dict[str, Tensor],
    wide: Tensor,
    span: Span,
) -> Tensor:
    """ū [N, C, M] in the dtype of `wide`; see the kernel for the other shapes.

    Fills those of the gains among `grads` and the columns M … of `wide`, and turns u into this part of z̄1.
    """
    M = z.shape[-1]
    grad_u = empty_rows(z, M, wide.dtype)
    grid, R = row_grid(z)
    curvature_kernel[grid](
        z, bias, u, t, wide_bias, *inputs.gains, grads["gain"], grads.get("momentum_gain"), grad_u, wide,
        *span.places, M, wide.shape[-1] // M, R,
    )  # fmt: skip
    return grad_u
