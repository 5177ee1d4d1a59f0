"""The mathematics that several kernels share, written once: gelu, the residual norm, unit vectors.

Tiles are float32 with the features along `axis`: [R, F] for axis 1, [F, R] for axis 0. Statistics of a token keep that
dimension with size 1.
"""

import triton
import triton.language as tl

# Python floats that a kernel reads must be constexpr. gelu_tanh(z) = z σ(a(z)) with a(z) = A1 z + A3 z³.
_A1 = tl.constexpr(1.5957691216057308)
_A3 = tl.constexpr(1.5957691216057308 * 0.044715)
_EPS = tl.constexpr(1e-6)


@triton.jit
def gelu_sigmoid(z):
    """σ(a(z)), which gelu and its derivatives share."""
    return tl.sigmoid(z * (_A1 + _A3 * z * z))


@triton.jit
def gelu_slope(z, s):
    """φ'(z) = σ + z σ (1 − σ) a'(z), given s = σ(a(z))."""
    return s + z * s * (1 - s) * (_A1 + 3 * _A3 * z * z)


@triton.jit
def gelu_curvature(z, s):
    """φ''(z) = σ (1 − σ) (2 a' + z a'' + z a'² (1 − 2σ)), given s = σ(a(z))."""
    slope_of_a = _A1 + 3 * _A3 * z * z
    return s * (1 - s) * (2 * slope_of_a + 6 * _A3 * z * z + z * slope_of_a * slope_of_a * (1 - 2 * s))


@triton.jit
def feature_mean(y, axis: tl.constexpr = 1):
    """Mean over the features."""
    return tl.sum(y, axis=axis, keep_dims=True) / y.shape[axis]


@triton.jit
def normalise(y, axis: tl.constexpr = 1):
    """n = (y − mean) rstd and rstd = (var + ε)^(−1/2)."""
    centred = y - feature_mean(y, axis)
    rstd = tl.rsqrt(feature_mean(centred * centred, axis) + _EPS)
    return centred * rstd, rstd


@triton.jit
def normalise_backward(n, rstd, grad, axis: tl.constexpr = 1):
    """J(rstd, n, g) = rstd (g − mean g − n mean(g ⊙ n)): the gradient of `normalise`, linear in `grad`."""
    return rstd * (grad - feature_mean(grad, axis) - n * feature_mean(grad * n, axis))


@triton.jit
def unit(x, axis: tl.constexpr = 1):
    """x / ‖x‖ and 1 / ‖x‖; a zero vector stays zero and has the factor 0."""
    square = tl.sum(x * x, axis=axis, keep_dims=True)
    factor = tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), 0.0)
    return x * factor, factor


@triton.jit
def unit_backward(unit_x, factor, grad, axis: tl.constexpr = 1):
    """The gradient of x from that of x / ‖x‖."""
    return factor * (grad - unit_x * tl.sum(grad * unit_x, axis=axis, keep_dims=True))
