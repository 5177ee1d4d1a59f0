"""The forward mathematics of one chunk in dual form, the only place where it is written.

Differentiable torch on rows: N independent memories (a row is one head of one shard), C tokens each. The scan runs it
without autograd and brings its own backward (chunk_backward.py); the pieces at the edges of a sequence run it with
autograd. A memory is linear maps in stages (memories/kind.py). For each of its maps, with the input a_τ at the key and
the inner gradient δ_τ at the output, G_τ = a_τᵀ δ_τ, and a read is

    h_t W_t = B_t (h_t W) + F_t (h_t S) − Σ_{τ≤t} Θ_tτ (h_t·a_τ) δ_τ          (TTT, arXiv 2407.04620, section 2.5)

where `δ` already carries the step size lr_τ, W is the weight and S the momentum before the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memories.kind import Stage
from ..types import FastWeights

NORM_EPS = 1e-6


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


class KeySide(NamedTuple):
    """What a chunk's keys give: inner gradients at its anchor, and what their backward needs again. [N, C, …] unless
    said otherwise."""

    kx: Tensor  # [N, 2C, D]: keys above read rows, so that both meet the first stage's weights in one product
    lr: Tensor  # [N, C, 1]
    inputs: list[Tensor]  # of each stage: a
    tapes: list[Any]  # of each joint
    slopes: list[Any]
    upstream: list[Tensor]  # gradient of each joint's value: Σ δ Wᵀ over the maps behind it
    deltas: list[Tensor]  # of each map: δ, times lr
    norm: NormalisedRows | None
    error: Tensor  # E = f(W, k) − v
    error_scaled: Tensor | None  # Gz = E ⊙ norm weight


class ChunkState(NamedTuple):
    """Everything of a chunk's forward that its backward needs again."""

    keys: KeySide
    inputs: list[Tensor]  # of each stage at the read rows: h
    tapes: list[Any]  # of each joint at the read rows
    reads: list[Affinity | None]  # of each stage
    norm: NormalisedRows | None  # of the read rows


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
    stages: Sequence[Stage], weights: FastWeights, kx: Tensor, v: Tensor, lr: Tensor, norm: Norm | None
) -> tuple[list[Tensor], KeySide]:
    """Inner gradients of all tokens of a chunk at its anchor, and the first stage's reads on the way.

    Args:
        stages: of the kind of memory.
        weights: the anchor, N rows.
        kx: [N, 2C, D] keys above read rows (or [N, C, D], keys alone).
        v: [N, C, D]; lr: [N, C, 1].

    Returns:
        the outputs of the first stage's maps at the read rows, and the gradients.
    """
    C, maps = v.shape[1], weights.maps
    k = kx[:, :C]
    inputs, tapes, slopes, ys, reads = [k], [], [], [], []
    for i in stages[0].maps:
        y = linear(kx, *maps[i])
        ys.append(y[:, :C])
        reads.append(y[:, C:])
    for t in range(1, len(stages)):
        joint = stages[t - 1].joint
        tape = joint.forward(*[y.contiguous() for y in ys])
        tapes.append(tape)
        slopes.append(joint.slopes(tape))
        inputs.append(tape.value)
        ys = [linear(tape.value, *maps[i]) for i in stages[t].maps]
    y, norm_k, error_scaled = ys[0], None, None
    if norm is None:
        error = y - v
        delta = error * lr
    else:
        norm_k = normalise(y.contiguous())
        error = torch.addcmul(k - v + norm.bias, norm_k.n, norm.weight)
        error_scaled = error * norm.weight
        delta = normalise_backward(norm_k, error_scaled * lr)
    deltas, upstream = [None] * len(maps), [None] * len(tapes)
    deltas[stages[-1].maps[0]] = delta
    for t in range(len(tapes) - 1, -1, -1):
        u = sum_products([(deltas[i], maps[i][0].transpose(1, 2)) for i in stages[t + 1].maps])
        upstream[t], grads = u, stages[t].joint.backward(tapes[t], slopes[t], u)
        for i, grad in zip(stages[t].maps, grads, strict=True):
            deltas[i] = grad
    return reads, KeySide(kx, lr, inputs, tapes, slopes, upstream, deltas, norm_k, error, error_scaled)


