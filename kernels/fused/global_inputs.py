"""What the global memory's operators take, and how they see the weights of some of their chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..slab import MOMENTUM, WEIGHTS
from ..types import FastWeights
from .global_rows import Layout, Span

STATE = WEIGHTS + MOMENTUM
COEFFICIENTS = ("end_decay", "end_momentum", "momentum_decay")


class GlobalInputs(NamedTuple):
    """The tensors of a scan over J shards of at most L = n · C tokens, H heads; None where the memory does without.

    x, k, v        [J, L, H, D] read rows, keys, values, all of one dtype, in which products take their operands
    gain           [J, L, H] effect of each token's gradient on the weights after its chunk: lr γ
    momentum_gain  [J, L, H] its effect on the momentum after its chunk: lr σ
    w1 … b2        [J, H, …] weights at the start of each shard; momentum_* alike
    norm_*         [H, D]
    end_decay, end_momentum, momentum_decay   [J, n, H] as in `Coefficients`

    All but x, k, v are float32, and all are contiguous.
    """

    x: Tensor
    k: Tensor
    v: Tensor
    gain: Tensor
    w1: Tensor
    momentum_gain: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    momentum_w1: Tensor | None = None
    momentum_b1: Tensor | None = None
    momentum_w2: Tensor | None = None
    momentum_b2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    end_decay: Tensor | None = None
    end_momentum: Tensor | None = None
    momentum_decay: Tensor | None = None

    @classmethod
    def unpack(cls, tensors: list[Tensor], names: str) -> GlobalInputs:
        return cls(**dict(zip(names.split(","), (t.contiguous() for t in tensors), strict=True)))

    @property
    def norm(self) -> tuple[Tensor | None, Tensor | None]:
        return self.norm_weight, self.norm_bias

    @property
    def gains(self) -> tuple[Tensor, Tensor | None]:
        return self.gain, self.momentum_gain

    @property
    def gain_count(self) -> int:
        """S: 2 with momentum, otherwise 1."""
        return 1 if self.momentum_gain is None else 2

    @property
    def weights(self) -> list[str]:
        """The names of the weights that are there."""
        return [name for name in WEIGHTS if getattr(self, name) is not None]

    def state(self) -> dict[str, Tensor]:
        """Weights and momentum that are there, by name."""
        return {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}

    def coefficients(self, span: Span) -> tuple[Tensor | None, ...]:
        """End decay, end momentum and momentum decay of a span of one chunk, [shards, H] each."""
        tensors = (getattr(self, name) for name in COEFFICIENTS)
        return tuple(None if t is None else t[span.of_shards, span.chunk] for t in tensors)

    def packed_state(self, layout: Layout) -> dict[str, Tensor]:
        """Uninitialised room for the state before every chunk, [P, H, …]."""
        return {name: t.new_empty((layout.rows, *t.shape[1:])) for name, t in self.state().items()}


class SpanGradients(NamedTuple):
    """Of the anchors of a span [N, …], and of the norm [H, D] or None without; all float32."""

    anchors: FastWeights
    norm_weight: Tensor | None
    norm_bias: Tensor | None


def anchors_of(weights: dict[str, Tensor], operands: dict[str, Tensor], rows: slice) -> FastWeights:
    """The weights of a span with a row per memory, [N, …]: w1 and w2 as operands of products, biases in float32.

    Args: weights [P, H, …] float32; operands: w1 and w2 [P, H, …] in the dtype of the tokens.
    """

    def memories(name: str) -> Tensor | None:
        t = operands.get(name, weights.get(name))
        return None if t is None else t[rows].flatten(0, 1)

    return FastWeights(*(memories(name) for name in WEIGHTS))


def pair(state: dict[str, Tensor], name: str, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Some rows of one weight and of its momentum, None without."""
    momentum = state.get(MOMENTUM[WEIGHTS.index(name)])
    return state[name][rows], None if momentum is None else momentum[rows]


def as_operands(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """w1 and w2 in the dtype of products' operands (themselves where that is float32)."""
    return {name: weights[name].to(dtype) for name in ("w1", "w2") if name in weights}
