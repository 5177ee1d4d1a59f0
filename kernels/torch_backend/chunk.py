"""The forward mathematics of one chunk in dual form, the only place where it is written.

Differentiable torch on rows: N independent memories (a row is one head of one shard), C tokens each. The scan runs it
without autograd and brings its own backward (chunk_backward.py); the pieces at the edges of a sequence run it with
autograd. With the memory `y = φ(x W1 + b1) W2 + b2` and G_τ = a_τᵀ δ_τ for each layer,

    x_t W_t = B_t (x_t W) + F_t (x_t S) − Σ_{τ≤t} Θ_tτ (x_t·a_τ) δ_τ          (TTT, arXiv 2407.04620, section 2.5)

where `δ` already carries the step size lr_τ, W is the weight and S the momentum before the chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import FastWeights

NORM_EPS = 1e-6

# gelu_tanh(z) = z σ(a(z)) with a(z) = _A1 z + _A3 z³: one sigmoid, four times cheaper on a CPU than tanh.
_A1 = 2.0 * (2.0 / torch.pi) ** 0.5
_A3 = _A1 * 0.044715


class Norm(NamedTuple):
    """The residual norm's weight and bias, one row each: [N, 1, D]."""

    weight: Tensor
    bias: Tensor


class Coefficients(NamedTuple):
    """How the tokens of a chunk act on the reads in it and on the state after it. None means the value in brackets.

    theta            [N, C, C]  Θ: effect of token τ (column) on the read at t (row)     (1 for τ ≤ t)
    read_decay       [N, C, 1]  B: what is left of the weights at each read               (1)
    read_momentum    [N, C, 1]  F: effect of the momentum before the chunk on each read   (no momentum)
    end_gain         [N, C, 1]  γ: effect of each token on the weights after the chunk    (1)
    end_decay        [N, 1, 1]  B after the chunk                                         (1)
    end_momentum     [N, 1, 1]  F after the chunk                                         (no momentum)
    momentum_gain    [N, C, 1]  σ: effect of each token on the momentum after the chunk   (no momentum)
    momentum_decay   [N, 1, 1]  what is left of the momentum after the chunk              (no momentum)
    """

    theta: Tensor | None = None
    read_decay: Tensor | None = None
    read_momentum: Tensor | None = None
    end_gain: Tensor | None = None
    end_decay: Tensor | None = None
    end_momentum: Tensor | None = None
    momentum_gain: Tensor | None = None
    momentum_decay: Tensor | None = None

    def in_rows(self, rows: int, C: int) -> Coefficients:
        """Give coefficients that were made with other leading dimensions (and without the trailing 1s) these shapes."""
        shapes = {"theta": (C, C), "end_decay": (1, 1), "end_momentum": (1, 1), "momentum_decay": (1, 1)}
        return Coefficients(
            *(None if t is None else t.reshape(rows, *shapes.get(name, (-1, 1))) for name, t in self._asdict().items())
        )


class Gelu(NamedTuple):
    """gelu_tanh at z, with what its derivatives share."""

    square: Tensor  # z²
    sigmoid: Tensor  # σ(a(z))
    value: Tensor  # z σ


class NormalisedRows(NamedTuple):
    """The rows y, their normalised form (y − mean) rstd, and the statistics."""

    y: Tensor
    n: Tensor
    mean: Tensor
    rstd: Tensor


class Affinity(NamedTuple):
    """How much each read meets each token. `raw` is kept only where Θ has a gradient."""

    raw: Tensor | None  # [N, C, C] P = x·a (+ 1 with a bias, whose input is a constant 1)
    masked: Tensor  # [N, C, C] P ⊙ Θ


class ChunkState(NamedTuple):
    """Everything of a chunk's forward that its backward needs again. [N, C, M] or [N, C, D] unless said otherwise."""

    kx: Tensor  # [N, 2C, D]: keys above read rows, so that both meet W1 in one product
    lr: Tensor  # [N, C, 1]
    hidden_k: Gelu | None  # first layer at the keys (MLP only)
    hidden_k_slope: Tensor | None  # φ' there
    hidden_x: Gelu | None  # first layer at the read rows (MLP only)
    norm_k: NormalisedRows | None
    norm_x: NormalisedRows | None
    error: Tensor  # E = f(W, k) − v
    error_scaled: Tensor | None  # Gz = E ⊙ norm weight
    u: Tensor | None  # δ2 W2ᵀ (MLP only)
    d_in: Tensor  # δ of the first layer, times lr
    d_out: Tensor  # δ of the last layer, times lr (a linear memory's only layer: the same tensor as d_in)
    reads_in: Affinity | None  # first layer's reads (a linear memory's only ones)
    reads_out: Affinity | None  # last layer's reads (MLP only)


