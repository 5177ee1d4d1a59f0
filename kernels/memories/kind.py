"""What a kind of memory is: linear maps in stages, with an elementwise function (a joint) between two stages.

    h_1 = x,   y_i = h_s W_i + b_i for the maps i of stage s,   h_{s+1} = joint_s(y_i, …),   y = the last stage's map

Each fast weight belongs to a linear map, so the dual form of a read, the update and their backward apply to every map
alike (torch_backend/chunk.py, chunk_backward.py): a kind brings its stages, and the formulas of its joints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..types import FastWeights

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""x, weight, bias -> x W + b, with whatever leading dimensions the caller has."""


class Joint(ABC):
    """An elementwise function of the outputs `ys` of a stage's maps; its value is the next stage's input.

    `forward`, `slopes` and `backward` must be differentiable: sequences that begin or end in mid-chunk are read with
    autograd. `second` is called without.
    """

    @abstractmethod
    def forward(self, *ys: Tensor) -> Any:
        """A tape: the function's `value`, and what the derivatives share with it."""

    @abstractmethod
    def slopes(self, tape: Any) -> Any:
        """What `backward` and `second` share."""

    @abstractmethod
    def backward(
        self, tape: Any, slopes: Any, grad: Tensor, plus: Sequence[Tensor] | None = None, overwrite: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradients of `ys` from that of the value; linear in `grad`. `plus`: added onto these, in place.
        `overwrite`: `grad` is not needed any more."""

    @abstractmethod
    def second(
        self, tape: Any, slopes: Any, grad: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The backward of `backward`: from the gradients of its results those of `grad` and of `ys`. May overwrite
        `grads`."""

    def write(self, ys: Sequence[Tensor], out: Tensor) -> None:
        """The value into `out`, without derivatives: for a step of one token."""
        out.copy_(self.forward(*ys).value)

    def gradients(self, ys: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """`backward` without a tape: for a step of one token."""
        tape = self.forward(*ys)
        return self.backward(tape, self.slopes(tape), grad)


class Activation(Joint):
    """A joint of one map: φ(y). A subclass gives `forward`, `slopes` (φ') and `curvature` (φ'')."""

    @abstractmethod
    def curvature(self, tape: Any, slope: Tensor) -> Tensor:
        """φ''(y)."""

    def backward(
        self, tape: Any, slopes: Tensor, grad: Tensor, plus: Sequence[Tensor] | None = None, overwrite: bool = False
    ) -> tuple[Tensor, ...]:
        if plus is not None:
            return (plus[0].addcmul_(grad, slopes),)
        return (grad.mul_(slopes) if overwrite else grad * slopes,)

    def second(
        self, tape: Any, slopes: Tensor, grad: Tensor, grads: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (g,) = grads
        return g * slopes, (g.mul_(grad).mul_(self.curvature(tape, slopes)),)


class Stage(NamedTuple):
    """Linear maps of the same input, counted from 0, and the joint behind them; None behind the last stage, which has
    one map."""

    maps: tuple[int, ...]
    joint: Joint | None = None


class MemoryKind(ABC):
    """A kind of memory. `name` is its `memory_type`."""

    name: str
    words: str
    """What it is, for a reader: "an MLP"."""
    base_lr: float = 0.1
    """The default of `TNTConfig.memory_base_lr`."""
    depth: int
    """The default of `TNTConfig.memory_depth`: linear maps between input and output."""

    def maps(self, depth: int) -> int:
        """The number of linear maps of a memory of this depth. Raises ValueError for one that there is not."""
        if depth != self.depth:
            raise ValueError(f"memory_depth of a {self.name!r} memory must be {self.depth}, got {depth}; use None")
        return len(self.shapes(1, 1, None))

    @abstractmethod
    def shapes(self, head_dim: int, hidden: int, maps: int | None) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each map. Raises ValueError when there is no such memory of so many maps; None: as many
        as it has where that is fixed."""

    @abstractmethod
    def stages(self, maps: int) -> tuple[Stage, ...]:
        """The stages of a memory of so many maps."""

    @abstractmethod
    def forward(self, weights: FastWeights, x: Tensor, linear: Linear) -> Tensor:
        """The memory y(x), as it is defined. The reference differentiates it; nothing else calls it."""

    def has_hidden(self, depth: int) -> bool:
        """Whether it has hidden units, so that memory_expansion means something."""
        return depth > 1

    def initial_std(self, inputs: int) -> float:
        """Of the learned initial weights of a map: the one that keeps the norm of what comes in."""
        return inputs**-0.5
