"""A linear memory: y = x W + b (TTT-Linear, arXiv 2407.04620)."""

from __future__ import annotations

from torch import Tensor

from ..types import FastWeights
from .kind import Linear, MemoryKind, Stage


class LinearMemory(MemoryKind):
    name, words, depth, base_lr = "linear", "a linear map", 1, 1.0

    def shapes(self, head_dim: int, hidden: int, maps: int | None) -> tuple[tuple[int, int], ...]:
        if maps not in (1, None):
            raise ValueError(f"a linear memory has one map, got the weights of {maps}; leave w2 and what follows out")
        return ((head_dim, head_dim),)

    def stages(self, maps: int) -> tuple[Stage, ...]:
        return (Stage((0,)),)

    def forward(self, weights: FastWeights, x: Tensor, linear: Linear) -> Tensor:
        return linear(x, weights.w1, weights.b1)
