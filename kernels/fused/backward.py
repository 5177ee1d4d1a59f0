"""The local memory's backward over a group of chunks: one program per (segment, head) walks them from last to first.

The states before its tiles were written by recompute.py. The gradient of the state stays in registers, float32, and is
carried from group to group in memory. The projection has a backward of its own (projection_queries.py and
projection_keys.py), since it does not depend on the memory and would only take registers here: this kernel ends at the
gradient of the projected query.
"""

import triton
import triton.language as tl

from .coefficients import causal, gate_coefficients_backward, tile_coefficients
from .math import gelu_sigmoid, gelu_slope, normalise, normalise_backward
from .tile import (
    add_outer,
    add_times,
    affinity,
    gradient_operand,
    load_matrix,
    load_scalars,
    load_state,
    load_tokens,
    load_trace,
    read_layer,
    select_state,
    store_matrix,
    store_scalars,
    store_state,
    store_tokens,
    times,
    token_sum,
    tokens_of_tile,
)
from .tile_backward import (
    advance_backward,
    advance_input_backward,
    error_backward,
    hidden_backward,
    read_backward,
)
from .tile_keys import hidden_delta, inner_error


@triton.jit
def add_state(w1, b1, w2, b2, ow1, ob1, ow2, ob2, MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr):
    """The sum of two states."""
    w1 += ow1
    if HAS_B1:
        b1 += ob1
    if MLP:
        w2 += ow2
    if HAS_B2:
        b2 += ob2
    return w1, b1, w2, b2


