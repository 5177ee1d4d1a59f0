"""The key side of a tile: gradients of the inner loss at the anchor. Shared by the forward and the backward kernel."""

import triton
import triton.language as tl

from .math import gelu_slope, normalise, normalise_backward


@triton.jit
def inner_error(z, k, v, lr, norm_weight, norm_bias, NORM: tl.constexpr):
    """From the memory's output z at the keys to its error f(W, k) − v and the last layer's δ, times the step size.

    Returns the norm's n and rstd (0.0 without), the error and δ: with the norm, δ = J(rstd, n, lr (error ⊙ weight)).
    """
    n = 0.0
    rstd = 0.0
    if NORM:
        n, rstd = normalise(z)
        error = k.to(tl.float32) - v.to(tl.float32) + n * norm_weight + norm_bias
        delta = normalise_backward(n, rstd, error * norm_weight * lr)
    else:
        error = z - v.to(tl.float32)
        delta = error * lr
    return n, rstd, error, delta


@triton.jit
def hidden_delta(u, z, s):
    """The first layer's δ = u ⊙ φ'(z), u = δ W2ᵀ of the last layer, s = σ(a(z))."""
    return u * gelu_slope(z, s)
