"""What a contender must compute and move at the least, per token and head; one multiply-add is two operations.

Matrix products only, counted as dense; elementwise work is not counted, nor what an implementation computes twice
beyond the recomputation named here. A chunk has C tokens, a head D entries, the hidden layer of an MLP memory M.

  Products of a linear map (2·in·out operations a token each), see "Cost" in kernels/README.md:
    a map of the first stage: forward 3: A W, H W and the update Aᵀ Δ; recomputed by the backward 2; backward 6.
    a map behind it: Δ Wᵀ, too, so forward 4, recomputed 3, backward 8.
    So an MLP of two maps has 14·D·M forward and 52·D·M forward + backward, a linear memory 6·D² and 22·D².
  C × C products: each stage has its scores (in) and each of its maps their use (out), 2·C·(in + out) a token; they are
    computed in the forward, again by the backward, and the backward has twice as many: 4 times the forward's.
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

from modeling_tnt.kernels.memories.kinds import memory_kind

FORWARD, BOTH = "forward", "forward+backward"
MODES = (BOTH, FORWARD)

LR_BYTES = 4  # the step size is float32 whatever the dtype of q
FIRST_PRODUCTS = {FORWARD: 3, BOTH: 3 + 2 + 6}
LATER_PRODUCTS = {FORWARD: 4, BOTH: 4 + 3 + 8}
NEWTON_SCHULZ_STEPS = 5
PROJECTION_SQUARES = {FORWARD: 4, BOTH: 4 + 6}
PROJECTION_CHUNKS = {FORWARD: 4, BOTH: 4 + 10}


def memory_operations(
    mode: str,
    *,
    memory: str,
    head_dim: int,
    expansion: int,
    chunk_size: int,
    qk_projection: str,
    depth: int | None = None,
) -> int:
    """Floating-point operations of a local memory per token and head. memory: its kind; depth None: the usual one."""
    D, kind = head_dim, memory_kind(memory)
    maps = kind.maps(kind.depth if depth is None else depth)
    shapes, stages = kind.shapes(D, D * expansion, maps), kind.stages(maps)
    products = in_chunk = 0
    for i, stage in enumerate(stages):
        per_map = (FIRST_PRODUCTS if i == 0 else LATER_PRODUCTS)[mode]
        products += sum(2 * per_map * shapes[m][0] * shapes[m][1] for m in stage.maps)
        in_chunk += shapes[stage.maps[0]][0] + sum(shapes[m][1] for m in stage.maps)
    inside_chunk = 2 * chunk_size * in_chunk * (1 if mode == FORWARD else 4)
    projection = 0
    if qk_projection != "none":
        projection += PROJECTION_CHUNKS[mode] * chunk_size * D
    if qk_projection == "shard":
        projection += PROJECTION_SQUARES[mode] * D * D
    return products + inside_chunk + projection


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