@triton.jit(do_not_specialize=["group", "interval", "S"])
def backward_kernel(
    x, k, v,  # [tokens, H, D]: projected queries, keys, values
    lr, momentum, decay,  # [tokens, H] float32; the last two or None
    scale,  # [C] float32, or None
    norm_weight, norm_bias,  # [H, D] float32, or None
    segments,  # [S, 5] int64, see forward.py
    trace_weights, trace_momentum,  # pairs [interval * tiles, S, H, …], see recompute.py: states before the tiles
    trace_anchor,  # a pair [interval, S, H, …], or None unless MULTI
    grad_o,  # [tokens, H, D]
    grad_x, grad_k, grad_v,  # [tokens, H, D], written
    grad_lr, grad_momentum, grad_decay,  # [tokens, H] float32, written; the last two or None
    grad_scale,  # [S, H, C] float32, accumulated, or None
    grad_norm,  # [S, H, D] float32, accumulated: the norm's weight; or None
    grad_weights,  # [S, H, P] float32: in, of the state after the group; out, of the one before it
    grad_anchor,  # [S, H, P] float32: in, of the anchor after the segment; out (MULTI, group 0), of the one before it
    grad_momentum_state,  # [S, H, P] float32, like grad_weights; or None
    group, interval,  # which chunks: `interval` ones from group * interval on
    S,  # number of segments
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    MLP: tl.constexpr, HAS_B1: tl.constexpr, HAS_B2: tl.constexpr, NORM: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALE: tl.constexpr,
    MULTI: tl.constexpr, TALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module, and forward.py for the sizes."""
    DT: tl.constexpr = k.dtype.element_ty
    GT: tl.constexpr = gradient_operand(DT)
    TILES: tl.constexpr = (C + R - 1) // R
    SCALED: tl.constexpr = DECAY or (SCALE and MULTI)
    SECOND: tl.constexpr = MOMENTUM or (SCALE and MULTI)
    GATED: tl.constexpr = MOMENTUM or DECAY or SCALE
    segment = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(segments + segment * 5)
    count = tl.load(segments + segment * 5 + 1)
    offset = tl.load(segments + segment * 5 + 2)
    all_chunks = tl.cdiv(offset + count, C)
    begin = group * interval
    chunks = tl.minimum(all_chunks, begin + interval)
    if (chunks <= begin) & (group > 0):
        return
    own = (segment * H + head) * P

    gw1, gb1, gw2, gb2 = load_state(grad_weights + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
    gs1, gsb1, gs2, gsb2 = 0.0, 0.0, 0.0, 0.0
    if MOMENTUM:
        gs1, gsb1, gs2, gsb2 = load_state(grad_momentum_state + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
    if MULTI:
        ga1, gab1, ga2, gab2 = load_state(grad_anchor + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
    norm_w, norm_b, norm_grad = 0.0, 0.0, 0.0
    if NORM:
        norm_w = load_matrix(norm_weight + head * D, 1, D)
        norm_b = load_matrix(norm_bias + head * D, 1, D)
        norm_grad = load_matrix(grad_norm + (segment * H + head) * D, 1, D)

    for back in range(0, chunks - begin):
        chunk = chunks - 1 - back
        fresh = (chunk > 0) | (offset == 0)
        origin = first + chunk * C - offset
        complete = (chunk + 1) * C <= offset + count
        is_end = chunk == all_chunks - 1
        # After a chunk's last token the anchor is the weights; in mid-chunk it is this chunk's anchor.
        if MULTI:
            if is_end & complete:
                gw1, gb1, gw2, gb2 = add_state(gw1, gb1, gw2, gb2, ga1, gab1, ga2, gab2, MLP, HAS_B1, HAS_B2)
            ga1, gab1, ga2, gab2 = select_state(
                is_end & (complete == 0), ga1, gab1, ga2, gab2, 0.0, 0.0, 0.0, 0.0, MLP, HAS_B1, HAS_B2
            )
        else:
            if is_end & complete:
                e1, eb1, e2, eb2 = load_state(grad_anchor + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
                gw1, gb1, gw2, gb2 = add_state(gw1, gb1, gw2, gb2, e1, eb1, e2, eb2, MLP, HAS_B1, HAS_B2)
        for tile_back in range(0, TILES):
            tile = TILES - 1 - tile_back
            place, valid = tokens_of_tile(chunk, tile, offset, count, C, R)
            row = (((chunk - begin) * TILES + tile) * S + segment) * H + head
            w1, b1, w2, b2 = load_trace(trace_weights[0], trace_weights[1], row, D, M, P, MLP, HAS_B1, HAS_B2, TALL)
            if MULTI:
                row_anchor = ((chunk - begin) * S + segment) * H + head
                aw1, ab1, aw2, ab2 = load_trace(
                    trace_anchor[0], trace_anchor[1], row_anchor, D, M, P, MLP, HAS_B1, HAS_B2, TALL
                )
            else:
                aw1, ab1, aw2, ab2 = w1, b1, w2, b2
            # What reads also depend on, and its gradient: the momentum, or the anchor under a token scale.
            xw1, xb1, xw2, xb2 = 0.0, 0.0, 0.0, 0.0
            gx1, gxb1, gx2, gxb2 = 0.0, 0.0, 0.0, 0.0
            if MOMENTUM:
                xw1, xb1, xw2, xb2 = load_trace(
                    trace_momentum[0], trace_momentum[1], row, D, M, P, MLP, HAS_B1, HAS_B2, TALL
                )
                gx1, gxb1, gx2, gxb2 = gs1, gsb1, gs2, gsb2
            if SCALE and MULTI:
                xw1, xb1, xw2, xb2 = aw1, ab1, aw2, ab2
                gx1, gxb1, gx2, gxb2 = ga1, gab1, ga2, gab2

            # The forward once more. Products with a common operand stand side by side, also those with the gradients of
            # the state after the tile: t = a W̄ + b̄ of each layer.
            kt = load_tokens(k, origin, place, head, valid, H, D)
            xt = load_tokens(x, origin, place, head, valid, H, D)
            vt = load_tokens(v, origin, place, head, valid, H, D)
            step = load_scalars(lr, origin, place, head, valid, 0.0, H)
            (
                theta, read_decay, read_second, gain, end_decay, end_second, momentum_gain, momentum_decay,
                m, keep, column, kept, carried, from_start,
            ) = tile_coefficients(
                momentum, decay, scale, origin, place, valid, head, complete & (tile == TILES - 1),
                H, C, R, MOMENTUM, DECAY, SCALE,
            )  # fmt: skip
            z1 = times(kt, aw1, TALL, DT, PRECISION) + ab1
            t1 = times(kt, gw1, TALL, GT, PRECISION) + gb1
            base1 = times(xt, w1, TALL, DT, PRECISION) + b1
            ts1, ts2, s_read1, s_read2 = 0.0, 0.0, 0.0, 0.0
            if MOMENTUM:
                ts1 = times(kt, gs1, TALL, GT, PRECISION) + gsb1
            if SECOND:
                s_read1 = times(xt, xw1, TALL, DT, PRECISION) + xb1
            if MLP:
                s1 = gelu_sigmoid(z1)
                a = (z1 * s1).to(DT)
                z2 = times(a, aw2, not TALL, DT, PRECISION) + ab2
                t2 = times(a, gw2, not TALL, GT, PRECISION) + gb2
                if MOMENTUM:
                    ts2 = times(a, gs2, not TALL, GT, PRECISION) + gsb2
                n, rstd, error, delta2 = inner_error(z2, kt, vt, step, norm_w, norm_b, NORM)
                u = times(delta2, aw2, TALL, DT, PRECISION)
                grad_a = advance_input_backward(
                    delta2, gw2, gs2, gain, momentum_gain, not TALL, MOMENTUM, GT, PRECISION
                )
                delta1 = hidden_delta(u, z1, s1)
            else:
                n, rstd, error, delta1 = inner_error(z1, kt, vt, step, norm_w, norm_b, NORM)
            grad_key = advance_input_backward(delta1, gw1, gs1, gain, momentum_gain, TALL, MOMENTUM, GT, PRECISION)
            p1 = affinity(xt, kt, HAS_B1, DT, PRECISION)
            y1 = read_layer(base1, s_read1, p1, delta1, theta, read_decay, read_second, SCALED, SECOND, DT, PRECISION)
            y = y1
            if MLP:
                ys1 = gelu_sigmoid(y1)
                h = (y1 * ys1).to(DT)
                base2 = times(h, w2, not TALL, DT, PRECISION) + b2
                if SECOND:
                    s_read2 = times(h, xw2, not TALL, DT, PRECISION) + xb2
                p2 = affinity(h, a, HAS_B2, DT, PRECISION)
                y = read_layer(
                    base2, s_read2, p2, delta2, theta, read_decay, read_second, SCALED, SECOND, DT, PRECISION
                )

            # Backward, from the output to the key.
            grad_out = load_tokens(grad_o, origin, place, head, valid, H, D).to(tl.float32)
            grad_y = grad_out
            if NORM:
                ny, ry = normalise(y)
                grad_y = normalise_backward(ny, ry, grad_out * norm_w)
                norm_grad += token_sum(grad_out * ny)
            d_theta, d_read_decay, d_read_second = 0.0, 0.0, 0.0
            d_gain, d_end_decay, d_end_second, d_momentum_gain, d_momentum_decay = 0.0, 0.0, 0.0, 0.0, 0.0
            if MLP:
                (
                    grad_delta2, gw2, gb2, gx2, gxb2,
                    d_gain, d_end_decay, d_end_second, d_momentum_gain, d_momentum_decay,
                ) = advance_backward(
                    t2, ts2, delta2, w2, b2, xw2, xb2, gw2, gb2, gx2, gxb2,
                    gain, end_decay, end_second, momentum_gain, momentum_decay,
                    HAS_B2, GATED, SCALED, SECOND, MOMENTUM,
                )  # fmt: skip
                (
                    grad_h, gw2, gb2, gx2, gxb2, grad_a, grad_delta2, d_theta, d_read_decay, d_read_second
                ) = read_backward(
                    grad_y, h, a, delta2, base2, s_read2, w2, xw2, gw2, gb2, gx2, gxb2, grad_a, grad_delta2,
                    p2, theta, read_decay, read_second, not TALL, HAS_B2, GATED, SCALED, SECOND, GT, PRECISION,
                )  # fmt: skip
                grad_y = grad_h * gelu_slope(y1, ys1)
            (
                grad_delta1, gw1, gb1, gx1, gxb1, d0, d1, d2, d3, d4
            ) = advance_backward(
                t1, ts1, delta1, w1, b1, xw1, xb1, gw1, gb1, gx1, gxb1,
                gain, end_decay, end_second, momentum_gain, momentum_decay,
                HAS_B1, GATED, SCALED, SECOND, MOMENTUM,
            )  # fmt: skip
            d_gain += d0
            d_end_decay += d1
            d_end_second += d2
            d_momentum_gain += d3
            d_momentum_decay += d4
            (
                grad_read, gw1, gb1, gx1, gxb1, grad_key, grad_delta1, d0, d1, d2
            ) = read_backward(
                grad_y, xt, kt, delta1, base1, s_read1, w1, xw1, gw1, gb1, gx1, gxb1, grad_key, grad_delta1,
                p1, theta, read_decay, read_second, TALL, HAS_B1, GATED, SCALED, SECOND, GT, PRECISION,
            )  # fmt: skip
            d_theta += d0
            d_read_decay += d1
            d_read_second += d2
            if NORM:
                grad_read += grad_out
            store_tokens(grad_x, grad_read, origin, place, head, valid, H, D)
            if MOMENTUM:
                gs1, gsb1, gs2, gsb2 = gx1, gxb1, gx2, gxb2
            if SCALE and MULTI:
                ga1, gab1, ga2, gab2 = gx1, gxb1, gx2, gxb2

            # From here on gradients of the anchor, which without MULTI is the state that the reads start from.
            if MULTI:
                e1, eb1, e2, eb2 = ga1, gab1, ga2, gab2
            else:
                e1, eb1, e2, eb2 = gw1, gb1, gw2, gb2
            if MLP:
                grad_u, grad_z = hidden_backward(grad_delta1, z1, s1, u)
                grad_delta2 = add_times(grad_delta2, grad_u, aw2, not TALL, GT, PRECISION)
                e2 = add_outer(e2, grad_u, delta2, not TALL, GT, PRECISION)
                grad_z2, grad_error, grad_step, grad_n = error_backward(
                    grad_delta2, n, rstd, error, delta2, step, norm_w, NORM
                )
                grad_a = add_times(grad_a, grad_z2, aw2, TALL, GT, PRECISION)
                e2 = add_outer(e2, a, grad_z2, not TALL, GT, PRECISION)
                if HAS_B2:
                    eb2 += token_sum(grad_z2)
                grad_z += grad_a * gelu_slope(z1, s1)
            else:
                grad_z, grad_error, grad_step, grad_n = error_backward(
                    grad_delta1, n, rstd, error, delta1, step, norm_w, NORM
                )
            grad_key = add_times(grad_key, grad_z, aw1, not TALL, GT, PRECISION)
            e1 = add_outer(e1, kt, grad_z, TALL, GT, PRECISION)
            if HAS_B1:
                eb1 += token_sum(grad_z)
            if MULTI:
                ga1, gab1, ga2, gab2 = e1, eb1, e2, eb2
            else:
                gw1, gb1, gw2, gb2 = e1, eb1, e2, eb2
            if NORM:
                norm_grad += grad_n
                grad_key += grad_error
            store_tokens(grad_k, grad_key, origin, place, head, valid, H, D)
            store_tokens(grad_v, -grad_error, origin, place, head, valid, H, D)
            store_scalars(grad_lr, grad_step, origin, place, head, valid, H)

            # The coefficients after the tile are the last rows of those within it.
            is_last = tl.arange(0, R)[:, None] == R - 1
            if MOMENTUM or DECAY:
                d_theta += tl.where(is_last, tl.trans(d_gain), 0.0)
                if DECAY:
                    d_read_decay += tl.where(is_last, d_end_decay, 0.0)
                if MOMENTUM:
                    d_read_second += tl.where(is_last, d_end_second, 0.0)
                    d_momentum_gain = tl.trans(d_momentum_gain)
                grad_m, grad_keep = gate_coefficients_backward(
                    m, keep, column, kept, read_decay, carried, from_start,
                    d_theta, d_read_decay, d_read_second, d_momentum_gain, d_momentum_decay, R, MOMENTUM, DECAY,
                )  # fmt: skip
                if MOMENTUM:
                    store_scalars(grad_momentum, grad_m, origin, place, head, valid, H)
                if DECAY:
                    store_scalars(grad_decay, -grad_keep, origin, place, head, valid, H)
            if SCALE:
                grad_r = tl.sum(causal(R) * d_theta, axis=1, keep_dims=True)
                grad_end = tl.sum(d_gain, axis=0, keep_dims=True)
                if MULTI:
                    grad_r += d_read_decay - d_read_second
                    grad_end += d_end_decay - d_end_second
                at_end = (complete & (tile == TILES - 1)) & (place[:, None] == C - 1)
                grad_r += tl.where(at_end, grad_end, 0.0)
                # Only this program adds to these entries, once per tile: the sum does not depend on any order.
                where = grad_scale + (segment * H + head) * C + place[:, None]
                tl.atomic_add(where, grad_r, mask=valid[:, None], sem="relaxed")
        if MULTI:
            if fresh:
                gw1, gb1, gw2, gb2 = add_state(gw1, gb1, gw2, gb2, ga1, gab1, ga2, gab2, MLP, HAS_B1, HAS_B2)
        else:
            if is_end & (complete == 0):
                e1, eb1, e2, eb2 = load_state(grad_anchor + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
                gw1, gb1, gw2, gb2 = add_state(gw1, gb1, gw2, gb2, e1, eb1, e2, eb2, MLP, HAS_B1, HAS_B2)

    if all_chunks == 0:  # an empty sequence at a chunk's start: its end anchor is its start's weights
        e1, eb1, e2, eb2 = load_state(grad_anchor + own, D, M, MLP, HAS_B1, HAS_B2, TALL)
        gw1, gb1, gw2, gb2 = add_state(gw1, gb1, gw2, gb2, e1, eb1, e2, eb2, MLP, HAS_B1, HAS_B2)
    store_state(grad_weights + own, gw1, gb1, gw2, gb2, D, M, MLP, HAS_B1, HAS_B2, TALL)
    if MOMENTUM:
        store_state(grad_momentum_state + own, gs1, gsb1, gs2, gsb2, D, M, MLP, HAS_B1, HAS_B2, TALL)
    if NORM:
        store_matrix(grad_norm + (segment * H + head) * D, norm_grad, 1, D)
    if MULTI:
        if (group == 0) & (offset > 0):
            store_state(grad_anchor + own, ga1, gab1, ga2, gab2, D, M, MLP, HAS_B1, HAS_B2, TALL)
