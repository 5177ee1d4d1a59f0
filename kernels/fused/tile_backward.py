"""The backward of the parts of a tile, after the chunk formulas of `kernels/torch_backend/chunk_backward.py`.

`grad_x` is the gradient of the loss with respect to x. Gradients of the current state (gw, gb) and of what reads also
depend on (gs, gs_bias: the momentum, or the anchor under a token scale) come in as those after the tile and go out as
those before it. Those of the scalar coefficients of both layers add up.
"""

import triton
import triton.language as tl

from .math import feature_mean, gelu_curvature, gelu_slope, normalise_backward
from .tile import add_dot, add_outer, dot, times, token_sum, transposed


@triton.jit
def feature_dot(x, y):
    """Σ over the features, [R, F] -> [R, 1]."""
    return tl.sum(x * y, axis=1, keep_dims=True)


@triton.jit
def full_dot(x, y):
    """⟨x, y⟩ over all entries, as [1, 1]."""
    return tl.sum(tl.sum(x.to(tl.float32) * y, axis=1, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def advance_input_backward(
    delta, gw, gs, gain, momentum_gain,
    HELD_TRANSPOSED: tl.constexpr, MOMENTUM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ā of `advance_layer`, from the gradients of the state after the tile."""
    grad_a = times(-delta * gain, gw, not HELD_TRANSPOSED, DT, PRECISION)
    if MOMENTUM:
        grad_a += times(-delta * momentum_gain, gs, not HELD_TRANSPOSED, DT, PRECISION)
    return grad_a


@triton.jit
def advance_backward(
    t, ts, delta, w, b, s, s_bias, gw, gb, gs, gs_bias,
    gain, end_decay, end_second, momentum_gain, momentum_decay,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """The rest of it: δ̄, the state's gradients, and those of γ, B, F, σ, m; from t = a W̄ + b̄ and ts = a S̄ + s̄."""
    grad_delta = -t * gain
    grad_gain, grad_decay, grad_second, grad_momentum_gain, grad_momentum_decay = 0.0, 0.0, 0.0, 0.0, 0.0
    if GATED:
        grad_gain = -feature_dot(delta, t)
    if MOMENTUM:
        grad_delta -= ts * momentum_gain
        grad_momentum_gain = -feature_dot(delta, ts)
        grad_momentum_decay = full_dot(s, gs)
        gs *= momentum_decay
        if HAS_BIAS:
            grad_momentum_decay += full_dot(s_bias, gs_bias)
            gs_bias *= momentum_decay
    if SECOND:
        grad_second = full_dot(s, gw)
        gs += gw * end_second
        if HAS_BIAS:
            grad_second += full_dot(s_bias, gb)
            gs_bias += gb * end_second
    if SCALED:
        grad_decay = full_dot(w, gw)
        gw *= end_decay
        if HAS_BIAS:
            grad_decay += full_dot(b, gb)
            gb *= end_decay
    return (
        grad_delta, gw, gb, gs, gs_bias,
        grad_gain, grad_decay, grad_second, grad_momentum_gain, grad_momentum_decay,
    )  # fmt: skip


@triton.jit
def read_backward(
    grad_y, x, a, delta, y, s_read, w, s, gw, gb, gs, gs_bias, grad_a, grad_delta,
    p, theta, read_decay, read_second,
    HELD_TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    SECOND: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of `read_layer` and of y = x W + b, s_read = x S + s. Returns x̄, the state's gradients, ā, δ̄, and those
    of Θ, B, F.
    """
    grad_theta, grad_decay, grad_second = 0.0, 0.0, 0.0
    grad_delta = add_dot(grad_delta, transposed(-(p * theta), DT), grad_y, DT, PRECISION)
    r = dot(grad_y, transposed(-delta, DT), DT, PRECISION)
    if GATED:
        grad_theta = r * p
    r *= theta
    grad_x = dot(r, a, DT, PRECISION)
    grad_a = add_dot(grad_a, transposed(r, DT), x, DT, PRECISION)
    if SECOND:
        grad_second = feature_dot(grad_y, s_read)
        scaled = grad_y * read_second
        grad_x += times(scaled, s, not HELD_TRANSPOSED, DT, PRECISION)
        gs = add_outer(gs, x, scaled, HELD_TRANSPOSED, DT, PRECISION)
        if HAS_BIAS:
            gs_bias += token_sum(scaled)
    if SCALED:
        grad_decay = feature_dot(grad_y, y)
        grad_y = grad_y * read_decay
    grad_x += times(grad_y, w, not HELD_TRANSPOSED, DT, PRECISION)
    gw = add_outer(gw, x, grad_y, HELD_TRANSPOSED, DT, PRECISION)
    if HAS_BIAS:
        gb += token_sum(grad_y)
    return grad_x, gw, gb, gs, gs_bias, grad_a, grad_delta, grad_theta, grad_decay, grad_second


@triton.jit
def error_backward(grad_delta, n, rstd, error, delta, lr, norm_weight, NORM: tl.constexpr):
    """From the last layer's δ̄ to z̄ of its output, Ē of the error, the step size's and the norm weight's gradient.

    With the norm, δ = J(rstd, n, lr E ⊙ g) depends on the norm's output and deviation too: its second order.
    """
    if NORM:
        weighted = error * norm_weight
        grad_weighted = normalise_backward(n, rstd, grad_delta)
        grad_lr = feature_dot(grad_weighted, weighted)
        grad_weighted *= lr
        grad_error = grad_weighted * norm_weight
        grad_norm_weight = token_sum(grad_weighted * error + grad_error * n)
        weighted *= lr
        grad_n = -rstd * (grad_delta * feature_mean(weighted * n) + weighted * feature_mean(grad_delta * n))
        grad_n += grad_error * norm_weight
        grad_z = normalise_backward(n, rstd, grad_n) - rstd * n * feature_mean(grad_delta * delta)
    else:
        grad_lr = feature_dot(grad_delta, error)
        grad_error = grad_delta * lr
        grad_z = grad_error
        grad_norm_weight = 0.0
    return grad_z, grad_error, grad_lr, grad_norm_weight


@triton.jit
def hidden_backward(grad_delta1, z1, s1, u):
    """δ1 = u ⊙ φ'(z1): gradients of u and of z1."""
    return grad_delta1 * gelu_slope(z1, s1), grad_delta1 * u * gelu_curvature(z1, s1)
