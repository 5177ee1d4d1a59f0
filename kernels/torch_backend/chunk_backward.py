"""The analytic backward of `chunk_forward` followed by `advance`, for a chunk whose reads start at its anchor.

`x̄` is the gradient of the loss with respect to x; in code `grad_x`. The gradients of the weights and the momentum
before the chunk are accumulated in place onto those after it, since almost all of them pass straight through. Nothing
here is differentiable. The formulas, in steps 1 to 7, are in kernels/README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import FastWeights
from .chunk import Affinity, ChunkState, Coefficients, Norm, gelu_curvature, gelu_slope, linear, normalise_backward


class Layer(NamedTuple):
    """One layer of the memory, as its backward sees it. Weight, momentum and their gradients have N rows."""

    weight: Tensor
    bias: Tensor | None
    grad_weight: Tensor
    grad_bias: Tensor | None
    momentum: Tensor | None
    momentum_bias: Tensor | None
    grad_momentum: Tensor | None
    grad_momentum_bias: Tensor | None
    a: Tensor  # [N, C, in] input at the keys
    x: Tensor  # [N, C, in] input at the read rows
    delta: Tensor  # [N, C, out] δ, times lr
    reads: Affinity | None


class ChunkGradients(NamedTuple):
    """Gradients of a chunk's inputs; those of the state are accumulated in place."""

    k: Tensor
    v: Tensor
    x: Tensor
    lr: Tensor
    coefficients: Coefficients


def chunk_backward(
    s: ChunkState,
    weights: FastWeights,
    momentum: FastWeights | None,
    norm: Norm | None,
    c: Coefficients,
    intra: bool,
    grad_o: Tensor,
    grad_weights: FastWeights,
    grad_momentum: FastWeights | None,
    grad_norm_weight: Tensor | None,
) -> ChunkGradients:
    """Backward of one chunk.

    Args:
        s, c, norm, intra: as in and from `chunk_forward`.
        weights, momentum: those before the chunk.
        grad_o: [N, C, D].
        grad_weights, grad_momentum: on entry the gradients of the state after the chunk, on return of the one before.
        grad_norm_weight: [N, C, D], accumulates per row; to be summed over C by the caller. The norm's bias gets
            Σ grad_o − Σ grad_v, which the caller can take from the whole sequence at once.
    """
    C = s.lr.shape[1]
    first, last = _layers(s, weights, momentum, grad_weights, grad_momentum)
    g = _CoefficientGradients(c)

    grad_y = grad_o
    if norm is not None:
        grad_y = normalise_backward(s.norm_x, grad_o * norm.weight)
        grad_norm_weight.addcmul_(grad_o, s.norm_x.n)

    grad_a, grad_delta_out = _advance_backward(last, c, g)
    grad_first = torch.empty_like(first.weight[:, :1].expand(-1, 2 * C, -1))  # gradients of what meets W1: keys, reads
    if s.hidden_k is None:
        grad_h = _read_backward(last, grad_y, c, intra, grad_a, grad_delta_out, g, out=grad_first[:, C:])
        grad_x = grad_h
    else:
        grad_h = _read_backward(last, grad_y, c, intra, grad_a, grad_delta_out, g, out=None)
        grad_h += torch.bmm(_scaled(grad_y, c.read_decay if intra else None), last.weight.transpose(1, 2))
        slope = s.hidden_k_slope
        grad_k_in, grad_delta_in = _advance_backward(first, c, g)
        grad_y_in = grad_h.mul_(gelu_slope(s.hidden_x))
        grad_x = _read_backward(first, grad_y_in, c, intra, grad_k_in, grad_delta_in, g, out=grad_first[:, C:])
        # δ1 = (δ2 W2ᵀ) ⊙ φ'(z1)
        grad_u = grad_delta_in * slope
        grad_z_in = grad_delta_in.mul_(s.u).mul_(gelu_curvature(s.hidden_k, slope))
        grad_delta_out.baddbmm_(grad_u, last.weight)
        last.grad_weight.baddbmm_(grad_u.transpose(1, 2), s.d_out)

    grad_z, grad_e, grad_lr = _error_backward(s, norm, grad_delta_out, grad_norm_weight)
    if s.hidden_k is None:
        grad_first[:, :C] = grad_z
        grad_k = grad_a
    else:
        grad_a.baddbmm_(grad_z, last.weight.transpose(1, 2))
        last.grad_weight.baddbmm_(s.hidden_k.value.transpose(1, 2), grad_z)
        if last.bias is not None:
            last.grad_bias.add_(grad_z.sum(1))
        torch.addcmul(grad_z_in, grad_a, slope, out=grad_first[:, :C])
        grad_k = grad_k_in

    grad_kx = torch.bmm(grad_first, first.weight.transpose(1, 2))
    first.grad_weight.baddbmm_(s.kx.transpose(1, 2), grad_first)
    if first.bias is not None:
        first.grad_bias.add_(grad_first.sum(1))
    grad_k += grad_kx[:, :C]
    grad_x += grad_kx[:, C:]
    if norm is not None:
        grad_k += grad_e
        grad_x += grad_o
    return ChunkGradients(grad_k, grad_e.neg_(), grad_x, grad_lr, g.finish())


