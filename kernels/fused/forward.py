"""The local memory's forward: one program per (segment, head) walks the chunks of its segment with the state on chip.

A segment is the part of a sequence between two resets. Weights, momentum and the Q-K projection M stay in registers in
float32; q, k, v are read once and o is written once.
"""

import triton
import triton.language as tl

from .coefficients import tile_coefficients
from .math import gelu_sigmoid, normalise
from .tile import (
    advance_layer,
    inner_gradients,
    load_matrix,
    load_rows,
    load_scalars,
    load_state,
    project,
    read_layer,
    select_state,
    store_matrix,
    store_rows,
    store_state,
)


@triton.jit
def forward_kernel(
    q, k, v,  # [tokens, H, D]
    lr, momentum, decay,  # [tokens, H] float32; the last two or None
    scale,  # [C] float32, the token scale, or None
    norm_weight, norm_bias,  # [H, D] float32, or None
    segments,  # [S, 5] int64: first token, tokens, the first one's place in its chunk, row of the start, end row or -1
    start_weights, start_anchor,  # [rows, H, P] float32; the anchor or None (then it is the weights)
    start_momentum,  # [rows, H, P] float32, or None
    start_projection,  # [rows, H, D, D] float32, or None
    o,  # [tokens, H, D]
    end_weights, end_anchor,  # [ends, H, P] float32
    end_momentum,  # [ends, H, P] float32, or None
    end_projection,  # [ends, H, D, D] float32, or None
    kept_weights, kept_momentum,  # [groups - 1, S, H, P] float32: states before each group of chunks but the first
    kept_projection,  # [groups - 1, S, H, D, D] float32
    S,  # number of segments
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, NORM: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
    PROJECT: tl.constexpr, PER_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr,
    MULTI: tl.constexpr, INTERVAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module. P: entries of a packed state; R: rows of a tile; MULTI: a tile's anchor may not be the current
    state, since chunks have several tiles or begin in an earlier call; INTERVAL: chunks of a group, 0 to keep nothing.
    """
    DT: tl.constexpr = q.dtype.element_ty
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

    w1, b1, w2, b2 = load_state(start_weights + source * P, D, M, MLP, HAS_B1, HAS_B2)
    sw1, sb1, sw2, sb2 = 0.0, 0.0, 0.0, 0.0
    if MULTI:
        aw1, ab1, aw2, ab2 = load_state(start_anchor + source * P, D, M, MLP, HAS_B1, HAS_B2)
    if MOMENTUM:
        sw1, sb1, sw2, sb2 = load_state(start_momentum + source * P, D, M, MLP, HAS_B1, HAS_B2)
    if PROJECT:
        m = load_matrix(start_projection + source * D * D, D, D)
    norm_w, norm_b = 0.0, 0.0
    if NORM:
        norm_w = load_matrix(norm_weight + head * D, 1, D)
        norm_b = load_matrix(norm_bias + head * D, 1, D)

    chunks = tl.cdiv(offset + count, C)
    for chunk in range(0, chunks):
        fresh = (chunk > 0) | (offset == 0)  # false only where an earlier call began the chunk
        complete = (chunk + 1) * C <= offset + count
        if PER_CHUNK:
            m = tl.where(fresh, 0.0, m)
        if MULTI:
            aw1, ab1, aw2, ab2 = select_state(fresh, w1, b1, w2, b2, aw1, ab1, aw2, ab2, MLP, HAS_B1, HAS_B2)
        else:
            aw1, ab1, aw2, ab2 = w1, b1, w2, b2
        if (end >= 0) & (complete == 0):
            store_state(end_anchor + (end * H + head) * P, aw1, ab1, aw2, ab2, D, M, MLP, HAS_B1, HAS_B2)
        if INTERVAL > 0:
            if (chunk > 0) & (chunk % INTERVAL == 0):
                slot = ((chunk // INTERVAL - 1) * S + segment) * H + head
                store_state(kept_weights + slot * P, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2)
                if MOMENTUM:
                    store_state(kept_momentum + slot * P, sw1, sb1, sw2, sb2, D, M, MLP, HAS_B1, HAS_B2)
                if PROJECT:
                    store_matrix(kept_projection + slot * D * D, m, D, D)
        for tile in range(0, TILES):
            place = tile * R + tl.arange(0, R)
            inside = chunk * C + place - offset
            valid = (place < C) & (inside >= 0) & (inside < count)
            token = first + inside
            kt = load_rows(k, token, head, valid, H, D)
            vt = load_rows(v, token, head, valid, H, D)
            x = load_rows(q, token, head, valid, H, D)
            step = load_scalars(lr, token, head, valid, 0.0, H)
            (
                theta, read_decay, read_second, gain, end_decay, end_second, momentum_gain, momentum_decay,
                _, _, _, _, _, _,
            ) = tile_coefficients(
                momentum, decay, scale, token, place, valid, head, complete & (tile == TILES - 1),
                H, C, R, MOMENTUM, DECAY, SCALE,
            )  # fmt: skip
            if PROJECT:
                x, m = project(x, kt, m, NORMALIZE, DT, PRECISION)
            _, _, a, _, _, _, _, delta1, delta2 = inner_gradients(
                kt, vt, step, aw1, ab1, aw2, ab2, norm_w, norm_b, MLP, NORM, DT, PRECISION
            )
            if SCALE and MULTI:
                xw1, xb1, xw2, xb2 = aw1, ab1, aw2, ab2
            else:
                xw1, xb1, xw2, xb2 = sw1, sb1, sw2, sb2
            y, _ = read_layer(
                x, kt, delta1, w1, b1, xw1, xb1, theta, read_decay, read_second, HAS_B1, SCALED, SECOND, DT, PRECISION
            )
            if MLP:
                h = y * gelu_sigmoid(y)
                y, _ = read_layer(
                    h, a, delta2, w2, b2, xw2, xb2, theta, read_decay, read_second,
                    HAS_B2, SCALED, SECOND, DT, PRECISION,
                )  # fmt: skip
            if NORM:
                n, _ = normalise(y)
                y = x.to(tl.float32) + n * norm_w + norm_b
            store_rows(o, y, token, head, valid, H, D)
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

    if end >= 0:
        end = end * H + head
        store_state(end_weights + end * P, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2)
        complete = (offset + count) % C == 0
        if complete:
            store_state(end_anchor + end * P, w1, b1, w2, b2, D, M, MLP, HAS_B1, HAS_B2)
        if MOMENTUM:
            store_state(end_momentum + end * P, sw1, sb1, sw2, sb2, D, M, MLP, HAS_B1, HAS_B2)
        if PROJECT:
            if PER_CHUNK:
                m = tl.where(complete, 0.0, m)
            store_matrix(end_projection + end * D * D, m, D, D)
