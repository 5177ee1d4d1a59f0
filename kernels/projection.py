"""The Q-K projection `x_t = M_t q_t`, `M_t = M_0 + Σ_{τ≤t} k_τ k_τᵀ / ‖k_τ‖²` (TNT eq. 7, 15, appendix C).

It does not depend on the memory, so it runs over the whole sequence before the scan: plain differentiable torch, in
blocks that bound the quadratic part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension; a zero vector stays zero and passes no gradient."""
    square = (x * x).sum(-1, keepdim=True)
    zero = square == 0
    return x * torch.where(zero, 0.0, torch.rsqrt(square.masked_fill(zero, 1.0)))


def project_queries(
    q: Tensor, k: Tensor, start: Tensor | None, normalize: bool, need_end: bool
) -> tuple[Tensor, Tensor | None]:
    """Project the queries of J independent pieces.

    Args:
        q, k: [J, L, H, D]; a padded token has k = 0.
        start: M before the first token [J, H, D, D], or None for zero.
        normalize: divide the result by its norm.
        need_end: also return M after the last token.

    Returns:
        x [J, L, H, D] and M [J, H, D, D] or None.
    """
    J, L, H, D = q.shape
    size = min(BLOCK, L)
    blocks = -(-L // size)
    spare = blocks * size - L

    def split(t: Tensor) -> Tensor:
        t = pad(t, (0, 0, 0, 0, 0, spare)) if spare else t
        return t.view(J, blocks, size, H, D).transpose(2, 3)  # [J, blocks, H, size, D]

    q, k = split(q), unit(split(k))
    x = (q @ k.transpose(-1, -2)).tril() @ k
    end = start
    if blocks > 1 or need_end:
        sums = (k.transpose(-1, -2) @ k).cumsum(1)
        end = sums[:, -1] if start is None else sums[:, -1] + start
        if blocks > 1:
            earlier = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), dim=1)
            x = x + q @ earlier
    if start is not None:
        x = x + q @ start.unsqueeze(1)
    x = x.transpose(2, 3).reshape(J, blocks * size, H, D)[:, :L]
    return unit(x) if normalize else x, end if need_end else None
