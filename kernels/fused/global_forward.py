"""The global memory's kernels forward: its reads, what the keys of a chunk do, and the state after it.

A program of `read_kernel` and `write_kernel` has R tokens of one memory and takes the hidden units U at a time, so that
nothing but its results leaves the chip. Sums over all tokens of a chunk, aᵀ δ, are products of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .global_layout import (
    FORWARD_TILES,
    GlobalInputs,
    Span,
    Tiles,
    load_bias,
    load_column,
    load_norm,
    load_rows,
    load_vector,
    load_w1,
    load_w2,
    program_rows,
    store_row_sum,
    store_rows,
    token_place,
)
from .local_scan import precision
from .math import gelu_sigmoid, gelu_slope, normalise, normalise_backward
from .tile import add_dot, dot

# Entries of one program's part of a state.
BLOCK = 1024


@triton.jit
def memory_output(
    x, w, state, D: tl.constexpr, M: tl.constexpr, U: tl.constexpr, MLP: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(x W1 + b1) W2 + b2, or x W1 + b1 for a linear memory: rows [R, D] of DT -> [R, D] float32."""
    if MLP:
        y = tl.zeros(x.shape, tl.float32)
        for m in range(0, M, U):
            z = dot(x, load_w1(w, m, D, M, U), DT, PRECISION)
            if B1 >= 0:
                z += load_vector(state + B1 + m, U)
            y = add_dot(y, z * gelu_sigmoid(z), load_w2(w, m, D, M, U), DT, PRECISION)
        y += load_bias(state, B2, D)
    else:
        y = dot(x, load_w1(w, 0, D, M, D), DT, PRECISION) + load_bias(state, B1, D)
    return y


@triton.jit
def inner_gradient(y, k, v, norm_weight, norm_bias, NORM: tl.constexpr):
    """δ2 = ∂ ½‖f(W, k) − v‖² / ∂y for rows y of the last layer, and what leads there: n, rstd and f(W, k) − v."""
    if NORM:
        n, rstd = normalise(y, axis=1)
        error = n * norm_weight + norm_bias + k.to(tl.float32) - v.to(tl.float32)
        delta = normalise_backward(n, rstd, error * norm_weight, axis=1)
    else:
        n, rstd = 0.0, 0.0
        error = y - v.to(tl.float32)
        delta = error
    return n, rstd, error, delta


