"""Back through the hidden layer's activation: u ⊙ φ'(z + b), plus an addend, times the gains of the tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .global_rows import (
    Span,
    load_column,
    load_tile,
    load_vector,
    program_rows,
    row_grid,
    store_tile,
    token_place,
)
from .math import gelu_sigmoid, gelu_slope


@triton.jit(do_not_specialize=["FIRST", "SHARDS", "L"])
def slope_kernel(
    z, u,  # [N, C, M] float32
    b,  # [N, M] float32, or None
    addend,  # [N, C, M] float32, or None
    gain, momentum_gain,  # [J · L, H] float32, or None
    out,  # [N, C, WIDTH · M] out: the first M columns, with a momentum gain the first 2 M
    FIRST, SHARDS, L, C,
    H: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    x = load_tile(z, row, valid, M, M)
    if b is not None:
        x += load_vector(b, n, M, M)
    grad = load_tile(u, row, valid, M, M) * gelu_slope(x, gelu_sigmoid(x))
    if addend is not None:
        grad += load_tile(addend, row, valid, M, M)
    if gain is None:
        store_tile(out, grad, row, valid, WIDTH * M, M)
    else:
        place = token_place(n, c, FIRST, SHARDS, L, C, H)
        store_tile(out, grad * load_column(gain, place, valid), row, valid, WIDTH * M, M)
        if momentum_gain is not None:
            scaled = grad * load_column(momentum_gain, place, valid)
            store_tile(out + M, scaled, row, valid, WIDTH * M, M)


def slope(
    z: Tensor,
    bias: Tensor | None,
    u: Tensor,
    addend: Tensor | None,
    gains: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    span: Span,
) -> None:
    """Write gain · (addend + u ⊙ φ'(z + bias)) for each gain, side by side, to the first columns of `out`.

    z, u, addend [N, C, M] float32, bias [N, M]; gains [J, L, H] of the whole scan, both None: 1; out [N, C, WIDTH · M].
    """
    M = z.shape[-1]
    grid, R = row_grid(z)
    slope_kernel[grid](z, u, bias, addend, *gains, out, *span.places, M, out.shape[-1] // M, R)
