"""The first half of the local memory's backward: run a group of chunks again, from the state kept before it, and write
the states that the second half (backward.py) reads: before every tile, and the anchors.

The same steps as in forward.py without the reads. Matrices are only ever operands of products from here on, so they are
written in the dtype of operands; biases are added to results and stay in float32.
"""

import triton
import triton.language as tl

from .coefficients import end_coefficients
from .math import gelu_sigmoid
from .tile import (
    advance_layer,
    load_matrix,
    load_scalars,
    load_state,
    load_tokens,
    select_state,
    store_trace,
    times,
    tokens_of_tile,
)
from .tile_keys import hidden_delta, inner_error


@triton.jit(do_not_specialize=["group", "interval", "S"])
def recompute_kernel(
    k, v,  # [tokens, H, D]
    lr, momentum, decay,  # [tokens, H] float32; the last two or None
    scale,  # [C] float32, or None
    norm_weight, norm_bias,  # [H, D] float32, or None
    segments,  # [S, 5] int64, see forward.py
    start_weights, start_anchor, start_momentum,  # [rows, H, P] float32: start of the segments, or before the group
    # Written, as pairs: matrices [.., S, H, (2) D M] in the dtype of k, biases [.., S, H, rest of P] float32 or None
    trace_weights, trace_momentum,  # [interval * tiles, …]; momentum or None
    trace_anchor,  # [interval, …], or None unless MULTI
    group, interval,  # which chunks: `interval` ones from group * interval on
    S,  # number of segments
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, NORM: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
    MULTI: tl.constexpr, FROM_KEPT: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module, and forward.py for the sizes. FROM_KEPT: row s of the start is of segment s, in its middle."""
    DT: tl.constexpr = k.dtype.element_ty
    TILES: tl.constexpr = (C + R - 1) // R
    SCALED: tl.constexpr = DECAY or (SCALE and MULTI)
    SECOND: tl.constexpr = MOMENTUM or (SCALE and MULTI)
    segment = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(segments + segment * 5)
    count = tl.load(segments + segment * 5 + 1)
    offset = tl.load(segments + segment * 5 + 2)
    begin = group * interval
    chunks = tl.minimum(tl.cdiv(offset + count, C), begin + interval)
    if chunks <= begin:
        return
    if FROM_KEPT:
        source = segment * H + head
    else:
        source = tl.load(segments + segment * 5 + 3) * H + head

    w1, b1, w2, b2 = load_state(start_weights + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    sw1, sb1, sw2, sb2 = 0.0, 0.0, 0.0, 0.0
    if MULTI:
        aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        if not FROM_KEPT:
            aw1, ab1, aw2, ab2 = load_state(start_anchor + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    if MOMENTUM:
        sw1, sb1, sw2, sb2 = load_state(start_momentum + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    norm_w, norm_b = 0.0, 0.0
    if NORM:
        norm_w = load_matrix(norm_weight + head * D, 1, D)
        norm_b = load_matrix(norm_bias + head * D, 1, D)

    for chunk in range(begin, chunks):
        fresh = (chunk > 0) | (offset == 0)
        complete = (chunk + 1) * C <= offset + count
        origin = first + chunk * C - offset
        if MULTI:
            aw1, ab1, aw2, ab2 = select_state(fresh, w1, b1, w2, b2, aw1, ab1, aw2, ab2, MLP, HAS_B1, HAS_B2)
            row = ((chunk - begin) * S + segment) * H + head
            store_trace(trace_anchor[0], trace_anchor[1], row, aw1, ab1, aw2, ab2, D, M, P, MLP, HAS_B1, HAS_B2, TALL)
        else:
            aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        for tile in range(0, TILES):
            place, valid = tokens_of_tile(chunk, tile, offset, count, C, R)
            row = (((chunk - begin) * TILES + tile) * S + segment) * H + head
            store_trace(trace_weights[0], trace_weights[1], row, w1, b1, w2, b2, D, M, P, MLP, HAS_B1, HAS_B2, TALL)
            if MOMENTUM:
                store_trace(
                    trace_momentum[0], trace_momentum[1], row, sw1, sb1, sw2, sb2, D, M, P, MLP, HAS_B1, HAS_B2, TALL
                )
            kt = load_tokens(k, origin, place, head, valid, H, D)
            vt = load_tokens(v, origin, place, head, valid, H, D)
            step = load_scalars(lr, origin, place, head, valid, 0.0, H)
            gain, end_decay, end_second, momentum_gain, momentum_decay = end_coefficients(
                momentum, decay, scale, origin, place, valid, head, complete & (tile == TILES - 1),
                H, C, R, MOMENTUM, DECAY, SCALE,
            )  # fmt: skip
            if SCALE and MULTI:
                xw1, xb1, xw2, xb2 = aw1, ab1, aw2, ab2
            else:
                xw1, xb1, xw2, xb2 = sw1, sb1, sw2, sb2
            z1 = times(kt, aw1, TALL, DT, PRECISION) + ab1
            if MLP:
                s1 = gelu_sigmoid(z1)
                a = (z1 * s1).to(DT)
                z2 = times(a, aw2, not TALL, DT, PRECISION) + ab2
                _, _, _, delta2 = inner_error(z2, kt, vt, step, norm_w, norm_b, NORM)
                delta1 = hidden_delta(times(delta2, aw2, TALL, DT, PRECISION), z1, s1)
                w2, b2, xw2, xb2 = advance_layer(
                    w2, b2, xw2, xb2, a, delta2, gain, end_decay, end_second, momentum_gain, momentum_decay,
                    not TALL, HAS_B2, SCALED, SECOND, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            else:
                _, _, _, delta1 = inner_error(z1, kt, vt, step, norm_w, norm_b, NORM)
            w1, b1, xw1, xb1 = advance_layer(
                w1, b1, xw1, xb1, kt, delta1, gain, end_decay, end_second, momentum_gain, momentum_decay,
                TALL, HAS_B1, SCALED, SECOND, MOMENTUM, DT, PRECISION,
            )  # fmt: skip
            if MOMENTUM:
                sw1, sb1, sw2, sb2 = xw1, xb1, xw2, xb2
