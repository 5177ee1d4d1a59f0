"""A SwiGLU memory: y = (silu(x W1 + b1) ⊙ (x W3 + b3)) W2 + b2 (the fast weights of LaCT, arXiv 2505.23884)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..types import FastWeights
from .kind import Joint, Linear, MemoryKind, Stage


class GateTape(NamedTuple):
    """silu(z) ⊙ y, with what its derivatives share."""

    z: Tensor
    y: Tensor
    sigmoid: Tensor  # σ(z)
    silu: Tensor  # z σ
    value: Tensor  # z σ y


class SiluGate(Joint):
    """silu(z) ⊙ y of two maps."""

    def forward(self, z: Tensor, y: Tensor) -> GateTape:
        sigmoid = torch.sigmoid(z)
        silu = z * sigmoid
        return GateTape(z, y, sigmoid, silu, silu * y)

    def slopes(self, tape: GateTape) -> Tensor:
        """silu'(z) = σ + silu (1 − σ)."""
        return tape.sigmoid + tape.silu * (1 - tape.sigmoid)

    def backward(
        self,
        tape: GateTape,
        slopes: Tensor,
        grad: Tensor,
        plus: Sequence[Tensor] | None = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, ...]:
        grads = (grad * tape.y * slopes, grad * tape.silu)
        return grads if plus is None else tuple(p.add_(g) for p, g in zip(plus, grads, strict=True))

    def second(
        self, tape: GateTape, slopes: Tensor, grad: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """With silu''(z) = σ (1 − σ) (2 + z (1 − 2 σ))."""
        z, y = grads
        bump = tape.sigmoid * (1 - tape.sigmoid) * (2 + tape.z * (1 - 2 * tape.sigmoid))
        of_grad = z * tape.y * slopes + y * tape.silu
        return of_grad, (grad * (z * tape.y * bump + y * slopes), grad * z * slopes)


class SwiGLUMemory(MemoryKind):
    name, words, depth = "swiglu", "a SwiGLU", 2

    def shapes(self, head_dim: int, hidden: int, maps: int | None) -> tuple[tuple[int, int], ...]:
        if maps not in (3, None):
            raise ValueError(f"a SwiGLU memory has three maps, w1, w2 and w3, got the weights of {maps}")
        return (head_dim, hidden), (hidden, head_dim), (head_dim, hidden)

    def stages(self, maps: int) -> tuple[Stage, ...]:
        return Stage((0, 2), SiluGate()), Stage((1,))

    def forward(self, weights: FastWeights, x: Tensor, linear: Linear) -> Tensor:
        gate = F.silu(linear(x, weights.w1, weights.b1))
        return linear(gate * linear(x, weights.w3, weights.b3), weights.w2, weights.b2)