def gelu(z: Tensor) -> Gelu:
    """gelu in its tanh form, as z σ(a(z))."""
    square = z * z
    sigmoid = torch.addcmul(z * _A1, square, z, value=_A3).sigmoid_()
    return Gelu(square, sigmoid, z * sigmoid)


def gelu_slope(g: Gelu) -> Tensor:
    """φ'(z) = σ + z σ (1 − σ) a'(z), with a'(z) = A1 + 3 A3 z²."""
    w = torch.addcmul(g.value, g.value, g.sigmoid, value=-1)
    return torch.addcmul(torch.add(g.sigmoid, w, alpha=_A1), w, g.square, value=3 * _A3)


def gelu_curvature(g: Gelu, slope: Tensor) -> Tensor:
    """φ''(z) = σ (1 − σ) (2 a' + z a'') + (φ' − σ) a' (1 − 2σ). Not differentiable: it works in place."""
    slope_of_a = (g.square * (3 * _A3)).add_(_A1)
    curvature = (slope - g.sigmoid).mul_(slope_of_a).mul_((g.sigmoid * -2).add_(1))
    bump = torch.addcmul(g.sigmoid, g.sigmoid, g.sigmoid, value=-1)
    return curvature.addcmul_(bump, slope_of_a.mul_(4).sub_(2 * _A1))


def normalise(y: Tensor) -> NormalisedRows:
    """(y − mean) / sqrt(var + eps) over the last dimension."""
    n, mean, rstd = torch.native_layer_norm(y, (y.shape[-1],), None, None, NORM_EPS)
    return NormalisedRows(y, n, mean, rstd)


def normalise_backward(rows: NormalisedRows, grad: Tensor) -> Tensor:
    """J(r, n, g) = r (g − mean g − n mean(g ⊙ n)): the gradient of `normalise`, linear in `grad`."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, rows.y, (rows.y.shape[-1],), rows.mean, rows.rstd, None, None, (True, False, False)
    )[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W + b: [N, C, D] x [N, D, M] -> [N, C, M]."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def affinity(x: Tensor, a: Tensor, has_bias: bool, theta: Tensor | None) -> Affinity:
    """P = x aᵀ (+ 1) and P ⊙ Θ, where no Θ stands for the causal mask."""
    p = torch.bmm(x, a.transpose(1, 2))
    if has_bias:
        p = p.add_(1)
    return Affinity(None, p.tril_()) if theta is None else Affinity(p, p * theta)


def chunk_gradients(
    weights: FastWeights, kx: Tensor, v: Tensor, lr: Tensor, norm: Norm | None
) -> tuple[Tensor, dict[str, object]]:
    """Inner gradients of all tokens of a chunk at its anchor, and the first layer's read on the way.

    Args:
        weights: the anchor, N rows.
        kx: [N, 2C, D] keys above read rows (or [N, C, D], keys alone).
        v: [N, C, D]; lr: [N, C, 1].

    Returns:
        what the first layer says at the read rows, and the fields of `ChunkState` that belong to the keys.
    """
    C = v.shape[1]
    k = kx[:, :C]
    first = linear(kx, weights.w1, weights.b1)
    z, x_first = first[:, :C], first[:, C:]
    hidden, slope = None, None
    if weights.w2 is not None:
        hidden = gelu(z.contiguous())
        slope = gelu_slope(hidden)
        z = linear(hidden.value, weights.w2, weights.b2)
    norm_k, error_scaled = None, None
    if norm is None:
        error = z - v
        d_out = error * lr
    else:
        norm_k = normalise(z.contiguous())
        error = torch.addcmul(k - v + norm.bias, norm_k.n, norm.weight)
        error_scaled = error * norm.weight
        d_out = normalise_backward(norm_k, error_scaled * lr)
    u, d_in = None, d_out
    if weights.w2 is not None:
        u = torch.bmm(d_out, weights.w2.transpose(1, 2))
        d_in = u * slope
    fields = {
        "kx": kx, "lr": lr, "hidden_k": hidden, "hidden_k_slope": slope, "norm_k": norm_k, "error": error,
        "error_scaled": error_scaled, "u": u, "d_in": d_in, "d_out": d_out,
    }  # fmt: skip
    return x_first, fields


def read_layer(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    delta: Tensor,
    momentum: tuple[Tensor, Tensor | None] | None,
    has_bias: bool,
    c: Coefficients,
) -> tuple[Tensor, Affinity]:
    """One layer's read `B (x W) + F (x S) − (P ⊙ Θ) δ`. `base` is x W + b."""
    if c.read_decay is not None:
        base = base * c.read_decay
    if momentum is not None:
        base = torch.addcmul(base, linear(x, *momentum), c.read_momentum)
    reads = affinity(x, a, has_bias, c.theta)
    return torch.baddbmm(base, reads.masked, delta, alpha=-1), reads


