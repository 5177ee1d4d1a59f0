"""What a contender must compute and move at the least, per token and head; one multiply-add is two operations.

Matrix products only, counted as dense; elementwise work is not counted, nor what an implementation computes twice
beyond the recomputation named here. A chunk has C tokens, a head D entries, the hidden layer of an MLP memory M.

  C × D × M products (2·D·M operations a token), see "What it costs" in the derivation of the backward:
    MLP     forward 7: K W1, A W2, Δ2 W2ᵀ, X W1, H W2 and the updates Kᵀ Δ1, Aᵀ Δ2; recomputed by the backward 5 (all
            but the updates); backward 14. So 14·D·M forward, 52·D·M forward + backward: 7/26 of it is the forward.
    linear  forward 3: K W, X W and the update Kᵀ Δ; recomputed 2; backward 6. So 6·D² and 22·D².
  C × C products: each layer from `in` to `out` has its scores and their use, 2·C·(in + out) a token; they are computed
    in the forward, again by the backward, and the backward has twice as many: 4 times the forward's.
  Q-K projection: "shard" forward Q M and Kᵀ K: 4·D², Q Kᵀ and its use: 4·C·D; backward 6·D² and 10·C·D. "chunk" has no
    M from before the chunk: 4·C·D and 10·C·D.
  Causal attention over T tokens: Q Kᵀ and its use, half of it masked: 2·T·D forward; the backward has five such
    products to the forward's two: 7·T·D in all.

  Muon, once a chunk: an iteration on a D × M matrix, n the smaller side and m the larger, has X Xᵀ, its square and
    their product with X: 4·n²·m + 2·n³; five iterations, and the backward has twice as many.

Bytes: every input read once and every output written once, weights left out (they are read once a call).
  memory     forward q, k, v, o and lr (float32); the backward reads q, k, v, lr and o's gradient, and writes four.
  attention  the same without lr; its backward also reads o.
"""

from __future__ import annotations

from collections.abc import Iterable

FORWARD, BOTH = "forward", "forward+backward"
MODES = (BOTH, FORWARD)

LR_BYTES = 4  # the step size is float32 whatever the dtype of q
MLP_PRODUCTS = {FORWARD: 7, BOTH: 7 + 5 + 14}
LINEAR_PRODUCTS = {FORWARD: 3, BOTH: 3 + 2 + 6}
NEWTON_SCHULZ_STEPS = 5
PROJECTION_SQUARES = {FORWARD: 4, BOTH: 4 + 6}
PROJECTION_CHUNKS = {FORWARD: 4, BOTH: 4 + 10}


def memory_operations(
    mode: str, *, memory: str, head_dim: int, expansion: int, chunk_size: int, qk_projection: str
) -> int:
    """Floating-point operations of a local memory per token and head."""
    D = head_dim
    M = D * expansion if memory == "mlp" else D
    products = (MLP_PRODUCTS if memory == "mlp" else LINEAR_PRODUCTS)[mode]
    layers = 2 if memory == "mlp" else 1
    inside_chunk = 2 * chunk_size * layers * (D + M) * (1 if mode == FORWARD else 4)
    projection = 0
    if qk_projection != "none":
        projection += PROJECTION_CHUNKS[mode] * chunk_size * D
    if qk_projection == "shard":
        projection += PROJECTION_SQUARES[mode] * D * D
    return products * 2 * D * M + inside_chunk + projection


def muon_operations(mode: str, *, matrices: Iterable[tuple[int, int]], chunk_size: int) -> float:
    """Floating-point operations, per token and head, that Newton-Schulz takes at the end of each chunk.

    matrices: (inputs, outputs) of each linear map of the memory.
    """
    sides = [(min(shape), max(shape)) for shape in matrices]
    forward = NEWTON_SCHULZ_STEPS * sum(4 * n * n * m + 2 * n**3 for n, m in sides)
    return (1 if mode == FORWARD else 3) * forward / chunk_size


def attention_operations(mode: str, *, head_dim: int, length: int) -> int:
    """Floating-point operations of causal attention over `length` tokens per token and head."""
    return (2 if mode == FORWARD else 7) * length * head_dim


def memory_bytes(mode: str, *, head_dim: int, itemsize: int) -> int:
    """Bytes that a memory must read and write per token and head."""
    row = head_dim * itemsize
    forward = 4 * row + LR_BYTES
    return forward if mode == FORWARD else forward + 7 * row + 2 * LR_BYTES


def attention_bytes(mode: str, *, head_dim: int, itemsize: int) -> int:
    """Bytes that attention must read and write per token and head."""
    row = head_dim * itemsize
    return 4 * row if mode == FORWARD else 4 * row + 8 * row
