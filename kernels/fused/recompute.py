"""The first half of the local memory's backward: run a group of chunks again, from the state kept before it, and write
what the second half (backward.py) reads: the state before every tile, the anchors, and the projected queries.

The same helpers as in forward.py without the reads, in the dtype of the inputs, since all of it is only ever an operand
of products.
"""

import triton
import triton.language as tl

from .coefficients import tile_coefficients
from .tile import (
    advance_layer,
    inner_gradients,
    load_matrix,
    load_rows,
    load_scalars,
    load_state,
    project,
    select_state,
    store_rows,
    store_state,
)


@triton.jit
def recompute_kernel(
    q, k, v,  # [tokens, H, D]
    lr, momentum, decay,  # [tokens, H] float32; the last two or None
    scale,  # [C] float32, or None
    norm_weight, norm_bias,  # [H, D] float32, or None
    segments,  # [S, 5] int64, see forward.py
    start_weights, start_anchor, start_momentum,  # [rows, H, P] float32: start of the segments, or before the group
    start_projection,  # [rows, H, D, D] float32, or None
    trace_x,  # [tokens, H, D], or None without projection
    trace_weights, trace_momentum,  # [INTERVAL * tiles, S, H, P]
    trace_anchor,  # [INTERVAL, S, H, P], or None unless MULTI
    group,  # which chunks: INTERVAL ones from group * INTERVAL on
    S,  # number of segments
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, NORM: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
    PROJECT: tl.constexpr, PER_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr,
    MULTI: tl.constexpr, INTERVAL: tl.constexpr, FROM_KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module, and forward.py for the sizes. FROM_KEPT: row s of the start belongs to segment s, in mid-segment."""
    DT: tl.constexpr = q.dtype.element_ty
    TILES: tl.constexpr = (C + R - 1) // R
    SCALED: tl.constexpr = DECAY or (SCALE and MULTI)
    SECOND: tl.constexpr = MOMENTUM or (SCALE and MULTI)
    segment = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(segments + segment * 5)
    count = tl.load(segments + segment * 5 + 1)
    offset = tl.load(segments + segment * 5 + 2)
    chunks = tl.minimum(tl.cdiv(offset + count, C), (group + 1) * INTERVAL)
    if chunks <= group * INTERVAL:
        return
    if FROM_KEPT:
        source = segment * H + head
    else:
        source = tl.load(segments + segment * 5 + 3) * H + head

    w1, b1, w2, b2 = load_state(start_weights + source * P, D, M, MLP, HAS_B1, HAS_B2)
    sw1, sb1, sw2, sb2 = 0.0, 0.0, 0.0, 0.0
    if MULTI:
        aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        if not FROM_KEPT:
            aw1, ab1, aw2, ab2 = load_state(start_anchor + source * P, D, M, MLP, HAS_B1, HAS_B2)
    if MOMENTUM:
        sw1, sb1, sw2, sb2 = load_state(start_momentum + source * P, D, M, MLP, HAS_B1, HAS_B2)
    if PROJECT:
        m = load_matrix(start_projection + source * D * D, D, D)
    norm_w, norm_b = 0.0, 0.0
    if NORM:
        norm_w = load_matrix(norm_weight + head * D, 1, D)
        norm_b = load_matrix(norm_bias + head * D, 1, D)

    for chunk in range(group * INTERVAL, chunks):
        fresh = (chunk > 0) | (offset == 0)
        complete = (chunk + 1) * C <= offset + count
        if PER_CHUNK:
            m = tl.where(fresh, 0.0, m)
        if MULTI:
            aw1, ab1, aw2, ab2 = select_state(fresh, w1, b1, w2, b2, aw1, ab1, aw2, ab2, MLP, HAS_B1, HAS_B2)
            anchor = ((chunk - group * INTERVAL) * S + segment) * H + head
            store_state(trace_anchor + anchor * P, aw1, ab1, aw2, ab2, D, M, MLP, HAS_B1, HAS_B2)
        else:
            aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        for tile in range(0, TILES):
            place = tile * R + tl.arange(0, R)
            inside = chunk * C + place - offset
            valid = (place < C) & (inside >= 0) & (inside < count)
            token = first + inside
            slot = (((chunk - group * INTERVAL) * TILES + tile) * S + segment) * H + head
            store_state(trace_weights + slot * P, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2)
            if MOMENTUM:
                store_state(trace_momentum + slot * P, sw1, sb1, sw2, sb2, D, M, MLP, HAS_B1, HAS_B2)
            kt = load_rows(k, token, head, valid, H, D)
            vt = load_rows(v, token, head, valid, H, D)
            step = load_scalars(lr, token, head, valid, 0.0, H)
            if PROJECT:
                qt = load_rows(q, token, head, valid, H, D)
                x, m = project(qt, kt, m, NORMALIZE, DT, PRECISION)
                store_rows(trace_x, x, token, head, valid, H, D)
            (
                _, _, _, gain, end_decay, end_second, momentum_gain, momentum_decay, _, _, _, _, _, _,
            ) = tile_coefficients(
                momentum, decay, scale, token, place, valid, head, complete & (tile == TILES - 1),
                H, C, R, MOMENTUM, DECAY, SCALE,
            )  # fmt: skip
            _, _, a, _, _, _, _, delta1, delta2 = inner_gradients(
                kt, vt, step, aw1, ab1, aw2, ab2, norm_w, norm_b, MLP, NORM, DT, PRECISION
            )
            if SCALE and MULTI:
                xw1, xb1, xw2, xb2 = aw1, ab1, aw2, ab2
            else:
                xw1, xb1, xw2, xb2 = sw1, sb1, sw2, sb2
            w1, b1, xw1, xb1 = advance_layer(
                w1, b1, xw1, xb1, kt, delta1, gain, end_decay, end_second, momentum_gain, momentum_decay,
                HAS_B1, SCALED, SECOND, MOMENTUM, DT, PRECISION,
            )  # fmt: skip
            if MLP:
                w2, b2, xw2, xb2 = advance_layer(
                    w2, b2, xw2, xb2, a, delta2, gain, end_decay, end_second, momentum_gain, momentum_decay,
                    HAS_B2, SCALED, SECOND, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            if MOMENTUM:
                sw1, sb1, sw2, sb2 = xw1, xb1, xw2, xb2
