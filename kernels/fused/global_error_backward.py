"""Back through δ2 to the last layer's output, values and keys: the second order of the residual norm (step 6)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_error import output_gradient
from .global_inputs import GlobalInputs
from .global_rows import (
    Span,
    by_head,
    load_column,
    load_tile,
    load_vector,
    program_rows,
    row_grid,
    store_column,
    store_row_sum,
    store_tile,
    token_place,
)
from .math import feature_mean, normalise_backward


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def error_backward_kernel(
    z,  # [N, C, D] float32
    b,  # [N, D] float32, or None
    k,  # [N, C, D]
    v,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    gain, momentum_gain,  # [J · L, H] float32; the second one None without momentum
    t,  # [N, C, S · D] float32: A times minus the gradients of the state after the chunk, S = 2 with momentum, else 1
    wide_b,  # [N, WIDTH · D] float32: in columns D … the same for the bias, or None
    through_u,  # [N, C, D] float32: δ2's gradient by way of the first layer, or None for a linear memory
    grad_gain, grad_momentum_gain,  # [J · L, H] float32 out; with a first layer its share is there and is added to
    wide,  # [N, C, WIDTH · D] out: z̄2 in the first D columns
    grad_v,  # [J · L, H, D] out
    grad_error,  # [N, C, D] float32 out with the norm, or None
    grad_norm_weight, grad_norm_bias,  # [programs, D] float32 out, or None
    FIRST, SHARDS, L, C,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
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
    normal, rstd, error, delta = output_gradient(y, keys, load_tile(v, place, valid, D, D), weight, bias, NORM)

    # q: the gradient of δ2.
    along = load_tile(t, row, valid, (WIDTH - 1) * D, D)
    if wide_b is not None:
        along += load_vector(wide_b + D, n, WIDTH * D, D)
    q = load_column(gain, place, valid) * along
    grad = tl.sum(delta * along, axis=1, keep_dims=True)
    if through_u is not None:
        q += load_tile(through_u, row, valid, D, D)
        grad += load_column(grad_gain, place, valid)
    store_column(grad_gain, grad, place, valid)
    if momentum_gain is not None:
        along = load_tile(t + D, row, valid, (WIDTH - 1) * D, D)
        if wide_b is not None:
            along += load_vector(wide_b + 2 * D, n, WIDTH * D, D)
        q += load_column(momentum_gain, place, valid) * along
        grad = tl.sum(delta * along, axis=1, keep_dims=True)
        if through_u is not None:
            grad += load_column(grad_momentum_gain, place, valid)
        store_column(grad_momentum_gain, grad, place, valid)

    grad_e = q
    grad_z = q
    if NORM:
        # J(rstd, n, Gz) with Gz = E ⊙ g depends on all three.
        scaled = error * weight
        grad_scaled = normalise_backward(normal, rstd, q, axis=1)
        grad_e = grad_scaled * weight
        grad_normal = grad_e * weight - rstd * (
            q * feature_mean(scaled * normal, axis=1) + scaled * feature_mean(q * normal, axis=1)
        )
        grad_z = normalise_backward(normal, rstd, grad_normal, axis=1) - normal * rstd * feature_mean(q * delta, axis=1)
        store_tile(grad_error, grad_e, row, valid, D, D)
        # q is zero in rows that do not exist, and so are these.
        store_row_sum(grad_norm_weight, grad_scaled * error + grad_e * normal, D)
        store_row_sum(grad_norm_bias, grad_e, D)
    store_tile(wide, grad_z, row, valid, WIDTH * D, D)
    store_tile(grad_v, -grad_e, place, valid, D, D)


def error_backward(
    z: Tensor,
    bias: Tensor | None,
    k: Tensor,
    inputs: GlobalInputs,
    t: Tensor,
    wide_bias: Tensor | None,
    through_u: Tensor | None,
    grads: dict[str, Tensor],
    wide: Tensor,
    span: Span,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fill the first columns of `wide`, and among `grads` v, gain and momentum_gain; see the kernel for the shapes.

    Returns:
        the error's gradient [N, C, D] float32, and those of the norm [H, D]; None without the norm.
    """
    D = z.shape[-1]
    grid, R = row_grid(z)
    grad_error, sums = None, (None, None)
    if inputs.norm_weight is not None:
        grad_error = z.new_empty(z.shape)
        sums = z.new_empty((2, *grid, D)).unbind()
    error_backward_kernel[grid](
        z, bias, k, inputs.v, *inputs.norm, *inputs.gains, t, wide_bias, through_u, grads["gain"],
        grads.get("momentum_gain"), wide, grads["v"], grad_error, *sums, *span.places, D, wide.shape[-1] // D, R,
    )  # fmt: skip
    return grad_error, *(by_head(s, span) for s in sums)