def sum_products(factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ x y over pairs of [N, C, A] and [N, A, B]."""
    total = torch.bmm(*factors[0])
    for x, y in factors[1:]:
        total = torch.baddbmm(total, x, y)
    return total


def read_map(
    base: Tensor,
    x: Tensor,
    delta: Tensor,
    reads: Affinity,
    momentum: tuple[Tensor, Tensor | None] | None,
    c: Coefficients,
) -> Tensor:
    """One map's read `B (x W) + F (x S) − (P ⊙ Θ) δ`. `base` is x W + b."""
    if c.read_decay is not None:
        base = base * c.read_decay
    if momentum is not None:
        base = torch.addcmul(base, linear(x, *momentum), c.read_momentum)
    return torch.baddbmm(base, reads.masked, delta, alpha=-1)


def chunk_forward(
    stages: Sequence[Stage],
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
        stages: of the kind of memory.
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
    x = kx[:, v.shape[1] :]
    ys, keys = chunk_gradients(stages, anchor, kx, v, lr, norm)
    read_at = anchor if current is None or not intra else current
    maps, has_bias = read_at.maps, anchor.b1 is not None
    moments = momentum.maps if intra and momentum is not None else [None] * len(maps)
    inputs, tapes, reads = [x], [], []
    for t, stage in enumerate(stages):
        if t > 0 or read_at is current:
            ys = [linear(inputs[t], *maps[i]) for i in stage.maps]
        meets = affinity(inputs[t], keys.inputs[t], has_bias, c.theta) if intra else None
        reads.append(meets)
        if intra:
            ys = [
                read_map(y, inputs[t], keys.deltas[i], meets, moments[i], c)
                for i, y in zip(stage.maps, ys, strict=True)
            ]
        if stage.joint is not None:
            tapes.append(stage.joint.forward(*[y.contiguous() for y in ys]))
            inputs.append(tapes[t].value)
    o, norm_x = ys[0], None
    if norm is not None:
        norm_x = normalise(o.contiguous())
        o = torch.addcmul(x + norm.bias, norm_x.n, norm.weight)
    return o, ChunkState(keys, inputs, tapes, reads, norm_x)


def read_only(stages: Sequence[Stage], weights: FastWeights, x: Tensor, norm: Norm | None) -> Tensor:
    """f(W, x) at fixed weights: [N, C, D]."""
    h = x
    for stage in stages:
        ys = [linear(h, *weights.maps[i]) for i in stage.maps]
        h = ys[0] if stage.joint is None else stage.joint.forward(*ys).value
    return h if norm is None else torch.addcmul(x + norm.bias, normalise(h).n, norm.weight)


def advance(
    stages: Sequence[Stage],
    weights: FastWeights,
    momentum: FastWeights | None,
    s: ChunkState,
    c: Coefficients,
    overwrite: bool = False,
) -> tuple[FastWeights, FastWeights | None]:
    """The weights and momentum after the chunk: W_end = B W + F S − Σ γ lr G, S_end = m S − Σ σ lr G.

    With `overwrite` they take the place of those before it; otherwise those stay as they are.
    """
    if not overwrite:
        weights = weights.map(Tensor.clone)
    _step(stages, weights, c.end_decay, s.keys, c.end_gain)
    if c.end_momentum is not None:
        weights.zip_map(lambda w, m: w.addcmul_(_like(c.end_momentum, m), m), momentum)
    if c.momentum_decay is not None:
        if not overwrite:
            momentum = momentum.map(Tensor.clone)
        _step(stages, momentum, c.momentum_decay, s.keys, c.momentum_gain)
    return weights, momentum


def _step(
    stages: Sequence[Stage], weights: FastWeights, decay: Tensor | None, keys: KeySide, gain: Tensor | None
) -> None:
    """W ← decay · W − Σ gain lr G, in place: the products are accumulated straight onto the weights."""
    if decay is not None:
        weights.map(lambda w: w.mul_(_like(decay, w)))
    maps = weights.maps
    for stage, a in zip(stages, keys.inputs, strict=True):
        for i in stage.maps:
            delta = keys.deltas[i] if gain is None else keys.deltas[i] * gain
            weight, bias = maps[i]
            weight.baddbmm_(a.transpose(1, 2), delta, alpha=-1)
            if bias is not None:
                bias.sub_(delta.sum(1))


def _like(c: Tensor, w: Tensor) -> Tensor:
    """A [N, 1, 1] coefficient in a shape that multiplies a weight [N, D, M] or a bias [N, M]."""
    return c if w.dim() == 3 else c.squeeze(-1)
