"""Chunk coefficients from step sizes' companions: momentum, decay and token scale, by products only.

Inside a chunk the two recurrences S_t = m_t S_{t−1} − lr_t G_t and W_t = (1 − d_t) W_{t−1} + S_t are linear in W, S and
G, so every read and the state after the chunk are sums with scalar coefficients (`Coefficients`). All of them are
products and sums of numbers in [0, 1]; nothing is divided, so nothing overflows, an exact 0 or 1 is exact, and its
gradient is right. That is why there are no logarithms here.

A padded token has m = 1, d = 0 and adds nothing to W (`valid` = 0), so both states pass it unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import Coefficients


class Gates(NamedTuple):
    """Per-token scalars of some chunks, [..., C] each; None where the memory does without.

    valid is a 0/1 tensor, or None when no token is padding.
    """

    momentum: Tensor | None
    decay: Tensor | None
    valid: Tensor | None = None

    def masked(self) -> Gates:
        """The same with padded tokens made transparent."""
        if self.valid is None:
            return self
        m = None if self.momentum is None else torch.where(self.valid > 0, self.momentum, 1.0)
        d = None if self.decay is None else torch.where(self.valid > 0, self.decay, 0.0)
        return Gates(m, d, self.valid)


def local_coefficients(gates: Gates) -> Coefficients:
    """Coefficients of chunks whose reads see the tokens before them. Shapes [..., C, C] and [..., C]; ends [...]."""
    m, d, valid = gates.masked()
    if m is None and d is None:
        return Coefficients()
    like = m if d is None else d
    C = like.shape[-1]
    ones = torch.ones(C, C, dtype=like.dtype, device=like.device).tril()
    keep = ones if d is None else _products(1 - d)  # [t, j]: what is left at t of what was added to W at j
    added = keep if valid is None else keep * valid.unsqueeze(-2)
    read_decay = None if d is None else torch.cumprod(1 - d, -1)
    end_decay = None if d is None else read_decay[..., -1]
    if m is None:
        return Coefficients(theta=added, read_decay=read_decay, end_gain=added[..., -1, :], end_decay=end_decay)
    carried = _products(m)  # [j, τ]: what is left in S at j of token τ
    from_start = torch.cumprod(m, -1)
    theta = added @ carried
    read_momentum = (added @ from_start.unsqueeze(-1)).squeeze(-1)
    return Coefficients(
        theta=theta,
        read_decay=read_decay,
        read_momentum=read_momentum,
        end_gain=theta[..., -1, :],
        end_decay=end_decay,
        end_momentum=read_momentum[..., -1],
        momentum_gain=carried[..., -1, :],
        momentum_decay=from_start[..., -1],
    )


def global_coefficients(gates: Gates) -> Coefficients:
    """Coefficients of chunks that are read at their anchor: the ends only, in O(C log C)."""
    m, d, valid = gates.masked()
    if m is None and d is None:
        return Coefficients()
    like = m if d is None else d
    kept = torch.ones_like(like) if d is None else _suffix_products(1 - d)  # what is left of what was added to W at j
    added = kept if valid is None else kept * valid
    end_decay = None if d is None else (1 - d).prod(-1)
    if m is None:
        return Coefficients(end_gain=added, end_decay=end_decay)
    end_gain = _reverse_recurrence(_shift_left(m, 1, 0.0), added)
    return Coefficients(
        end_gain=end_gain,
        end_decay=end_decay,
        end_momentum=m[..., 0] * end_gain[..., 0],
        momentum_gain=_suffix_products(m),
        momentum_decay=m.prod(-1),
    )


def token_scale_coefficients(scale: Tensor) -> Coefficients:
    """W_t = W − r_t Σ_{τ≤t} lr G (TTT): `scale` [..., C] is r."""
    C = scale.shape[-1]
    theta = scale.unsqueeze(-1) * torch.ones(C, C, dtype=scale.dtype, device=scale.device).tril()
    return Coefficients(theta=theta, end_gain=theta[..., -1, :])


def _products(x: Tensor) -> Tensor:
    """[..., t, j] = Π_{j < i ≤ t} x_i for j ≤ t, 0 above the diagonal."""
    C = x.shape[-1]
    below = torch.ones(C, C, dtype=torch.bool, device=x.device).tril(-1)
    factors = torch.where(below, x.unsqueeze(-1), 1.0)
    return torch.cumprod(factors, -2).tril()


def _shift_left(x: Tensor, by: int, fill: float) -> Tensor:
    """x_{τ+by} at τ, `fill` past the end."""
    return torch.nn.functional.pad(x[..., by:], (0, by), value=fill)


def _suffix_products(x: Tensor) -> Tensor:
    """Π_{i > τ} x_i at τ."""
    return _shift_left(torch.cumprod(x.flip(-1), -1).flip(-1), 1, 1.0)


def _reverse_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """c_τ = b_τ + a_τ c_{τ+1}, by doubling: log2 C vector steps instead of C."""
    step = 1
    while step < b.shape[-1]:
        b = b + a * _shift_left(b, step, 0.0)
        a = a * _shift_left(a, step, 0.0)
        step *= 2
    return b
