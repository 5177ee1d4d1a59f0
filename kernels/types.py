"""The two containers that cross the border of this package: memory parameters and memory state.

Both hold tensors only, so that they can be indexed by row, moved, saved to safetensors and differentiated through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_MAPS = 8


class FastWeights(NamedTuple):
    """The weights that are trained while reading: those of a memory's linear maps, numbered as its kind says.

    Shapes, with an optional leading row dimension N: w [(N,) H, inputs, outputs], b [(N,) H, outputs]. A linear memory
    has w1 [H, D, D]; an MLP w1 [H, D, M], w2 [H, M, D]. Biases are optional; what a memory does without is None.
    """

    w1: Tensor
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    w3: Tensor | None = None
    b3: Tensor | None = None
    w4: Tensor | None = None
    b4: Tensor | None = None
    w5: Tensor | None = None
    b5: Tensor | None = None
    w6: Tensor | None = None
    b6: Tensor | None = None
    w7: Tensor | None = None
    b7: Tensor | None = None
    w8: Tensor | None = None
    b8: Tensor | None = None

    @property
    def used(self) -> int:
        """How many of the fields a memory has: two for each of its linear maps, which are numbered from 1 on."""
        n = 2
        while n < len(self) and self[n] is not None:
            n += 2
        return n

    @property
    def maps(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each linear map."""
        return [(self[i], self[i + 1]) for i in range(0, self.used, 2)]

    def map(self, fn: Callable[[Tensor], Tensor]) -> FastWeights:
        """Apply `fn` to every tensor that is there."""
        return FastWeights(*[None if t is None else fn(t) for t in self[: self.used]])

    def zip_map(self, fn: Callable[..., Tensor], *others: FastWeights) -> FastWeights:
        """Apply `fn(self.x, other.x, ...)` to every tensor that is there."""
        used = zip(self[: self.used], *others, strict=False)
        return FastWeights(*[None if ts[0] is None else fn(*ts) for ts in used])

    def pack(self) -> Tensor:
        """[N, H, …] tensors as one [N, H, P]: for each head w1, b1, w2, …, those that there are, in a row."""
        return torch.cat([t.flatten(2) for t in self if t is not None], dim=-1)

    def unpack(self, packed: Tensor) -> FastWeights:
        """The inverse of `pack`: views of packed [N, H, P] in the shapes of these [N', H, …] tensors."""
        parts = iter(packed.split([t[0, 0].numel() for t in self if t is not None], dim=-1))
        return self.map(lambda t: next(parts).unflatten(-1, t.shape[2:]))