def _layers(
    s: ChunkState,
    weights: FastWeights,
    momentum: FastWeights | None,
    grad_weights: FastWeights,
    grad_momentum: FastWeights | None,
) -> tuple[Layer, Layer]:
    """The first and the last layer; the same one for a linear memory."""
    C = s.lr.shape[1]
    k, x = s.kx[:, :C], s.kx[:, C:]
    none = FastWeights(None)
    m, gm = momentum or none, grad_momentum or none
    w, gw = weights, grad_weights
    first = Layer(w.w1, w.b1, gw.w1, gw.b1, m.w1, m.b1, gm.w1, gm.b1, k, x, s.d_in, s.reads_in)
    if s.hidden_k is None:
        return first, first
    a, h = s.hidden_k.value, s.hidden_x.value
    return first, Layer(w.w2, w.b2, gw.w2, gw.b2, m.w2, m.b2, gm.w2, gm.b2, a, h, s.d_out, s.reads_out)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ over the features: [N, C, F] -> [N, C, 1]."""
    return (x * y).sum(-1, keepdim=True)


class _CoefficientGradients:
    """Sums the gradients of the coefficients that are there, over the layers that use them."""

    def __init__(self, c: Coefficients):
        self.c = c
        self.sums: dict[str, Tensor] = {}

    def wants(self, name: str) -> bool:
        return getattr(self.c, name) is not None

    def add(self, name: str, grad: Tensor) -> None:
        self.sums[name] = self.sums[name] + grad if name in self.sums else grad

    def finish(self) -> Coefficients:
        return Coefficients(**self.sums)


def _advance_backward(layer: Layer, c: Coefficients, g: _CoefficientGradients) -> tuple[Tensor, Tensor]:
    """W_end = B W + F S − aᵀ(γ δ), S_end = m S − aᵀ(σ δ). Returns ā and δ̄; turns the state's gradients in place."""
    w_end, b_end = layer.grad_weight, layer.grad_bias
    gained = _scaled(layer.delta, c.end_gain)
    grad_a = torch.bmm(gained, w_end.transpose(1, 2)).neg_()
    t = linear(layer.a, w_end, b_end)
    if g.wants("end_gain"):
        g.add("end_gain", -_dot(layer.delta, t))
        t *= c.end_gain
    grad_delta = t.neg_()
    if c.momentum_decay is not None:
        grad_a.baddbmm_(layer.delta * c.momentum_gain, layer.grad_momentum.transpose(1, 2), alpha=-1)
        t = linear(layer.a, layer.grad_momentum, layer.grad_momentum_bias)
        g.add("momentum_gain", -_dot(layer.delta, t))
        grad_delta.addcmul_(t, c.momentum_gain, value=-1)
    pairs = [(layer.weight, layer.momentum, w_end, layer.grad_momentum)]
    if layer.bias is not None:
        pairs.append((layer.bias, layer.momentum_bias, b_end, layer.grad_momentum_bias))
    for w, m, grad_w, grad_m in pairs:
        _decay_backward(w, m, grad_w, grad_m, c, g)
    return grad_a, grad_delta


