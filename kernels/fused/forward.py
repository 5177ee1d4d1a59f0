"""The local memory's forward: one program per (segment, head) walks the chunks of its segment with the state on chip.

A segment is the part of a sequence between two resets. Weights and momentum stay in registers in float32; the
(projected) queries x, k, v are read once and o is written once.
"""

import triton
import triton.language as tl

from .coefficients import tile_coefficients
from .math import gelu_sigmoid, normalise
from .tile import (
    advance_layer,
    affinity,
    load_matrix,
    load_scalars,
    load_state,
    load_tokens,
    read_layer,
    select_state,
    store_state,
    store_tokens,
    times,
    tokens_of_tile,
)
from .tile_keys import hidden_delta, inner_error


@triton.jit(do_not_specialize=["interval", "S"])
def forward_kernel(
    x, k, v,  # [tokens, H, D]
    lr, momentum, decay,  # [tokens, H] float32; the last two or None
    scale,  # [C] float32, the token scale, or None
    norm_weight, norm_bias,  # [H, D] float32, or None
    segments,  # [S, 5] int64: first token, tokens, the first one's place in its chunk, row of the start, end row or -1
    start_weights, start_anchor,  # [rows, H, P] float32; the anchor or None (then it is the weights)
    start_momentum,  # [rows, H, P] float32, or None
    o,  # [tokens, H, D], written
    end_weights, end_anchor,  # [ends, H, P] float32, written
    end_momentum,  # [ends, H, P] float32, written, or None
    kept_weights, kept_momentum,  # [groups - 1, S, H, P] float32, written: states before each group but the first
    interval,  # chunks of a group
    S,  # number of segments
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, NORM: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
    MULTI: tl.constexpr, KEEP: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. P: entries of a packed state; R: tokens of a tile; MULTI: a tile's anchor may not be the current
    state, since chunks have several tiles or begin in an earlier call; KEEP: whether states are kept for a backward.
    """
    DT: tl.constexpr = k.dtype.element_ty
    TILES: tl.constexpr = (C + R - 1) // R
    SCALED: tl.constexpr = DECAY or (SCALE and MULTI)
    SECOND: tl.constexpr = MOMENTUM or (SCALE and MULTI)
    segment = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(segments + segment * 5)
    count = tl.load(segments + segment * 5 + 1)
    offset = tl.load(segments + segment * 5 + 2)
    source = tl.load(segments + segment * 5 + 3) * H + head
    end = tl.load(segments + segment * 5 + 4)

    w1, b1, w2, b2 = load_state(start_weights + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    sw1, sb1, sw2, sb2 = 0.0, 0.0, 0.0, 0.0
    if MULTI:
        aw1, ab1, aw2, ab2 = load_state(start_anchor + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    if MOMENTUM:
        sw1, sb1, sw2, sb2 = load_state(start_momentum + source * P, D, M, MLP, HAS_B1, HAS_B2, TALL)
    norm_w, norm_b = 0.0, 0.0
    if NORM:
        norm_w = load_matrix(norm_weight + head * D, 1, D)
        norm_b = load_matrix(norm_bias + head * D, 1, D)

    for chunk in range(0, tl.cdiv(offset + count, C)):
        fresh = (chunk > 0) | (offset == 0)  # false only where an earlier call began the chunk
        complete = (chunk + 1) * C <= offset + count
        origin = first + chunk * C - offset
        if MULTI:
            aw1, ab1, aw2, ab2 = select_state(fresh, w1, b1, w2, b2, aw1, ab1, aw2, ab2, MLP, HAS_B1, HAS_B2)
        else:
            aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        if (end >= 0) & (complete == 0):
            store_state(end_anchor + (end * H + head) * P, aw1, ab1, aw2, ab2, D, M, MLP, HAS_B1, HAS_B2, TALL)
        if KEEP:
            if (chunk > 0) & (chunk % interval == 0):
                slot = (((chunk // interval - 1) * S + segment) * H + head) * P
                store_state(kept_weights + slot, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2, TALL)
                if MOMENTUM:
                    store_state(kept_momentum + slot, sw1, sb1, sw2, sb2, D, M, MLP, HAS_B1, HAS_B2, TALL)
        for tile in range(0, TILES):
            place, valid = tokens_of_tile(chunk, tile, offset, count, C, R)
            kt = load_tokens(k, origin, place, head, valid, H, D)
            xt = load_tokens(x, origin, place, head, valid, H, D)
            vt = load_tokens(v, origin, place, head, valid, H, D)
            step = load_scalars(lr, origin, place, head, valid, 0.0, H)
            (
                theta, read_decay, read_second, gain, end_decay, end_second, momentum_gain, momentum_decay,
                _, _, _, _, _, _,
            ) = tile_coefficients(
                momentum, decay, scale, origin, place, valid, head, complete & (tile == TILES - 1),
                H, C, R, MOMENTUM, DECAY, SCALE,
            )  # fmt: skip
            if SCALE and MULTI:  # reads also depend on the anchor, otherwise on the momentum, if anything
                xw1, xb1, xw2, xb2 = aw1, ab1, aw2, ab2
            else:
                xw1, xb1, xw2, xb2 = sw1, sb1, sw2, sb2

            # Both layers at the keys, the first one also at the reads.
            z1 = times(kt, aw1, TALL, DT, PRECISION) + ab1
            y = times(xt, w1, TALL, DT, PRECISION) + b1
            s_read = 0.0
            if SECOND:
                s_read = times(xt, xw1, TALL, DT, PRECISION) + xb1
            if MLP:
                s1 = gelu_sigmoid(z1)
                a = (z1 * s1).to(DT)
                z2 = times(a, aw2, not TALL, DT, PRECISION) + ab2
                _, _, _, delta2 = inner_error(z2, kt, vt, step, norm_w, norm_b, NORM)
                delta1 = hidden_delta(times(delta2, aw2, TALL, DT, PRECISION), z1, s1)
            else:
                _, _, _, delta1 = inner_error(z1, kt, vt, step, norm_w, norm_b, NORM)

            # The reads, and each layer's step once it has been read.
            p = affinity(xt, kt, HAS_B1, DT, PRECISION)
            y = read_layer(y, s_read, p, delta1, theta, read_decay, read_second, SCALED, SECOND, DT, PRECISION)
            w1, b1, xw1, xb1 = advance_layer(
                w1, b1, xw1, xb1, kt, delta1, gain, end_decay, end_second, momentum_gain, momentum_decay,
                TALL, HAS_B1, SCALED, SECOND, MOMENTUM, DT, PRECISION,
            )  # fmt: skip
            if MLP:
                h = (y * gelu_sigmoid(y)).to(DT)
                y = times(h, w2, not TALL, DT, PRECISION) + b2
                if SECOND:
                    s_read = times(h, xw2, not TALL, DT, PRECISION) + xb2
                p = affinity(h, a, HAS_B2, DT, PRECISION)
                y = read_layer(y, s_read, p, delta2, theta, read_decay, read_second, SCALED, SECOND, DT, PRECISION)
                w2, b2, xw2, xb2 = advance_layer(
                    w2, b2, xw2, xb2, a, delta2, gain, end_decay, end_second, momentum_gain, momentum_decay,
                    not TALL, HAS_B2, SCALED, SECOND, MOMENTUM, DT, PRECISION,
                )  # fmt: skip
            if MOMENTUM:
                sw1, sb1, sw2, sb2 = xw1, xb1, xw2, xb2
            if NORM:
                n, _ = normalise(y)
                y = xt.to(tl.float32) + n * norm_w + norm_b
            store_tokens(o, y, origin, place, head, valid, H, D)

    if end >= 0:
        end = (end * H + head) * P
        store_state(end_weights + end, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2, TALL)
        if (offset + count) % C == 0:
            store_state(end_anchor + end, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2, TALL)
        if MOMENTUM:
            store_state(end_momentum + end, sw1, sb1, sw2, sb2, D, M, MLP, HAS_B1, HAS_B2, TALL)
