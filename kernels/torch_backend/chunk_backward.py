"""The analytic backward of `chunk_forward` followed by `advance`, for a chunk whose reads start at its anchor.

`x̄` is the gradient of the loss with respect to x; in code `grad_x`. The gradients of the weights and the momentum
before the chunk are accumulated in place onto those after it, since almost all of them pass straight through. Nothing
here is differentiable. The formulas, in steps 1 to 7, are in kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memories.kind import Stage
from ..types import FastWeights
from .chunk import Affinity, ChunkState, Coefficients, KeySide, Norm, linear, normalise_backward, sum_products


class Map(NamedTuple):
    """One linear map of the memory, as its backward sees it. Weight, momentum and their gradients have N rows."""

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
    stages: Sequence[Stage],
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
        stages, s, c, norm, intra: as in and from `chunk_forward`.
        weights, momentum: those before the chunk.
        grad_o: [N, C, D].
        grad_weights, grad_momentum: on entry the gradients of the state after the chunk, on return of the one before.
        grad_norm_weight: [N, C, D], accumulates per row; to be summed over C by the caller. The norm's bias gets
            Σ grad_o − Σ grad_v, which the caller can take from the whole sequence at once.
    """
    keys = s.keys
    C, last = keys.lr.shape[1], stages[-1].maps[0]
    maps = _maps(stages, s, weights, momentum, grad_weights, grad_momentum)
    g = _CoefficientGradients(c)

    grad_y = grad_o
    if norm is not None:
        grad_y = normalise_backward(s.norm, grad_o * norm.weight)
        grad_norm_weight.addcmul_(grad_o, s.norm.n)

    # The reads, from the last stage to the first. What meets the first stage's weights: keys above read rows.
    grad_first = [torch.empty_like(maps[i].weight[:, :1].expand(-1, 2 * C, -1)) for i in stages[0].maps]
    grad_inputs, grad_deltas, grad_ys = [None] * len(stages), [None] * len(maps), (grad_y,)
    for t in range(len(stages) - 1, -1, -1):
        grad_h = None
        for place, (i, grad_y) in enumerate(zip(stages[t].maps, grad_ys, strict=True)):
            grad_a, grad_deltas[i] = _advance_backward(maps[i], c, g)
            out = None if t > 0 else grad_first[place][:, C:]
            part = _read_backward(maps[i], grad_y, c, intra, grad_a, grad_deltas[i], g, out)
            if t > 0:
                part += torch.bmm(_scaled(grad_y, c.read_decay if intra else None), maps[i].weight.transpose(1, 2))
            grad_inputs[t] = grad_a if place == 0 else grad_inputs[t].add_(grad_a)
            grad_h = part if place == 0 else grad_h.add_(part)
        if t > 0:
            joint, tape = stages[t - 1].joint, s.tapes[t - 1]
            grad_ys = joint.backward(tape, joint.slopes(tape), grad_h, overwrite=True)
    grad_x = grad_h

    # The gradients δ at the keys are functions of the weights and of the outputs there: δ = joint'(Σ δ Wᵀ).
    direct = []
    for t in range(len(stages) - 1):
        grads, joint = [grad_deltas[i] for i in stages[t].maps], stages[t].joint
        grad_u, grad_ys = joint.second(keys.tapes[t], keys.slopes[t], keys.upstream[t], grads)
        direct.append(grad_ys)
        for i in stages[t + 1].maps:
            grad_deltas[i].baddbmm_(grad_u, maps[i].weight)
            maps[i].grad_weight.baddbmm_(grad_u.transpose(1, 2), maps[i].delta)

    grad_z, grad_e, grad_lr = _error_backward(keys, norm, grad_deltas[last], maps[last].delta, grad_norm_weight)

    # The outputs at the keys, from the last stage to the first.
    grad_ys = (grad_z,)
    for t in range(len(stages) - 1, 0, -1):
        for i, grad_y in zip(stages[t].maps, grad_ys, strict=True):
            grad_inputs[t].baddbmm_(grad_y, maps[i].weight.transpose(1, 2))
            maps[i].grad_weight.baddbmm_(maps[i].a.transpose(1, 2), grad_y)
            if maps[i].bias is not None:
                maps[i].grad_bias.add_(grad_y.sum(1))
        joint = stages[t - 1].joint
        grad_ys = joint.backward(keys.tapes[t - 1], keys.slopes[t - 1], grad_inputs[t], plus=direct[t - 1])
    for grad, grad_y in zip(grad_first, grad_ys, strict=True):
        grad[:, :C] = grad_y

    first = [maps[i] for i in stages[0].maps]
    grad_kx = sum_products([(grad, m.weight.transpose(1, 2)) for grad, m in zip(grad_first, first, strict=True)])
    for grad, m in zip(grad_first, first, strict=True):
        m.grad_weight.baddbmm_(keys.kx.transpose(1, 2), grad)
        if m.bias is not None:
            m.grad_bias.add_(grad.sum(1))
    grad_k = grad_inputs[0].add_(grad_kx[:, :C])
    grad_x += grad_kx[:, C:]
    if norm is not None:
        grad_k += grad_e
        grad_x += grad_o
    return ChunkGradients(grad_k, grad_e.neg_(), grad_x, grad_lr, g.finish())


