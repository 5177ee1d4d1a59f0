"""The Q-K projection's backward, first half: from x̄ of x_t = q_t M_t to q̄, walking forward with M on chip.

With unit keys, Q̄ = X̄ Mᵀ + tril(X̄ Kᵀ) K. A normalised projection is computed again, and x̄ is replaced by the gradient
of what was normalised, which the second half (projection_keys.py) needs.
"""

import triton
import triton.language as tl

from .math import unit, unit_backward
from .tile import add_dot, dot, load_matrix, load_rows, store_rows


@triton.jit
def projection_queries_kernel(
    q, k,  # [tokens, H, D]
    segments,  # [S, 5] int64, see forward.py
    start_projection,  # [rows, H, D, D] float32
    grad_x,  # [tokens, H, D]: read, and with NORMALIZE replaced
    grad_q,  # [tokens, H, D], written
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PER_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C: tokens between resets of M with PER_CHUNK, otherwise R; R: rows of a tile."""
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
    causal = tl.arange(0, R)[:, None] >= tl.arange(0, R)[None, :]

    for chunk in range(0, tl.cdiv(offset + count, C)):
        if PER_CHUNK:
            m = tl.where((chunk > 0) | (offset == 0), 0.0, m)
        for tile in range(0, TILES):
            place = tile * R + tl.arange(0, R)
            inside = chunk * C + place - offset
            valid = (place < C) & (inside >= 0) & (inside < count)
            token = first + inside
            unit_k, _ = unit(load_rows(k, token, head, valid, H, D).to(tl.float32))
            grad = load_rows(grad_x, token, head, valid, H, D)
            if NORMALIZE:
                query = load_rows(q, token, head, valid, H, D)
                p = tl.where(causal, dot(query, tl.trans(unit_k), DT, PRECISION), 0.0)
                x = add_dot(dot(query, m, DT, PRECISION), p, unit_k, DT, PRECISION)
                unit_x, factor = unit(x)
                grad = unit_backward(unit_x, factor, grad.to(tl.float32))
                store_rows(grad_x, grad, token, head, valid, H, D)
            r = tl.where(causal, dot(grad, tl.trans(unit_k), DT, PRECISION), 0.0)
            grad = add_dot(dot(grad, tl.trans(m), DT, PRECISION), r, unit_k, DT, PRECISION)
            store_rows(grad_q, grad, token, head, valid, H, D)
            m = add_dot(m, tl.trans(unit_k), unit_k, DT, PRECISION)
