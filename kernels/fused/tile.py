"""One tile of a chunk: R tokens that meet the same anchor. What the forward and the backward kernel share.

The mathematics is that of `kernels/chunk.py` (formulas: TTT, arXiv 2407.04620, section 2.5). A tile is a whole chunk, or
a part of one: gradients are taken at the *anchor*, the weights before the chunk, while reads start from the *current*
weights, those before the tile. A padded row has k = q = v = 0 and lr = 0.

Tensors in registers, float32: rows [R, D] or [R, M], weights w1 [D, M], b1 [1, M], w2 [M, D], b2 [1, D]. A memory
without a bias has the constant 0.0 in its place; a linear memory has M == D and 0.0 for its second layer.
DT is the dtype of the operands of products (that of the inputs), PRECISION how float32 operands are multiplied.
"""

import triton
import triton.language as tl

from .math import gelu_sigmoid, gelu_slope, normalise, normalise_backward, unit


@triton.jit
def dot(a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """a b, accumulated in float32."""
    return tl.dot(a.to(DT), b.to(DT), input_precision=PRECISION)


@triton.jit
def add_dot(total, a, b, DT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, accumulated in float32."""
    return tl.dot(a.to(DT), b.to(DT), acc=total, input_precision=PRECISION)


@triton.jit
def load_rows(pointer, token, head, valid, H: tl.constexpr, D: tl.constexpr):
    """Rows of [tokens, H, D] at `token` [R], zero where not `valid`; in the dtype of the tensor."""
    feature = tl.arange(0, D)
    where = (token[:, None] * H + head) * D + feature[None, :]
    return tl.load(pointer + where, mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(pointer, rows, token, head, valid, H: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_rows`."""
    feature = tl.arange(0, D)
    where = (token[:, None] * H + head) * D + feature[None, :]
    tl.store(pointer + where, rows.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_scalars(pointer, token, head, valid, other, H: tl.constexpr):
    """Entries of [tokens, H] at `token` [R], as a column [R, 1] in float32; `other` where not valid."""
    return tl.load(pointer + token * H + head, mask=valid, other=other).to(tl.float32)[:, None]


@triton.jit
def store_scalars(pointer, column, token, head, valid, H: tl.constexpr):
    """The inverse of `load_scalars`."""
    tl.store(pointer + token[:, None] * H + head, column, mask=valid[:, None])


@triton.jit
def load_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A contiguous [ROWS, COLUMNS] matrix in float32."""
    where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + where).to(tl.float32)


@triton.jit
def store_matrix(pointer, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_matrix`."""
    where = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(pointer + where, x.to(pointer.dtype.element_ty))


@triton.jit
def load_state(
    pointer, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr
):
    """The fast weights (or their momentum, or gradients) of one head, packed as w1, b1, w2, b2."""
    w1 = load_matrix(pointer, D, M)
    pointer += D * M
    b1 = 0.0
    w2 = 0.0
    b2 = 0.0
    if HAS_B1:
        b1 = load_matrix(pointer, 1, M)
        pointer += M
    if MLP:
        w2 = load_matrix(pointer, M, D)
        pointer += M * D
    if HAS_B2:
        b2 = load_matrix(pointer, 1, D)
    return w1, b1, w2, b2


@triton.jit
def store_state(
    pointer, w1, b1, w2, b2,
    D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_state`."""
    store_matrix(pointer, w1, D, M)
    pointer += D * M
    if HAS_B1:
        store_matrix(pointer, b1, 1, M)
        pointer += M
    if MLP:
        store_matrix(pointer, w2, M, D)
        pointer += M * D
    if HAS_B2:
        store_matrix(pointer, b2, 1, D)


@triton.jit
def select_state(
    condition, w1, b1, w2, b2, ow1, ob1, ow2, ob2, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr
):
    """The first state if a scalar condition holds, otherwise the second."""
    ow1 = tl.where(condition, w1, ow1)
    if HAS_B1:
        ob1 = tl.where(condition, b1, ob1)
    if MLP:
        ow2 = tl.where(condition, w2, ow2)
    if HAS_B2:
        ob2 = tl.where(condition, b2, ob2)
    return ow1, ob1, ow2, ob2


@triton.jit
def inner_gradients(
    k, v, lr, w1, b1, w2, b2, norm_weight, norm_bias,
    MLP: tl.constexpr, NORM: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of `½‖f(W, k) − v‖²` at the anchor, times the step size: δ of both layers, and what leads there.

    Returns z1 and σ(a(z1)) of the hidden layer, its activation a, the norm's n and rstd, the error f(W, k) − v,
    u = δ2 W2ᵀ, δ1 and δ2. A linear memory has δ1 = δ2 and zeros for the hidden layer.
    """
    z1 = dot(k, w1, DT, PRECISION) + b1
    s1 = 0.0
    a = k
    z2 = z1
    if MLP:
        s1 = gelu_sigmoid(z1)
        a = z1 * s1
        z2 = dot(a, w2, DT, PRECISION) + b2
    n = 0.0
    rstd = 0.0
    if NORM:
        n, rstd = normalise(z2)
        error = k.to(tl.float32) - v.to(tl.float32) + n * norm_weight + norm_bias
        delta2 = normalise_backward(n, rstd, error * norm_weight * lr)
    else:
        error = z2 - v.to(tl.float32)
        delta2 = error * lr
    u = 0.0
    delta1 = delta2
    if MLP:
        u = dot(delta2, tl.trans(w2), DT, PRECISION)
        delta1 = u * gelu_slope(z1, s1)
    return z1, s1, a, n, rstd, error, u, delta1, delta2


@triton.jit
def read_layer(
    x, a, delta, w, b, s, s_bias, theta, read_decay, read_second,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer's read `B (x W + b) + F (x S + s) − (P ⊙ Θ) δ`, P = x aᵀ (+ 1 with a bias, whose input is a 1).

    S is what reads also depend on: the momentum, or for a token scale the anchor. Returns the read and P.
    """
    y = dot(x, w, DT, PRECISION) + b
    if SCALED:
        y *= read_decay
    if SECOND:
        y += (dot(x, s, DT, PRECISION) + s_bias) * read_second
    p = dot(x, tl.trans(a), DT, PRECISION)
    if HAS_BIAS:
        p += 1.0
    return add_dot(y, -(p * theta), delta, DT, PRECISION), p


@triton.jit
def advance_layer(
    w, b, s, s_bias, a, delta, gain, end_decay, end_second, momentum_gain, momentum_decay,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SECOND: tl.constexpr, MOMENTUM: tl.constexpr,
    DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer after the tile: W_end = B W + F S − aᵀ(γ δ), and with momentum S_end = m S − aᵀ(σ δ)."""
    gained = -delta * gain
    if SCALED:
        w *= end_decay
    if SECOND:
        w += end_second * s
    w = add_dot(w, tl.trans(a), gained, DT, PRECISION)
    if HAS_BIAS:
        if SCALED:
            b *= end_decay
        if SECOND:
            b += end_second * s_bias
        b += tl.sum(gained, axis=0, keep_dims=True)
    if MOMENTUM:
        surprise = -delta * momentum_gain
        s = add_dot(s * momentum_decay, tl.trans(a), surprise, DT, PRECISION)
        if HAS_BIAS:
            s_bias = s_bias * momentum_decay + tl.sum(surprise, axis=0, keep_dims=True)
    return w, b, s, s_bias


@triton.jit
def project(q, k, m, NORMALIZE: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """x_t = q_t M_t (TNT eq. 7) for the rows of a tile, and M after it: X = Q M + tril(Q Kᵀ) K with unit keys."""
    R: tl.constexpr = q.shape[0]
    unit_k, _ = unit(k.to(tl.float32))
    p = dot(q, tl.trans(unit_k), DT, PRECISION)
    p = tl.where(tl.arange(0, R)[:, None] >= tl.arange(0, R)[None, :], p, 0.0)
    x = add_dot(dot(q, m, DT, PRECISION), p, unit_k, DT, PRECISION)
    if NORMALIZE:
        x, _ = unit(x)
    return x, add_dot(m, tl.trans(unit_k), unit_k, DT, PRECISION)
