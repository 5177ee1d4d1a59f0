"""The Q-K projection's backward, second half: k̄ and the start's M̄, walking backward with M̄ on chip.

With unit keys, K̄ = tril(Q Kᵀ)ᵀ X̄ + tril(X̄ Kᵀ)ᵀ Q + K (M̄_end + M̄_endᵀ) and M̄ = M̄_end + Qᵀ X̄.
"""

import triton
import triton.language as tl

from .coefficients import causal
from .math import unit, unit_backward
from .tile import (
    add_dot,
    dot,
    gradient_operand,
    load_matrix,
    load_tokens,
    store_matrix,
    store_tokens,
    tokens_of_tile,
    transposed,
)


@triton.jit
def projection_keys_kernel(
    q, k,  # [tokens, H, D]
    segments,  # [S, 5] int64, see forward.py
    grad_x,  # [tokens, H, D]: the gradient of what was not yet normalised
    grad_k,  # [tokens, H, D], added to
    grad_projection,  # [S, H, D, D] float32: in, of M after the segment; out, of M before it
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PER_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
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
    own = (segment * H + head) * D * D
    grad_m = load_matrix(grad_projection + own, D, D)
    if PER_CHUNK:  # M is empty again after a chunk's last token
        grad_m = tl.where((offset + count) % C == 0, 0.0, grad_m)
    in_order = causal(R)

    chunks = tl.cdiv(offset + count, C)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        origin = first + chunk * C - offset
        for tile_back in range(0, TILES):
            place, valid = tokens_of_tile(chunk, TILES - 1 - tile_back, offset, count, C, R)
            query = load_tokens(q, origin, place, head, valid, H, D)
            grad = load_tokens(grad_x, origin, place, head, valid, H, D)
            unit_k, factor = unit(load_tokens(k, origin, place, head, valid, H, D).to(tl.float32))
            unit_kt = transposed(unit_k, DT)
            p = dot(query, unit_kt, DT, PRECISION) * in_order
            r = dot(grad, unit_kt, GT, PRECISION) * in_order
            grad_unit = dot(unit_k, grad_m + tl.trans(grad_m), GT, PRECISION)
            grad_unit = add_dot(grad_unit, transposed(p, GT), grad, GT, PRECISION)
            grad_unit = add_dot(grad_unit, transposed(r, GT), query, GT, PRECISION)
            earlier = load_tokens(grad_k, origin, place, head, valid, H, D).to(tl.float32)
            total = earlier + unit_backward(unit_k, factor, grad_unit)
            store_tokens(grad_k, total, origin, place, head, valid, H, D)
            grad_m = add_dot(grad_m, transposed(query, GT), grad, GT, PRECISION)
        if PER_CHUNK:
            grad_m = tl.where((chunk > 0) | (offset == 0), 0.0, grad_m)
    store_matrix(grad_projection + own, grad_m, D, D)
