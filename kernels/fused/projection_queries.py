"""The Q-K projection's backward, first half: from x̄ of x_t = q_t M_t to q̄, walking forward with M on chip.

With unit keys, Q̄ = X̄ Mᵀ + tril(X̄ Kᵀ) K. A normalised projection is computed again, and x̄ is replaced by the gradient
of what was normalised, which the second half (projection_keys.py) needs.
"""

import triton
import triton.language as tl

from .coefficients import causal
from .math import unit, unit_backward
from .projection import project
from .tile import add_dot, dot, gradient_operand, load_matrix, load_tokens, store_tokens, tokens_of_tile, transposed


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
    """C: tokens between resets of M with PER_CHUNK, otherwise R; R: tokens of a tile."""
    DT: tl.constexpr = q.dtype.element_ty
    GT: tl.constexpr = gradient_operand(DT)
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
            unit_k, _ = unit(load_tokens(k, origin, place, head, valid, H, D).to(tl.float32))
            grad = load_tokens(grad_x, origin, place, head, valid, H, D).to(tl.float32)
            if NORMALIZE:
                query = load_tokens(q, origin, place, head, valid, H, D)
                unit_x, factor = unit(project(query, unit_k, m, in_order, DT, PRECISION))
                grad = unit_backward(unit_x, factor, grad)
                store_tokens(grad_x, grad, origin, place, head, valid, H, D)
            r = dot(grad, transposed(unit_k, GT), GT, PRECISION) * in_order
            grad = add_dot(dot(grad, transposed(m, GT), GT, PRECISION), r, unit_k, GT, PRECISION)
            store_tokens(grad_q, grad, origin, place, head, valid, H, D)
            m = add_dot(m, transposed(unit_k, DT), unit_k, DT, PRECISION)