class MemoryParams(NamedTuple):
    """Learned (slow) parameters of one memory: its initial fast weights and the norm of its residual output.

    The fast weights are those of `FastWeights`, without a row dimension; norm_weight and norm_bias [H, D], both or
    neither. With the norm `f(x) = x + LN(y)`, without it `f(x) = y` (TTT, arXiv 2407.04620).
    """

    w1: Tensor
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    w3: Tensor | None = None
    b3: Tensor | None = None
    w4: Tensor | None = None
    b4: Tensor | None = None
    w5: Tensor | None = None
    b5: Tensor | None = None
    w6: Tensor | None = None
    b6: Tensor | None = None
    w7: Tensor | None = None
    b7: Tensor | None = None
    w8: Tensor | None = None
    b8: Tensor | None = None

    @property
    def fast_weights(self) -> FastWeights:
        """The initial fast weights, without a row dimension."""
        return FastWeights(*(getattr(self, name) for name in FastWeights._fields))

    @property
    def norm(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the residual norm."""
        return self.norm_weight, self.norm_bias


class MemoryOptions(NamedTuple):
    """How a memory reads; the fields are those of `local_memory`. A global memory has a chunk_size, a memory_type and
    an update only. memory_type None: "linear" for one linear map, "mlp" for more."""

    chunk_size: int
    shard_length: int | None = None
    is_global: bool = False
    qk_projection: str = "none"
    normalize_projection: bool = False
    has_token_scale: bool = False
    memory_type: str | None = None
    update: str = "gradient"


class MemoryGates(NamedTuple):
    """What a memory's inner optimiser does at each token: [B, T, H], or of all memories of a layer for one token of
    every row [memories, rows, H]. Momentum and decay are None where they are not enabled."""

    lr: Tensor
    momentum: Tensor | None = None
    decay: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> MemoryGates:
        """Apply `fn` to every gate that is there."""
        return MemoryGates(*(None if t is None else fn(t) for t in self))


class MemoryState(NamedTuple):
    """What one memory knows after reading: everything that is needed to read on, its size independent of the length.

    For N rows (batch rows, or packed sequences), in float32 (float64 when the inputs are):

    weights     fast weights after the last token. With `token_scale`, in mid-chunk, the *unscaled* sum
                `W_anchor − Σ lr_τ G_τ`: the scale belongs to the reading position. With `update="muon"`, in mid-chunk,
                the plain sum too: only a whole chunk's step is made orthogonal.
    anchor      fast weights at the start of the chunk that the *next* token belongs to (equal to `weights` when
                `position` is a multiple of the chunk size).
    momentum    the accumulated surprise S, shaped like `weights`, or None without momentum.
    projection  M = Σ k kᵀ/‖k‖² [N, H, D, D], or None without Q-K projection. With "chunk" projection it is zero when
                `position` is a multiple of the chunk size.
    position    [N] int64, number of tokens read; of an initial state it may be in the host's memory, where it is read
                without waiting for a device. A reset (position ≡ 0 modulo the shard length) is carried out before
                the next token, so the state of a finished shard can still be looked at.
    """

    weights: FastWeights
    anchor: FastWeights
    momentum: FastWeights | None
    projection: Tensor | None
    position: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> MemoryState:
        """Apply `fn` to every tensor, position included."""
        return MemoryState(
            self.weights.map(fn),
            self.anchor.map(fn),
            None if self.momentum is None else self.momentum.map(fn),
            None if self.projection is None else fn(self.projection),
            fn(self.position),
        )

    def index_select(self, rows: Tensor) -> MemoryState:
        """The states of the given rows (int64 indices, repeats allowed), in that order."""
        return self.map(lambda t: t.index_select(0, rows.to(t.device)))

    def detach(self) -> MemoryState:
        return self.map(Tensor.detach)

    def clone(self) -> MemoryState:
        return self.map(Tensor.clone)

    def tensors(self) -> dict[str, Tensor]:
        """A flat dict of the tensors that are there, e.g. {"weights.w1": …, "position": …}; see `from_tensors`."""
        flat = {}
        for group in ("weights", "anchor", "momentum"):
            weights = getattr(self, group)
            if weights is not None:
                flat |= {f"{group}.{k}": v for k, v in weights._asdict().items() if v is not None}
        if self.projection is not None:
            flat["projection"] = self.projection
        flat["position"] = self.position
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> MemoryState:
        """The inverse of `tensors`. Raises ValueError for unknown or missing names."""
        known = {f"{g}.{n}" for g in ("weights", "anchor", "momentum") for n in FastWeights._fields}
        known |= {"projection", "position"}
        unknown, missing = sorted(set(flat) - known), sorted({"weights.w1", "anchor.w1", "position"} - set(flat))
        if unknown or missing:
            raise ValueError(f"not the tensors of a MemoryState: unknown {unknown}, missing {missing}")
        groups = [FastWeights(*(flat.get(f"{g}.{n}") for n in FastWeights._fields)) for g in ("weights", "anchor")]
        has_momentum = "momentum.w1" in flat
        momentum = FastWeights(*(flat.get(f"momentum.{n}") for n in FastWeights._fields)) if has_momentum else None
        return cls(*groups, momentum, flat.get("projection"), flat["position"])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Tensors that share memory (weights and anchor at a chunk boundary) count twice."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def is_of(value: object, cls: type) -> bool:
    """Whether a value is of this class, or of the class of that name in another copy of this code.

    A checkpoint may bring such a copy (see operators.py), and transformers makes the caches of all models out of the
    cache layers of the copy that was loaded last.
    """
    return isinstance(value, cls) or type(value).__name__ == cls.__name__


def initial_memory_state(
    params: MemoryParams, rows: int, *, with_momentum: bool, with_projection: bool, dtype: torch.dtype = torch.float32
) -> MemoryState:
    """The state before the first token: W_init in every row, momentum and projection zero, position 0."""
    weights = params.fast_weights.map(lambda t: t.to(dtype).expand(rows, *t.shape))
    H, D = params.w1.shape[:2]
    zeros = params.w1.new_zeros((rows, H, D, D), dtype=dtype) if with_projection else None
    momentum = weights.map(torch.zeros_like) if with_momentum else None
    position = torch.zeros(rows, dtype=torch.int64, device=params.w1.device)
    return MemoryState(weights, weights, momentum, zeros, position)
