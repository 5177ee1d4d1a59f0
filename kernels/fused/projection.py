"""The Q-K projection x_t = q_t M_t, M_t = Σ k kᵀ / ‖k‖² (TNT eq. 7, 15, appendix C): one program per (segment, head).

M stays on chip. It does not depend on the memory, so it has a kernel of its own, for two reasons: tiles of many tokens
where a memory's chunk has few, and the registers that M would take from the fast weights (fused into forward.py it made
both spill; tests/benchmarks/LOG.md).
"""

import triton
import triton.language as tl

from .coefficients import causal
from .math import unit
from .tile import add_dot, dot, load_matrix, load_tokens, store_matrix, store_tokens, tokens_of_tile, transposed


@triton.jit
def project(q, unit_k, m, in_order, DT: tl.constexpr, PRECISION: tl.constexpr):
    """X = Q M + tril(Q Kᵀ) K for the tokens of a tile, with unit keys and M before it."""
    p = dot(q, transposed(unit_k, DT), DT, PRECISION) * in_order
    return add_dot(dot(q, m, DT, PRECISION), p, unit_k, DT, PRECISION)


@triton.jit
def projection_kernel(
    q, k,  # [tokens, H, D]
    segments,  # [S, 5] int64, see forward.py
    start_projection,  # [rows, H, D, D] float32
    x,  # [tokens, H, D], written
    end_projection,  # [ends, H, D, D] float32, or None
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PER_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C: tokens between resets of M with PER_CHUNK, otherwise R; R: tokens of a tile."""
    DT: tl.constexpr = q.dtype.element_ty
    TILES: tl.constexpr = (C + R - 1) // R
    segment = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(segments + segment * 5)
    count = tl.load(segments + segment * 5 + 1)
    offset = tl.load(segments + segment * 5 + 2)
    if not PER_CHUNK:
        offset = offset * 0
    source = tl.load(segments + segment * 5 + 3) * H + head
    m = load_matrix(start_projection + source * D * D, D, D)
    in_order = causal(R)

    for chunk in range(0, tl.cdiv(offset + count, C)):
        origin = first + chunk * C - offset
        if PER_CHUNK:
            m *= tl.where((chunk > 0) | (offset == 0), 0.0, 1.0)  # zeros in its place do not compile for sm_100
        for tile in range(0, TILES):
            place, valid = tokens_of_tile(chunk, tile, offset, count, C, R)
            query = load_tokens(q, origin, place, head, valid, H, D)
            unit_k, _ = unit(load_tokens(k, origin, place, head, valid, H, D).to(tl.float32))
            projected = project(query, unit_k, m, in_order, DT, PRECISION)
            if NORMALIZE:
                projected, _ = unit(projected)
            store_tokens(x, projected, origin, place, head, valid, H, D)
            m = add_dot(m, transposed(unit_k, DT), unit_k, DT, PRECISION)

    if end_projection is not None:
        end = tl.load(segments + segment * 5 + 4)
        if end >= 0:
            if PER_CHUNK:  # empty again after a chunk's last token
                m = tl.where((offset + count) % C == 0, 0.0, m)
            store_matrix(end_projection + (end * H + head) * D * D, m, D, D)
