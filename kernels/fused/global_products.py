"""The products of the global memory: cuBLAS through torch, float32 results."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and returned in float32: [N, I, K] x [N, K, O] -> [N, I, O].

    So a number is rounded to the operands' dtype once, when it becomes an operand, as in a kernel that keeps it in
    registers. `torch.bmm(out_dtype=)` is there since torch 2.8, on CUDA alone; elsewhere (ROCm, and the CPU of the
    interpreter) the operands are widened first, which gives the same numbers.
    """
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