def _maps(
    stages: Sequence[Stage],
    s: ChunkState,
    weights: FastWeights,
    momentum: FastWeights | None,
    grad_weights: FastWeights,
    grad_momentum: FastWeights | None,
) -> list[Map]:
    """The linear maps, by their number."""
    deltas = s.keys.deltas
    none = [(None, None)] * len(deltas)
    w, grad_w = weights.maps, grad_weights.maps
    m, grad_m = (none, none) if momentum is None else (momentum.maps, grad_momentum.maps)
    maps = [None] * len(deltas)
    for stage, a, x, reads in zip(stages, s.keys.inputs, s.inputs, s.reads, strict=True):
        for i in stage.maps:
            maps[i] = Map(*w[i], *grad_w[i], *m[i], *grad_m[i], a, x, deltas[i], reads)
    return maps


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


def _advance_backward(lin: Map, c: Coefficients, g: _CoefficientGradients) -> tuple[Tensor, Tensor]:
    """W_end = B W + F S − aᵀ(γ δ), S_end = m S − aᵀ(σ δ). Returns ā and δ̄; turns the state's gradients in place."""
    w_end, b_end = lin.grad_weight, lin.grad_bias
    gained = _scaled(lin.delta, c.end_gain)
    grad_a = torch.bmm(gained, w_end.transpose(1, 2)).neg_()
    t = linear(lin.a, w_end, b_end)
    if g.wants("end_gain"):
        g.add("end_gain", -_dot(lin.delta, t))
        t *= c.end_gain
    grad_delta = t.neg_()
    if c.momentum_decay is not None:
        grad_a.baddbmm_(lin.delta * c.momentum_gain, lin.grad_momentum.transpose(1, 2), alpha=-1)
        t = linear(lin.a, lin.grad_momentum, lin.grad_momentum_bias)
        g.add("momentum_gain", -_dot(lin.delta, t))
        grad_delta.addcmul_(t, c.momentum_gain, value=-1)
    pairs = [(lin.weight, lin.momentum, w_end, lin.grad_momentum)]
    if lin.bias is not None:
        pairs.append((lin.bias, lin.momentum_bias, b_end, lin.grad_momentum_bias))
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
    lin: Map,
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
    stage's weights together with the keys; without `out` the weight's gradient is accumulated here.
    """
    if not intra:
        grad_x = grad_y.new_zeros(lin.x.shape)
        grad_base = grad_y
    else:
        r = torch.bmm(grad_y, lin.delta.transpose(1, 2))
        if c.theta is None:
            r.tril_()
        else:
            g.add("theta", -(r * lin.reads.raw))
            r.mul_(c.theta)
        grad_x = torch.bmm(r, lin.a).neg_()
        grad_a.baddbmm_(r.transpose(1, 2), lin.x, alpha=-1)
        grad_delta.baddbmm_(lin.reads.masked.transpose(1, 2), grad_y, alpha=-1)
        if c.momentum_decay is not None:
            scaled = grad_y * c.read_momentum
            g.add("read_momentum", _dot(grad_y, linear(lin.x, lin.momentum, lin.momentum_bias)))
            grad_x.baddbmm_(scaled, lin.momentum.transpose(1, 2))
            lin.grad_momentum.baddbmm_(lin.x.transpose(1, 2), scaled)
            if lin.bias is not None:
                lin.grad_momentum_bias.add_(scaled.sum(1))
        if g.wants("read_decay"):
            g.add("read_decay", _dot(grad_y, linear(lin.x, lin.weight, lin.bias)))
        grad_base = _scaled(grad_y, c.read_decay)
    if out is not None:
        out.copy_(grad_base)
    else:
        lin.grad_weight.baddbmm_(lin.x.transpose(1, 2), grad_base)
        if lin.bias is not None:
            lin.grad_bias.add_(grad_base.sum(1))
    return grad_x


def _error_backward(
    keys: KeySide, norm: Norm | None, q: Tensor, delta: Tensor, grad_norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """From Q = δ̄ of the last map, and δ, to z̄ of its output, Ē of the error and the step size's gradient [N, C, 1]."""
    if norm is None:
        grad_lr = _dot(q, keys.error)
        grad_z = q * keys.lr
        return grad_z, grad_z.clone(), grad_lr
    rows, D = keys.norm, q.shape[-1]
    n, r = rows.n, rows.rstd
    grad_g = normalise_backward(rows, q)  # of lr · Gz
    grad_lr = _dot(grad_g, keys.error_scaled)
    grad_g *= keys.lr
    grad_norm_weight.addcmul_(grad_g, keys.error)
    grad_e = grad_g.mul_(norm.weight)
    grad_norm_weight.addcmul_(grad_e, n)
    # J(r, n, g) depends on n and r too: the second order of the norm.
    g = keys.error_scaled * keys.lr
    grad_n = q * _dot(g, n)
    grad_n.addcmul_(g, _dot(q, n)).mul_(r / -D)
    grad_n.addcmul_(grad_e, norm.weight)
    grad_z = normalise_backward(rows, grad_n)
    grad_z.addcmul_(n, _dot(q, delta).mul_(r / -D))
    return grad_z, grad_e, grad_lr
