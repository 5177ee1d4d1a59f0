"""The chunk update of Muon, for a global memory with `update="muon"` (LaCT, arXiv 2505.23884).

With A the weights at the start of a chunk, U what its tokens have added to them and W_init the learned start:

    matrices    U_t = (1 − decay_t) U_{t−1} + S_t      W' = (A + NS(U)) · ‖W_init‖ / ‖A + NS(U)‖      W_t = A + U_t
    vectors     U_t = (1 − decay_t) U_{t−1} + S_t      W' = U                                         W_t = U_t

U starts at 0 for a matrix and at A for a vector. W' is what the next chunk starts from, and W_t what a state holds in
mid-chunk: the plain sum, from which U is found again. ‖·‖ is taken over the inputs of each output (a column of x W).

From the paper: the orthogonal step is added as it is, so that lr only weighs the tokens of a chunk against each other;
the columns keep the norms of W_init; a momentum is kept of gradients, not of orthogonal steps. Where it leaves room:
- it has neither biases nor a forget gate. Biases learn as without Muon. The gate forgets within the chunk, and of A
  nothing: what earlier chunks have taught fades as steps are added to columns of constant norm. (A forget gate's
  product over a chunk of thousands of tokens would leave nothing of A.)
- momentum and lr are a token's, as they are without Muon; the paper has a chunk's mean of the momentum.
- NS has Muon's coefficients for all steps, and float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import FastWeights

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def newton_schulz(x: Tensor) -> Tensor:
    """Nearly the orthogonal factor U Vᵀ of each matrix x = U Σ Vᵀ [..., n, m], differentiable; a zero one stays zero.

    X_0 = x / (‖x‖ + 1e-7), X_{i+1} = a X + (b X Xᵀ + c (X Xᵀ)²) X, five times, which maps every singular value above
    0.0015 ‖x‖ into [0.67, 1.21], and multiplies smaller ones by up to 485.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def chunk_step(weights: FastWeights, anchor: FastWeights, initial: FastWeights) -> FastWeights:
    """U of plain sums W_t. `weights` and `anchor` are [rows, H, …], `initial` is [H, …]."""
    return weights.zip_map(lambda w, a, w0: w - a if _is_matrix(w0) else w, anchor, initial)


def plain_sum(step: FastWeights, anchor: FastWeights, initial: FastWeights) -> FastWeights:
    """W_t of U_t: the inverse of `chunk_step`."""
    return step.zip_map(lambda u, a, w0: a + u if _is_matrix(w0) else u, anchor, initial)


def end_chunk(step: FastWeights, anchor: FastWeights, initial: FastWeights) -> FastWeights:
    """W' of a finished chunk's U."""

    def learn(u: Tensor, a: Tensor, w0: Tensor) -> Tensor:
        return _with_norms_of(w0, a + newton_schulz(u)) if _is_matrix(w0) else u

    return step.zip_map(learn, anchor, initial)


def _is_matrix(initial: Tensor) -> bool:
    """Of one of the initial fast weights, [H, in, out] or [H, out]."""
    return initial.dim() == 3


def _with_norms_of(initial: Tensor, w: Tensor) -> Tensor:
    """The columns of w, scaled to the norms of those of `initial`; a zero column stays zero."""
    norm, wanted = (torch.linalg.vector_norm(t, dim=-2, keepdim=True) for t in (w, initial))
    return w * (wanted / torch.where(norm == 0, 1, norm))