def chunk_forward(
    anchor: FastWeights,
    current: FastWeights | None,
    momentum: FastWeights | None,
    kx: Tensor,
    v: Tensor,
    lr: Tensor,
    norm: Norm | None,
    c: Coefficients,
    intra: bool,
) -> tuple[Tensor, ChunkState]:
    """Read a chunk.

    Args:
        anchor: weights at the start of the chunk, where the gradients are taken.
        current: weights before the first of these tokens where that is in mid-chunk; None: the anchor.
        momentum: S before the first token, or None.
        kx: [N, 2C, D] keys above read rows (queries, projected where they are).
        v: [N, C, D] values; lr: [N, C, 1].
        intra: True for a local memory, whose read at t sees the tokens up to t; False for the global memory, which is
            read at the anchor.

    Returns:
        o [N, C, D], and what `advance` and the backward need.
    """
    k, x = kx[:, : v.shape[1]], kx[:, v.shape[1] :]
    y, f = chunk_gradients(anchor, kx, v, lr, norm)
    if intra and current is not None:
        y = linear(x, current.w1, current.b1)
    has_momentum = intra and momentum is not None
    is_mlp = anchor.w2 is not None
    reads_in = reads_out = hidden_x = norm_x = None
    if intra:
        s_in = (momentum.w1, momentum.b1) if has_momentum else None
        y, reads_in = read_layer(y, x, k, f["d_in"], s_in, anchor.b1 is not None, c)
    if is_mlp:
        hidden_x = gelu(y.contiguous())
        h, a, last = hidden_x.value, f["hidden_k"].value, anchor if current is None or not intra else current
        y = linear(h, last.w2, last.b2)
        if intra:
            s_out = (momentum.w2, momentum.b2) if has_momentum else None
            y, reads_out = read_layer(y, h, a, f["d_out"], s_out, anchor.b2 is not None, c)
    if norm is None:
        o = y
    else:
        norm_x = normalise(y.contiguous())
        o = torch.addcmul(x + norm.bias, norm_x.n, norm.weight)
    return o, ChunkState(**f, hidden_x=hidden_x, norm_x=norm_x, reads_in=reads_in, reads_out=reads_out)


def read_only(weights: FastWeights, x: Tensor, norm: Norm | None) -> Tensor:
    """f(W, x) at fixed weights: [N, C, D]."""
    y = linear(x, weights.w1, weights.b1)
    if weights.w2 is not None:
        y = linear(gelu(y).value, weights.w2, weights.b2)
    return y if norm is None else torch.addcmul(x + norm.bias, normalise(y).n, norm.weight)


def advance(
    weights: FastWeights, momentum: FastWeights | None, s: ChunkState, c: Coefficients, overwrite: bool = False
) -> tuple[FastWeights, FastWeights | None]:
    """The weights and momentum after the chunk: W_end = B W + F S − Σ γ lr G, S_end = m S − Σ σ lr G.

    With `overwrite` they take the place of those before it; otherwise those stay as they are.
    """
    if not overwrite:
        weights = weights.map(Tensor.clone)
    _step(weights, c.end_decay, s, c.end_gain)
    if c.end_momentum is not None:
        weights.zip_map(lambda w, m: w.addcmul_(_like(c.end_momentum, m), m), momentum)
    if c.momentum_decay is not None:
        if not overwrite:
            momentum = momentum.map(Tensor.clone)
        _step(momentum, c.momentum_decay, s, c.momentum_gain)
    return weights, momentum


def _step(weights: FastWeights, decay: Tensor | None, s: ChunkState, gain: Tensor | None) -> None:
    """W ← decay · W − Σ gain lr G, in place: the products are accumulated straight onto the weights."""
    if decay is not None:
        weights.map(lambda w: w.mul_(_like(decay, w)))
    d_in, d_out = (s.d_in, s.d_out) if gain is None else (s.d_in * gain, s.d_out * gain)
    weights.w1.baddbmm_(s.kx[:, : s.lr.shape[1]].transpose(1, 2), d_in, alpha=-1)
    if weights.b1 is not None:
        weights.b1.sub_(d_in.sum(1))
    if weights.w2 is not None:
        weights.w2.baddbmm_(s.hidden_k.value.transpose(1, 2), d_out, alpha=-1)
    if weights.b2 is not None:
        weights.b2.sub_(d_out.sum(1))


def _like(c: Tensor, w: Tensor) -> Tensor:
    """A [N, 1, 1] coefficient in a shape that multiplies a weight [N, D, M] or a bias [N, M]."""
    return c if w.dim() == 3 else c.squeeze(-1)