@triton.jit(do_not_specialize=["FROM", "FIRST", "SHARDS", "L"])
def read_kernel(
    x,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    w,  # [P, H, FW] the matrices of the states as operands; rows of WF entries
    state,  # [P, H, F] float32
    o,  # [J · L, H, D] out
    FROM, FIRST, SHARDS, L, C,  # FROM: the span's first memory among [P, H]
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    F: tl.constexpr, FW: tl.constexpr, WF: tl.constexpr, R: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = x.dtype.element_ty
    n, first, valid = program_rows(C, R)
    token = token_place(n, first, FIRST, SHARDS, L, C, H)
    rows = load_rows(x + token * D, valid, H * D, D)
    w += (FROM + n) * WF
    state += (FROM + n) * F
    out = memory_output(rows, w, state, D, M, U, MLP, B1, B2, DT, PRECISION)
    if norm_weight is not None:
        normal, _ = normalise(out, axis=1)
        weight, bias = load_norm(norm_weight, norm_bias, n, H, D)
        out = normal * weight + bias + rows.to(tl.float32)
    store_rows(o + token * D, out, valid, H * D, D)


@triton.jit(do_not_specialize=["FROM", "FIRST", "SHARDS", "L"])
def write_kernel(
    k, v,  # [J · L, H, D]
    norm_weight, norm_bias,  # [H, D] float32, or None
    gain, momentum_gain,  # [J · L, H] float32; the second one None without momentum
    w,  # [P, H, FW] operands
    state,  # [P, H, F] float32
    keys,  # [N, C, D] out
    inner,  # [N, C, S · M] out: gain · δ1 and beside it momentum_gain · δ1; or None for a linear memory
    hidden,  # [N, C, M] out, or None for a linear memory
    outer,  # [N, C, S · D] out: the same for δ2
    bias_sums,  # [programs, S · (F - FW)] float32 out: what the biases get, with momentum what theirs get; or None
    FROM, FIRST, SHARDS, L, C,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, MLP: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    F: tl.constexpr, FW: tl.constexpr, WF: tl.constexpr, R: tl.constexpr, U: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DT: tl.constexpr = k.dtype.element_ty
    NORM: tl.constexpr = norm_weight is not None
    MOMENTUM: tl.constexpr = momentum_gain is not None
    S: tl.constexpr = 2 if MOMENTUM else 1
    FB: tl.constexpr = F - FW
    n, first, valid = program_rows(C, R)
    token = token_place(n, first, FIRST, SHARDS, L, C, H)
    row = n * C + first
    w += (FROM + n) * WF
    state += (FROM + n) * F
    kt = load_rows(k + token * D, valid, H * D, D)
    store_rows(keys + row * D, kt, valid, D, D)
    y = memory_output(kt, w, state, D, M, U, MLP, B1, B2, DT, PRECISION)
    weight, bias = load_norm(norm_weight, norm_bias, n, H, D)
    _, _, _, delta = inner_gradient(y, kt, load_rows(v + token * D, valid, H * D, D), weight, bias, NORM)

    # A token that does not exist has gain 0.
    e = load_column(gain + token, valid, H)
    store_rows(outer + row * (S * D), delta * e, valid, S * D, D)
    if bias_sums is not None:
        bias_sums += tl.program_id(0).to(tl.int64) * (S * FB)
    LAST: tl.constexpr = B2 if MLP else B1
    if LAST >= 0:
        store_row_sum(bias_sums + (LAST - FW), delta * e, D)
    if MOMENTUM:
        s = load_column(momentum_gain + token, valid, H)
        store_rows(outer + row * (S * D) + D, delta * s, valid, S * D, D)
        if LAST >= 0:
            store_row_sum(bias_sums + FB + (LAST - FW), delta * s, D)
    if MLP:
        for m in range(0, M, U):
            z = dot(kt, load_w1(w, m, D, M, U), DT, PRECISION)
            if B1 >= 0:
                z += load_vector(state + B1 + m, U)
            sigmoid = gelu_sigmoid(z)
            store_rows(hidden + row * M + m, z * sigmoid, valid, M, U)
            inner_delta = dot(delta, tl.trans(load_w2(w, m, D, M, U)), DT, PRECISION) * gelu_slope(z, sigmoid)
            store_rows(inner + row * (S * M) + m, inner_delta * e, valid, S * M, U)
            if B1 >= 0:
                store_row_sum(bias_sums + (B1 - FW) + m, inner_delta * e, U)
            if MOMENTUM:
                store_rows(inner + row * (S * M) + M + m, inner_delta * s, valid, S * M, U)
                if B1 >= 0:
                    store_row_sum(bias_sums + FB + (B1 - FW) + m, inner_delta * s, U)


@triton.jit
def program_entries(F: tl.constexpr, BLOCK: tl.constexpr):
    """This program's memory n (int64), entries [BLOCK] of its state, and which of them exist."""
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    f = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), f, f < F


@triton.jit
def load_products(
    p1, p2, bias_sums, n, f, group, T,
    D: tl.constexpr, M: tl.constexpr, F: tl.constexpr, FW: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens of a chunk give to entries f of the state of memory n, group 0 of S (or of its momentum, 1).

    p1 [N, D, S · M] and p2 [N, M, S · D] are for the matrices, bias_sums [N, T, S · (F - FW)] for the biases.
    """
    D_M: tl.constexpr = D * M
    where = n * (S * D_M) + f // M * (S * M) + group * M + f % M
    total = tl.load(p1 + where, mask=f < D_M, other=0.0)
    if FW > D_M:
        g = f - D_M
        where = n * (S * D_M) + g // D * (S * D) + group * D + g % D
        total += tl.load(p2 + where, mask=(f >= D_M) & (f < FW), other=0.0)
    if bias_sums is not None:
        FB: tl.constexpr = F - FW
        if (tl.program_id(0) % ((F + BLOCK - 1) // BLOCK) + 1) * BLOCK > FW:
            for t in range(T):
                where = (n * T + t) * (S * FB) + group * FB + f - FW
                total += tl.load(bias_sums + where, mask=(f >= FW) & (f < F), other=0.0)
    return total


@triton.jit(do_not_specialize=["FROM", "TO", "NEXT", "SHARD", "COEFFICIENT", "STRIDE", "T"])
def advance_kernel(
    state, momentum,  # [P, H, F] float32, in and out; the second one None without momentum
    operands,  # [P, H, FW] out: the matrices as operands of products, or None
    end_state, end_momentum,  # [J, H, F] float32 out
    p1, p2, bias_sums,  # see `load_products`; p2 None for a linear memory, bias_sums without biases
    weight_decay, momentum_effect, momentum_decay,  # [J, n, H] float32, or None
    FROM, TO,  # the span's first memory in [P, H], and that of the chunks that come next
    NEXT,  # of the span's memories, the first that have another chunk
    SHARD, COEFFICIENT, STRIDE,  # see `Span.first_of_shards` and `coefficient_places`
    T,
    H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, F: tl.constexpr, FW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W ← B W + F S − Σ gain a δ and S ← m S − Σ momentum_gain a δ."""
    S: tl.constexpr = 1 if momentum is None else 2
    n, f, valid = program_entries(F, BLOCK)
    coefficient = COEFFICIENT + n // H * STRIDE + n % H
    before = (FROM + n) * F + f
    w = tl.load(state + before, mask=valid, other=0.0)
    if weight_decay is not None:
        w *= tl.load(weight_decay + coefficient)
    w -= load_products(p1, p2, bias_sums, n, f, 0, T, D, M, F, FW, S, BLOCK)
    if momentum is not None:
        s = tl.load(momentum + before, mask=valid, other=0.0)
        w += s * tl.load(momentum_effect + coefficient)
        s *= tl.load(momentum_decay + coefficient)
        s -= load_products(p1, p2, bias_sums, n, f, 1, T, D, M, F, FW, S, BLOCK)
    if n < NEXT:
        tl.store(state + (TO + n) * F + f, w, mask=valid)
        if operands is not None:
            tl.store(operands + (TO + n) * FW + f, w.to(operands.dtype.element_ty), mask=f < FW)
        if momentum is not None:
            tl.store(momentum + (TO + n) * F + f, s, mask=valid)
    else:
        tl.store(end_state + (SHARD + n) * F + f, w, mask=valid)
        if momentum is not None:
            tl.store(end_momentum + (SHARD + n) * F + f, s, mask=valid)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and returned in float32: [N, I, K] x [N, K, O] -> [N, I, O].

    So a number is rounded to the operands' dtype once, when it becomes an operand, as in a kernel that keeps it in
    registers. `torch.bmm(out_dtype=)` is there since torch 2.8, on CUDA alone; on the CPU of the interpreter the
    operands are widened first, which gives the same numbers.
    """
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def row_options(inputs: GlobalInputs, operands: Tensor, tiles: Tiles, warps: int) -> dict[str, int | str]:
    """The constants of the kernels that go over tokens, and the compiler's options.

    Left to itself, its assembler stops at 128 registers here and there, and spills.
    """
    return inputs.sizes() | {
        "WF": operands.shape[-1], "R": tiles.rows, "U": tiles.units, "PRECISION": precision(inputs.x.dtype),
        "num_warps": warps, "num_stages": 1, "maxnreg": 255,
    }  # fmt: skip


def _tiles(inputs: GlobalInputs, span: Span) -> Tiles:
    return Tiles.choose(FORWARD_TILES, inputs.x.dtype, span.layout.chunk_size, inputs.w1.shape[-1])


def read(inputs: GlobalInputs, span: Span, states: Tensor, operands: Tensor, o: Tensor) -> None:
    """Write the span's part of o [J, L, H, D]. states [P, H, F] float32, operands [P, H, FW or F] their matrices."""
    tiles = _tiles(inputs, span)
    read_kernel[(span.memories * tiles.blocks,)](
        inputs.x, *inputs.norm, operands, states, o, span.first_memory, *span.places,
        **row_options(inputs, operands, tiles, 4),
    )  # fmt: skip


class Products(NamedTuple):
    """What the tokens of a chunk give to the matrices and biases of a state; see `load_products` for the shapes."""

    p1: Tensor
    p2: Tensor | None
    bias_sums: Tensor | None

    @property
    def parts(self) -> int:
        """T of `bias_sums`."""
        return 0 if self.bias_sums is None else self.bias_sums.shape[1]


def write(inputs: GlobalInputs, span: Span, states: Tensor, operands: Tensor) -> Products:
    """Of the keys of a chunk, Σ gain a δ, and with momentum beside it Σ momentum_gain a δ."""
    sizes, S, tiles = inputs.sizes(), inputs.gain_count, _tiles(inputs, span)
    D, M, biases = sizes["D"], sizes["M"], sizes["F"] - sizes["FW"]

    def rows(width: int) -> Tensor:
        return inputs.k.new_empty(span.memories, span.layout.chunk_size, width)

    keys, outer, inner, hidden = rows(D), rows(S * D), None, None
    if sizes["MLP"]:
        inner, hidden = rows(S * M), rows(M)
    bias_sums = states.new_empty(span.memories, tiles.blocks, S * biases) if biases else None
    write_kernel[(span.memories * tiles.blocks,)](
        inputs.k, inputs.v, *inputs.norm, *inputs.gains, operands, states, keys, inner, hidden, outer, bias_sums,
        span.first_memory, *span.places, **row_options(inputs, operands, tiles, 4),
    )  # fmt: skip
    if inner is None:
        return Products(product(keys.transpose(1, 2), outer), None, bias_sums)
    return Products(product(keys.transpose(1, 2), inner), product(hidden.transpose(1, 2), outer), bias_sums)


def advance(
    inputs: GlobalInputs,
    span: Span,
    states: tuple[Tensor, Tensor | None],
    operands: Tensor | None,
    ends: tuple[Tensor, Tensor | None],
    products: Products,
) -> None:
    """The state after a chunk, for the shards of a span: to `states` [P, H, F] (and its matrices to `operands`) of
    those that have another chunk, to `ends` [J, H, F] of the others."""
    sizes, following = inputs.sizes(), span.next_rows
    H, F = sizes["H"], sizes["F"]
    advance_kernel[(span.memories * triton.cdiv(F, BLOCK),)](
        *states, operands, *ends, *products, *inputs.coefficients, span.first_memory, following.start * H,
        (following.stop - following.start) * H, span.first_of_shards, *span.coefficient_places, products.parts,
        H, sizes["D"], sizes["M"], F, sizes["FW"], BLOCK,
    )  # fmt: skip
