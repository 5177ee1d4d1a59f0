"""The hidden layer's activation: a = φ(z + b)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .global_rows import empty_rows, load_tile, load_vector, program_rows, row_grid, store_tile
from .math import gelu_sigmoid


@triton.jit
def hidden_kernel(
    z,  # [N, C, M] float32
    b,  # [N, M] float32, or None
    a,  # [N, C, M] out
    C, M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    n, c, valid = program_rows(C, R)
    row = n * C + c
    x = load_tile(z, row, valid, M, M)
    if b is not None:
        x += load_vector(b, n, M, M)
    store_tile(a, x * gelu_sigmoid(x), row, valid, M, M)


def hidden(z: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """φ(z + bias) as an operand: z [N, C, M] float32, bias [N, M] -> [N, C, M] of `dtype`."""
    C, M = z.shape[1:]
    a = empty_rows(z, M, dtype)
    grid, R = row_grid(z)
    hidden_kernel[grid](z, bias, a, C, M, R)
    return a
