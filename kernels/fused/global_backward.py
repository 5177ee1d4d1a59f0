"""The global memory's kernels backward: the steps of `torch_backend/chunk_backward.py`, without reads in a chunk.

As forward, a program has R tokens of one memory and takes the hidden units U at a time; it makes activations again
rather than keep them. What the tokens of a chunk give to the gradients of the state before it are products over all of
them, for each of the two matrices one: rows that meet the same ones lie below each other, see `Rows`.

Gradients that are operands of products have the dtype of the tokens, but for float16: those of a state are sums over
whole chunks, and with a scaled loss they are past its range. TensorFloat-32 rounds as float16 does, with the range of
float32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .global_forward import (
    BLOCK,
    Products,
    inner_gradient,
    load_products,
    memory_output,
    product,
    program_entries,
    row_options,
)
from .global_layout import (
    BACKWARD_TILES,
    COEFFICIENTS,
    GlobalInputs,
    Layout,
    Span,
    Tiles,
    load_column,
    load_norm,
    load_rows,
    load_vector,
    load_w1,
    load_w2,
    program_rows,
    store_column,
    store_row_sum,
    store_rows,
    token_place,
)
from .limits import gradient_dtype
from .math import feature_mean, gelu_curvature, gelu_sigmoid, gelu_slope, normalise, normalise_backward
from .tile import add_dot, dot


@triton.jit(do_not_specialize=["FROM", "FIRST", "SHARDS", "L"])
def read_backward_kernel(
    x, grad_o,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    w,  # [P, H, FW] the matrices of the states as operands; rows of WF entries
    state,  # [P, H, F] float32
    grad_x,  # [J · L, H, D] out
    inputs, grads_in, hidden, grads_out,  # see `Rows`: out, the first C rows of each memory
    bias_sums,  # [N, 2 T, F - FW] float32 out, in the first T what this memory's programs have; or None
    norm_weight_sums, norm_bias_sums,  # [P, H, T, D] float32 out, or None
    FROM, FIRST, SHARDS, L, C,  # FROM: the span's first memory among [P, H]
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    F: tl.constexpr, FW: tl.constexpr, WF: tl.constexpr, R: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From o = f(W, x) to x and to the rows of the products for W."""
    DT: tl.constexpr = x.dtype.element_ty
    GT: tl.constexpr = inputs.dtype.element_ty
    LAST: tl.constexpr = B2 if MLP else B1
    n, first, valid = program_rows(C, R)
    token = token_place(n, first, FIRST, SHARDS, L, C, H)
    row2, row3 = n * 2 * C + first, n * 3 * C + first  # in `inputs` and `grads_in`, and in the other two
    w += (FROM + n) * WF
    state += (FROM + n) * F
    rows = load_rows(x + token * D, valid, H * D, D)
    store_rows(inputs + row2 * D, rows, valid, D, D)
    grad = load_rows(grad_o + token * D, valid, H * D, D).to(tl.float32)
    through = tl.zeros(rows.shape, tl.float32)
    if norm_weight is not None:
        normal, rstd = normalise(memory_output(rows, w, state, D, M, U, MLP, B1, B2, DT, PRECISION), axis=1)
        sums = ((FROM + n) * tl.cdiv(C, R) + tl.program_id(0) % tl.cdiv(C, R)) * D
        store_row_sum(norm_weight_sums + sums, grad * normal, D)
        store_row_sum(norm_bias_sums + sums, grad, D)
        through = grad
        grad = normalise_backward(normal, rstd, grad * load_vector(norm_weight + n % H * D, D), axis=1)
    if bias_sums is not None:
        bias_sums += (n * 2 * tl.cdiv(C, R) + tl.program_id(0) % tl.cdiv(C, R)) * (F - FW)
    if LAST >= 0:
        store_row_sum(bias_sums + (LAST - FW), grad, D)
    grad = grad.to(GT)
    if MLP:
        store_rows(grads_out + row3 * D, grad, valid, D, D)
        for m in range(0, M, U):
            w1, w2 = load_w1(w, m, D, M, U), load_w2(w, m, D, M, U)
            z = dot(rows, w1, DT, PRECISION)
            if B1 >= 0:
                z += load_vector(state + B1 + m, U)
            sigmoid = gelu_sigmoid(z)
            store_rows(hidden + row3 * M + m, z * sigmoid, valid, M, U)
            grad_z = dot(grad, tl.trans(w2), GT, PRECISION) * gelu_slope(z, sigmoid)
            store_rows(grads_in + row2 * M + m, grad_z, valid, M, U)
            if B1 >= 0:
                store_row_sum(bias_sums + (B1 - FW) + m, grad_z, U)
            through = add_dot(through, grad_z, tl.trans(w1), GT, PRECISION)
    else:
        store_rows(grads_in + row2 * D, grad, valid, D, D)
        through = add_dot(through, grad, tl.trans(load_w1(w, 0, D, M, D)), GT, PRECISION)
    store_rows(grad_x + token * D, through, valid, H * D, D)


