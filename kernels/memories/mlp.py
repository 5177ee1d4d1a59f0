"""An MLP memory with gelu between its linear maps: y = gelu(… gelu(x W1 + b1) W2 + b2 …) (TTT-MLP, Titans, TNT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..types import MAX_MAPS, FastWeights
from .kind import Activation, Linear, MemoryKind, Stage

# gelu_tanh(z) = z σ(a(z)) with a(z) = _A1 z + _A3 z³: one sigmoid, four times cheaper on a CPU than tanh.
_A1 = 2.0 * (2.0 / torch.pi) ** 0.5
_A3 = _A1 * 0.044715


class GeluTape(NamedTuple):
    """gelu_tanh at z, with what its derivatives share."""

    square: Tensor  # z²
    sigmoid: Tensor  # σ(a(z))
    value: Tensor  # z σ


class Gelu(Activation):
    """gelu in its tanh form, as z σ(a(z))."""

    def forward(self, z: Tensor) -> GeluTape:
        square = z * z
        sigmoid = torch.addcmul(z * _A1, square, z, value=_A3).sigmoid_()
        return GeluTape(square, sigmoid, z * sigmoid)

    def slopes(self, tape: GeluTape) -> Tensor:
        """φ'(z) = σ + z σ (1 − σ) a'(z), with a'(z) = A1 + 3 A3 z²."""
        w = torch.addcmul(tape.value, tape.value, tape.sigmoid, value=-1)
        return torch.addcmul(torch.add(tape.sigmoid, w, alpha=_A1), w, tape.square, value=3 * _A3)

    def curvature(self, tape: GeluTape, slope: Tensor) -> Tensor:
        """φ''(z) = σ (1 − σ) (2 a' + z a'') + (φ' − σ) a' (1 − 2σ)."""
        slope_of_a = (tape.square * (3 * _A3)).add_(_A1)
        curvature = (slope - tape.sigmoid).mul_(slope_of_a).mul_((tape.sigmoid * -2).add_(1))
        bump = torch.addcmul(tape.sigmoid, tape.sigmoid, tape.sigmoid, value=-1)
        return curvature.addcmul_(bump, slope_of_a.mul_(4).sub_(2 * _A1))

    def write(self, ys: Sequence[Tensor], out: Tensor) -> None:
        torch.ops.aten.gelu.out(ys[0], approximate="tanh", out=out)

    def gradients(self, ys: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.aten.gelu_backward(grad, ys[0], approximate="tanh"),)


class MLPMemory(MemoryKind):
    name, words, depth = "mlp", "an MLP", 2

    def maps(self, depth: int) -> int:
        if not 1 <= depth <= MAX_MAPS:
            raise ValueError(f"memory_depth must be 1 to {MAX_MAPS}, got {depth}; use 2, or another one of these")
        return depth

    def shapes(self, head_dim: int, hidden: int, maps: int | None) -> tuple[tuple[int, int], ...]:
        maps = self.depth if maps is None else maps
        widths = [head_dim, *[hidden] * (maps - 1), head_dim]
        return tuple(zip(widths, widths[1:], strict=False))

    def stages(self, maps: int) -> tuple[Stage, ...]:
        return (*(Stage((i,), Gelu()) for i in range(maps - 1)), Stage((maps - 1,)))

    def forward(self, weights: FastWeights, x: Tensor, linear: Linear) -> Tensor:
        first, *others = weights.maps
        y = linear(x, *first)
        for weight, bias in others:
            y = linear(F.gelu(y, approximate="tanh"), weight, bias)
        return y