def _decay_backward(
    w: Tensor, m: Tensor | None, grad_w: Tensor, grad_m: Tensor | None, c: Coefficients, g: _CoefficientGradients
) -> None:
    """The part of `_advance_backward` that does not touch the tokens, for one weight or bias."""

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).flatten(1).sum(1)[:, None, None]

    def fit(coefficient: Tensor) -> Tensor:
        return coefficient if w.dim() == 3 else coefficient.squeeze(-1)

    if c.momentum_decay is not None:
        g.add("momentum_decay", inner(grad_m, m))
        g.add("end_momentum", inner(grad_w, m))
        grad_m *= fit(c.momentum_decay)
        grad_m.addcmul_(grad_w, fit(c.end_momentum))
    if c.end_decay is not None:
        g.add("end_decay", inner(grad_w, w))
        grad_w *= fit(c.end_decay)


def _read_backward(
    layer: Layer,
    grad_y: Tensor,
    c: Coefficients,
    intra: bool,
    grad_a: Tensor,
    grad_delta: Tensor,
    g: _CoefficientGradients,
    out: Tensor | None,
) -> Tensor:
    """y = B (x W + b) + F (x S + s) − (P ⊙ Θ) δ. Adds to ā and δ̄ and to the momentum's gradient.

    Returns x̄ without the part that comes through W. B ȳ is written to `out` for the caller to take through the first
    layer's weight together with the keys; without `out` the weight's gradient is accumulated here.
    """
    if not intra:
        grad_x = grad_y.new_zeros(layer.x.shape)
        grad_base = grad_y
    else:
        r = torch.bmm(grad_y, layer.delta.transpose(1, 2))
        if c.theta is None:
            r.tril_()
        else:
            g.add("theta", -(r * layer.reads.raw))
            r.mul_(c.theta)
        grad_x = torch.bmm(r, layer.a).neg_()
        grad_a.baddbmm_(r.transpose(1, 2), layer.x, alpha=-1)
        grad_delta.baddbmm_(layer.reads.masked.transpose(1, 2), grad_y, alpha=-1)
        if c.momentum_decay is not None:
            scaled = grad_y * c.read_momentum
            g.add("read_momentum", _dot(grad_y, linear(layer.x, layer.momentum, layer.momentum_bias)))
            grad_x.baddbmm_(scaled, layer.momentum.transpose(1, 2))
            layer.grad_momentum.baddbmm_(layer.x.transpose(1, 2), scaled)
            if layer.bias is not None:
                layer.grad_momentum_bias.add_(scaled.sum(1))
        if g.wants("read_decay"):
            g.add("read_decay", _dot(grad_y, linear(layer.x, layer.weight, layer.bias)))
        grad_base = _scaled(grad_y, c.read_decay)
    if out is not None:
        out.copy_(grad_base)
    else:
        layer.grad_weight.baddbmm_(layer.x.transpose(1, 2), grad_base)
        if layer.bias is not None:
            layer.grad_bias.add_(grad_base.sum(1))
    return grad_x


def _error_backward(
    s: ChunkState, norm: Norm | None, q: Tensor, grad_norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From Q = δ̄ of the last layer to z̄ of its output, Ē of the error and the step size's gradient [N, C, 1]."""
    if norm is None:
        grad_lr = _dot(q, s.error)
        grad_z = q * s.lr
        return grad_z, grad_z.clone(), grad_lr
    rows, D = s.norm_k, q.shape[-1]
    n, r = rows.n, rows.rstd
    grad_g = normalise_backward(rows, q)  # of lr · Gz
    grad_lr = _dot(grad_g, s.error_scaled)
    grad_g *= s.lr
    grad_norm_weight.addcmul_(grad_g, s.error)
    grad_e = grad_g.mul_(norm.weight)
    grad_norm_weight.addcmul_(grad_e, n)
    # J(r, n, g) depends on n and r too: the second order of the norm.
    g = s.error_scaled * s.lr
    grad_n = q * _dot(g, n)
    grad_n.addcmul_(g, _dot(q, n)).mul_(r / -D)
    grad_n.addcmul_(grad_e, norm.weight)
    grad_z = normalise_backward(rows, grad_n)
    grad_z.addcmul_(n, _dot(q, s.d_out).mul_(r / -D))
    return grad_z, grad_e, grad_lr