@triton.jit
def inner_gradient_backward(y, k, v, q, norm_weight, norm_bias, NORM: tl.constexpr):
    """From the gradient q of δ2 (of `inner_gradient`) to those of the error and of y, and of the norm's two vectors
    by row (step 6 of the derivation). All are zero in rows where q is."""
    grad_error, grad_y, grad_weight = q, q, q
    if NORM:
        # δ2 = J(rstd, n, g) with g = error ⊙ weight depends on all three.
        normal, rstd, error, delta = inner_gradient(y, k, v, norm_weight, norm_bias, NORM)
        scaled = error * norm_weight
        grad_scaled = normalise_backward(normal, rstd, q, axis=1)
        grad_error = grad_scaled * norm_weight
        grad_normal = grad_error * norm_weight - rstd * (
            q * feature_mean(scaled * normal, axis=1) + scaled * feature_mean(q * normal, axis=1)
        )
        grad_y = normalise_backward(normal, rstd, grad_normal, axis=1)
        grad_y -= normal * rstd * feature_mean(q * delta, axis=1)
        grad_weight = grad_scaled * error + grad_error * normal
    return grad_error, grad_y, grad_weight


@triton.jit
def state_gradient(x, g, bias, m, OFFSET: tl.constexpr, W: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr):
    """x G − b̄ for minus the gradient G [·, W] of a matrix and that of its bias, at OFFSET + m (none if negative)."""
    along = dot(x, g, DT, PRECISION)
    if OFFSET >= 0:
        along -= load_vector(bias + OFFSET + m, W)
    return along


@triton.jit(do_not_specialize=["FROM", "SHARD", "FIRST", "SHARDS", "L"])
def write_backward_kernel(
    k, v,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    gain, momentum_gain,  # [J · L, H] float32; the second one None without momentum
    w,  # [P, H, FW] the matrices of the states as operands; rows of WF entries
    state,  # [P, H, F] float32
    g, grad_state,  # [J, H, FW] and [J, H, F]: minus the gradient of the state after the chunk, and that in float32
    gs, grad_momentum,  # the same for the momentum, or None
    grad_k, grad_v,  # [J · L, H, D] out
    grad_gain, grad_momentum_gain,  # [J · L, H] float32 out
    inputs, grads_in, hidden, grads_out,  # see `Rows`: out, from row C on
    bias_sums,  # [N, 2 T, F - FW] float32 out, from T on what this memory's programs have; or None
    norm_weight_sums, norm_bias_sums,  # [P, H, T, D] float32 out, or None
    FROM, SHARD, FIRST, SHARDS, L, C,  # the span's first memory among [P, H] and among [J, H]
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    F: tl.constexpr, FW: tl.constexpr, WF: tl.constexpr, R: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradients of the state after the chunk to its keys, values and gains and to the rows of the products."""
    DT: tl.constexpr = k.dtype.element_ty
    GT: tl.constexpr = g.dtype.element_ty
    NORM: tl.constexpr = norm_weight is not None
    MOMENTUM: tl.constexpr = momentum_gain is not None
    LAST: tl.constexpr = B2 if MLP else B1
    n, first, valid = program_rows(C, R)
    token = token_place(n, first, FIRST, SHARDS, L, C, H)
    row2 = (n * 2 + 1) * C + first  # in `inputs` and `grads_in`
    row3, row4 = (n * 3 + 1) * C + first, (n * 3 + 2) * C + first  # in `hidden` and `grads_out`
    w += (FROM + n) * WF
    state += (FROM + n) * F
    g += (SHARD + n) * FW
    grad_state += (SHARD + n) * F
    if MOMENTUM:
        gs += (SHARD + n) * FW
        grad_momentum += (SHARD + n) * F
    if bias_sums is not None:
        bias_sums += ((n * 2 + 1) * tl.cdiv(C, R) + tl.program_id(0) % tl.cdiv(C, R)) * (F - FW)
    # A token that does not exist has gain 0.
    e = load_column(gain + token, valid, H)
    s = 0.0
    if MOMENTUM:
        s = load_column(momentum_gain + token, valid, H)
    kt = load_rows(k + token * D, valid, H * D, D)
    store_rows(inputs + row2 * D, kt, valid, D, D)
    weight, bias = load_norm(norm_weight, norm_bias, n, H, D)

    y = memory_output(kt, w, state, D, M, U, MLP, B1, B2, DT, PRECISION)
    _, _, _, delta = inner_gradient(y, kt, load_rows(v + token * D, valid, H * D, D), weight, bias, NORM)
    if MLP:
        store_rows(grads_out + row4 * D, delta, valid, D, D)
    delta_operand = delta.to(DT)
    gain_sum = tl.zeros(e.shape, tl.float32)
    momentum_sum = tl.zeros(e.shape, tl.float32)
    q = tl.zeros(y.shape, tl.float32)

    # Up to δ2's gradient q: through the first layer's δ, and through its own effect on the state.
    if MLP:
        along = tl.zeros(y.shape, tl.float32)
        along_s = tl.zeros(y.shape, tl.float32)
        for m in range(0, M, U):
            z = dot(kt, load_w1(w, m, D, M, U), DT, PRECISION)
            if B1 >= 0:
                z += load_vector(state + B1 + m, U)
            sigmoid = gelu_sigmoid(z)
            slope = gelu_slope(z, sigmoid)
            a = (z * sigmoid).to(DT)
            store_rows(hidden + row3 * M + m, a, valid, M, U)
            w2 = load_w2(w, m, D, M, U)
            inner_delta = dot(delta_operand, tl.trans(w2), DT, PRECISION) * slope
            inner_along = state_gradient(kt, load_w1(g, m, D, M, U), grad_state, m, B1, U, GT, PRECISION)
            grad_delta = e * inner_along
            gain_sum += tl.sum(inner_delta * inner_along, axis=1, keep_dims=True)
            along = add_dot(along, a, load_w2(g, m, D, M, U), GT, PRECISION)
            if MOMENTUM:
                inner_along = state_gradient(kt, load_w1(gs, m, D, M, U), grad_momentum, m, B1, U, GT, PRECISION)
                grad_delta += s * inner_along
                momentum_sum += tl.sum(inner_delta * inner_along, axis=1, keep_dims=True)
                along_s = add_dot(along_s, a, load_w2(gs, m, D, M, U), GT, PRECISION)
            grad_u = (grad_delta * slope).to(GT)
            store_rows(hidden + row4 * M + m, grad_u, valid, M, U)
            q = add_dot(q, grad_u, w2, GT, PRECISION)
        if LAST >= 0:
            along -= load_vector(grad_state + LAST, D)
            if MOMENTUM:
                along_s -= load_vector(grad_momentum + LAST, D)
    else:
        along = state_gradient(kt, load_w1(g, 0, D, M, D), grad_state, 0, B1, D, GT, PRECISION)
        if MOMENTUM:
            along_s = state_gradient(kt, load_w1(gs, 0, D, M, D), grad_momentum, 0, B1, D, GT, PRECISION)
    # Loaded again, so that these and what follows from them need not stay in registers meanwhile.
    vt = load_rows(v + token * D, valid, H * D, D)
    weight, bias = load_norm(norm_weight, norm_bias, n, H, D)
    _, _, _, delta = inner_gradient(y, kt, vt, weight, bias, NORM)
    gain_sum += tl.sum(delta * along, axis=1, keep_dims=True)
    store_column(grad_gain + token, gain_sum, valid, H)
    q += e * along
    if MOMENTUM:
        momentum_sum += tl.sum(delta * along_s, axis=1, keep_dims=True)
        store_column(grad_momentum_gain + token, momentum_sum, valid, H)
        q += s * along_s
    grad_error, grad_y, grad_weight = inner_gradient_backward(y, kt, vt, q, weight, bias, NORM)
    store_rows(grad_v + token * D, -grad_error, valid, H * D, D)
    keys = tl.zeros(y.shape, tl.float32)
    if NORM:
        keys = grad_error
        sums = ((FROM + n) * tl.cdiv(C, R) + tl.program_id(0) % tl.cdiv(C, R)) * D
        store_row_sum(norm_weight_sums + sums, grad_weight, D)
        store_row_sum(norm_bias_sums + sums, grad_error, D)
    if LAST >= 0:
        store_row_sum(bias_sums + (LAST - FW), grad_y, D)
    gained = (e * delta).to(GT)
    gained_s = (s * delta).to(GT)
    grad_y = grad_y.to(GT)

    # From both layers' outputs to the keys.
    if MLP:
        store_rows(grads_out + row3 * D, grad_y, valid, D, D)
        for m in range(0, M, U):
            w1, w2 = load_w1(w, m, D, M, U), load_w2(w, m, D, M, U)
            z = dot(kt, w1, DT, PRECISION)
            if B1 >= 0:
                z += load_vector(state + B1 + m, U)
            sigmoid = gelu_sigmoid(z)
            slope = gelu_slope(z, sigmoid)
            u = dot(delta_operand, tl.trans(w2), DT, PRECISION)
            g1 = load_w1(g, m, D, M, U)
            grad_delta = e * state_gradient(kt, g1, grad_state, m, B1, U, GT, PRECISION)
            keys = add_dot(keys, u * slope * e, tl.trans(g1), GT, PRECISION)
            grad_a = dot(grad_y, tl.trans(w2), GT, PRECISION)
            grad_a = add_dot(grad_a, gained, tl.trans(load_w2(g, m, D, M, U)), GT, PRECISION)
            if MOMENTUM:
                g1 = load_w1(gs, m, D, M, U)
                grad_delta += s * state_gradient(kt, g1, grad_momentum, m, B1, U, GT, PRECISION)
                keys = add_dot(keys, u * slope * s, tl.trans(g1), GT, PRECISION)
                grad_a = add_dot(grad_a, gained_s, tl.trans(load_w2(gs, m, D, M, U)), GT, PRECISION)
            grad_z = grad_delta * u * gelu_curvature(z, sigmoid) + grad_a * slope
            store_rows(grads_in + row2 * M + m, grad_z, valid, M, U)
            if B1 >= 0:
                store_row_sum(bias_sums + (B1 - FW) + m, grad_z, U)
            keys = add_dot(keys, grad_z, tl.trans(w1), GT, PRECISION)
    else:
        store_rows(grads_in + row2 * D, grad_y, valid, D, D)
        keys = add_dot(keys, grad_y, tl.trans(load_w1(w, 0, D, M, D)), GT, PRECISION)
        keys = add_dot(keys, gained, tl.trans(load_w1(g, 0, D, M, D)), GT, PRECISION)
        if MOMENTUM:
            keys = add_dot(keys, gained_s, tl.trans(load_w1(gs, 0, D, M, D)), GT, PRECISION)
    store_rows(grad_k + token * D, keys, valid, H * D, D)


@triton.jit(do_not_specialize=["FROM", "SHARD", "COEFFICIENT", "STRIDE", "T"])
def retreat_kernel(
    state, momentum,  # [P, H, F] float32; the second one None without momentum
    grad_state, grad_momentum,  # [J, H, F] float32, in and out: from after the chunk to before it
    g, gs,  # [J, H, FW] out: minus that, the matrices alone, as operands of products
    p1, p2, bias_sums,  # see `load_products`
    weight_decay, momentum_effect, momentum_decay,  # [J, n, H] float32, or None
    dots_b, dots_f, dots_m,  # [J, n, H, blocks] float32 out: this program's part of their gradients, or None
    FROM, SHARD, COEFFICIENT, STRIDE, T,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, F: tl.constexpr, FW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back over W_end = B W + F S − … and S_end = m S − …, and what the tokens of the chunk give to W."""
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    n, f, valid = program_entries(F, BLOCK)
    coefficient = COEFFICIENT + n // H * STRIDE + n % H
    dot_place = coefficient * BLOCKS + tl.program_id(0) % BLOCKS
    at = (SHARD + n) * F + f
    after = tl.load(grad_state + at, mask=valid, other=0.0)
    before = load_products(p1, p2, bias_sums, n, f, 0, T, D, M, F, FW, 1, BLOCK)
    if weight_decay is not None:
        old = tl.load(state + (FROM + n) * F + f, mask=valid, other=0.0)
        tl.store(dots_b + dot_place, tl.sum(after * old))
        before += after * tl.load(weight_decay + coefficient)
    else:
        before += after
    tl.store(grad_state + at, before, mask=valid)
    tl.store(g + (SHARD + n) * FW + f, (-before).to(g.dtype.element_ty), mask=f < FW)
    if momentum is not None:
        old = tl.load(momentum + (FROM + n) * F + f, mask=valid, other=0.0)
        after_s = tl.load(grad_momentum + at, mask=valid, other=0.0)
        tl.store(dots_f + dot_place, tl.sum(after * old))
        tl.store(dots_m + dot_place, tl.sum(after_s * old))
        before = after * tl.load(momentum_effect + coefficient) + after_s * tl.load(momentum_decay + coefficient)
        tl.store(grad_momentum + at, before, mask=valid)
        tl.store(gs + (SHARD + n) * FW + f, (-before).to(gs.dtype.element_ty), mask=f < FW)


class Rows(NamedTuple):
    """The operands of the products that give a span's gradients of the state: a C-row block each of what stands here.

    h = φ(x W1 + b1) and a = φ(k W1 + b1); ū is the gradient of u = δ2 W2ᵀ.
    """

    inputs: Tensor  # [N, 2 C, D] x, k
    grads_in: Tensor  # [N, 2 C, M] gradients of the first layer's outputs there
    hidden: Tensor | None  # [N, 3 C, M] h, a, ū; None for a linear memory
    grads_out: Tensor | None  # [N, 3 C, D] gradients of the last layer's outputs at h and a, δ2; None alike

    @classmethod
    def empty(cls, inputs: GlobalInputs, span: Span) -> Rows:
        D, M = inputs.w1.shape[2:]
        N, C, dtype = span.memories, span.layout.chunk_size, gradient_dtype(inputs.x.dtype)

        def rows(count: int, width: int) -> Tensor:
            return inputs.x.new_empty(N, count * C, width, dtype=dtype)

        is_mlp = inputs.w2 is not None
        return cls(rows(2, D), rows(2, M), rows(3, M) if is_mlp else None, rows(3, D) if is_mlp else None)

    def products(self, bias_sums: Tensor | None) -> Products:
        p1 = product(self.inputs.transpose(1, 2), self.grads_in)
        p2 = None if self.hidden is None else product(self.hidden.transpose(1, 2), self.grads_out)
        return Products(p1, p2, bias_sums)


class StateGradients(NamedTuple):
    """Those of the state after a chunk of each shard, [J, H, F], and minus their matrices as operands, [J, H, FW]."""

    weights: Tensor
    momentum: Tensor | None
    operands: Tensor
    momentum_operands: Tensor | None


def backward_tiles(inputs: GlobalInputs, layout: Layout) -> Tiles:
    return Tiles.choose(BACKWARD_TILES, gradient_dtype(inputs.x.dtype), layout.chunk_size, inputs.w1.shape[-1])


def chunk_backward(
    inputs: GlobalInputs,
    span: Span,
    states: tuple[Tensor, Tensor | None],
    operands: Tensor,
    after: StateGradients,
    grad_o: Tensor,
    out: dict[str, Tensor],
    dots: dict[str, Tensor],
    norm_sums: Tensor | None,
) -> None:
    """Turn the gradients `after` a chunk of a span into those before it, in place.

    Args:
        states: those before all chunks [P, H, F], weights and momentum; operands: their matrices [P, H, FW or F].
        grad_o: [J, L, H, D]; out: gradients of x, k, v, gain, momentum_gain alike, filled for the span.
        dots: for each coefficient [J, n, H, blocks], filled for the span; their sums are its gradients.
        norm_sums: [2, 2, P, H, T, D], filled for the span: parts of the gradients of the norm's weight and bias.
    """
    sizes, tiles = inputs.sizes(), backward_tiles(inputs, span.layout)
    F, biases = sizes["F"], sizes["F"] - sizes["FW"]
    grid, rows = (span.memories * tiles.blocks,), Rows.empty(inputs, span)
    bias_sums = after.weights.new_empty(span.memories, 2 * tiles.blocks, biases) if biases else None
    of_reads, of_keys = ((None, None), (None, None)) if norm_sums is None else norm_sums.unbind(1)
    options = row_options(inputs, operands, tiles, 8)
    read_backward_kernel[grid](
        inputs.x, grad_o, *inputs.norm, operands, states[0], out["x"], *rows, bias_sums, *of_reads,
        span.first_memory, *span.places, **options,
    )  # fmt: skip
    write_backward_kernel[grid](
        inputs.k, inputs.v, *inputs.norm, *inputs.gains, operands, states[0],
        after.operands, after.weights, after.momentum_operands, after.momentum,
        out["k"], out["v"], out["gain"], out.get("momentum_gain"), *rows, bias_sums, *of_keys,
        span.first_memory, span.first_of_shards, *span.places, **options,
    )  # fmt: skip
    products = rows.products(bias_sums)
    retreat_kernel[(span.memories * triton.cdiv(F, BLOCK),)](
        *states, after.weights, after.momentum, after.operands, after.momentum_operands, *products,
        *inputs.coefficients, *(dots.get(name) for name in COEFFICIENTS),
        span.first_memory, span.first_of_shards, *span.coefficient_places, products.parts,
        sizes["H"], sizes["D"], sizes["M"], F, sizes["FW"], BLOCK,
    )  # fmt: skip
