"""The loops over chunks, forward and backward, for shards that fit into a cache together.

Shards are sorted by length, so those that are still running are always the first ones and nothing is computed for
padding. Nothing here is differentiable; scan.py makes operators of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..memories.kinds import memory_kind
from ..types import FastWeights
from .chunk import ChunkState, Coefficients, Norm, advance, chunk_forward
from .chunk_backward import chunk_backward

WEIGHTS = FastWeights._fields
MOMENTUM = tuple(f"momentum_{name}" for name in WEIGHTS)


class ScanInputs(NamedTuple):
    """The tensors of a scan over J shards of at most L = n · C tokens, H heads; None where the memory does without.

    x, k, v             [J, L, H, D] read rows, keys, values
    lr                  [J, L, H]
    weights, momentum   [J, H, …] at the start of each shard
    norm_*              [H, D]
    coefficients        theta [J, n, H, C, C], per token [J, n, H, C], per chunk [J, n, H]
    """

    x: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    weights: FastWeights
    momentum: FastWeights | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    coefficients: Coefficients

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name: "x", …, "w1", …, "momentum_w1", …, "theta", …; see `from_tensors`."""
        flat = {name: getattr(self, name) for name in ("x", "k", "v", "lr")} | dict(named(self.weights, self.momentum))
        flat |= {"norm_weight": self.norm_weight, "norm_bias": self.norm_bias} | self.coefficients._asdict()
        return {name: t for name, t in flat.items() if t is not None}

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> ScanInputs:
        return cls(
            *(flat[name] for name in ("x", "k", "v", "lr")), group(flat, WEIGHTS), group(flat, MOMENTUM),
            flat.get("norm_weight"), flat.get("norm_bias"),
            Coefficients(*(flat.get(name) for name in Coefficients._fields)),
        )  # fmt: skip

    def shards(self, first: int, last: int) -> ScanInputs:
        """The inputs of some of the shards, as views."""
        return self.from_tensors(
            {name: t if name.startswith("norm_") else t[first:last] for name, t in self.tensors().items()}
        )


class ScanPlan(NamedTuple):
    """memory_type: the kind of memory. lengths: number of chunks of each shard, falling. interval: chunks between kept
    states, 0 to keep none."""

    memory_type: str
    lengths: list[int]
    chunk_size: int
    intra: bool
    interval: int


class Chunk(NamedTuple):
    """A chunk as the forward leaves it for the backward; `active` shards have it."""

    active: int
    weights: FastWeights
    momentum: FastWeights | None
    norm: Norm | None
    coefficients: Coefficients
    state: ChunkState


class Slab:
    """Some shards of a scan. Rows are shards times heads."""

    def __init__(self, inputs: ScanInputs, plan: ScanPlan):
        self.inputs, self.plan = inputs, plan
        self.stages = memory_kind(plan.memory_type).stages(len(inputs.weights.maps))
        self.shards, self.heads = inputs.x.shape[0], inputs.x.shape[2]
        self.active = [sum(n > index for n in plan.lengths) for index in range(plan.lengths[0])]
        self.norm = None
        if inputs.norm_weight is not None:
            rows = (t.repeat(self.shards, 1).unsqueeze(1) for t in (inputs.norm_weight, inputs.norm_bias))
            self.norm = Norm(*rows)
        self._tokens = [self._by_chunk(t) for t in (inputs.k, inputs.x, inputs.v, inputs.lr)]
        self._coefficients = [None if t is None else t.transpose(0, 1) for t in inputs.coefficients]

    def forward(self, outputs: dict[str, Tensor]) -> None:
        """Fill the slab's part of o, of the states after each shard, and of the states kept for the backward."""
        o = self._by_chunk(outputs["o"])
        weights, momentum = _own(self.inputs.weights), _own(self.inputs.momentum)
        for index, active in enumerate(self.active):
            chunk, o_rows = self._read(index, weights, momentum)
            target = o[index][:active]
            target.copy_(o_rows.view(target.shape))
            if self.plan.interval and index % self.plan.interval == 0:
                for name, t in named(chunk.weights, chunk.momentum):
                    target = outputs[f"kept_{name}"][index // self.plan.interval, :active]
                    target.copy_(t.view(target.shape))
            advance(self.stages, chunk.weights, chunk.momentum, chunk.state, chunk.coefficients, overwrite=True)
        for name, t in named(weights, momentum):
            outputs[name].copy_(t.view(outputs[name].shape))

    def backward(self, kept: dict[str, Tensor], grad_o: Tensor, out: dict[str, Tensor]) -> None:
        """Write the slab's gradients into `out`, whose state entries hold the gradients of the states after each shard.

        A group of `interval` chunks at a time is run again from the state that was kept before it.
        """
        C, total, interval = self.plan.chunk_size, self.plan.lengths[0], self.plan.interval
        flat = {name: out[name].flatten(0, 1) for name, _ in named(self.inputs.weights, self.inputs.momentum)}
        grad_weights, grad_momentum = group(flat, WEIGHTS), group(flat, MOMENTUM)
        grad_norm_weight = None
        if self.norm is not None:
            grad_norm_weight = grad_o.new_zeros(self.shards * self.heads, C, grad_o.shape[-1])
        grad_o = self._by_chunk(grad_o)
        targets = [self._by_chunk(out[name]) for name in ("k", "v", "x", "lr")]
        for start in reversed(range(0, total, interval)):
            before = {name: t[start // interval].flatten(0, 1) for name, t in kept.items()}
            stop = min(start + interval, total)
            chunks = self._run_again(range(start, stop), group(before, WEIGHTS), group(before, MOMENTUM))
            for index in reversed(range(start, stop)):
                chunk = chunks.pop()
                rows = chunk.active * self.heads
                g = chunk_backward(
                    self.stages,
                    chunk.state,
                    chunk.weights,
                    chunk.momentum,
                    chunk.norm,
                    chunk.coefficients,
                    self.plan.intra,
                    grad_o[index][: chunk.active].reshape(rows, C, -1),
                    _first(grad_weights, rows),
                    _first(grad_momentum, rows),
                    None if grad_norm_weight is None else grad_norm_weight[:rows],
                )
                for target, grad in zip(targets, (g.k, g.v, g.x, g.lr), strict=True):
                    target = target[index][: chunk.active]
                    target.copy_(grad.reshape(target.shape))
                for name, grad in g.coefficients._asdict().items():
                    if grad is not None:
                        target = out[name][: chunk.active, index]
                        target.copy_(grad.reshape(target.shape))
        if grad_norm_weight is not None:
            out["norm_weight"] += grad_norm_weight.sum(1).unflatten(0, (self.shards, self.heads)).sum(0)

    def _run_again(self, indices: range, weights: FastWeights, momentum: FastWeights | None) -> list[Chunk]:
        chunks = []
        for index in indices:
            chunk, _ = self._read(index, weights, momentum)
            chunks.append(chunk)
            if index + 1 < indices.stop:
                weights, momentum = advance(self.stages, chunk.weights, chunk.momentum, chunk.state, chunk.coefficients)
        return chunks

    def _read(self, index: int, weights: FastWeights, momentum: FastWeights | None) -> tuple[Chunk, Tensor]:
        """Read one chunk of the shards that have it, whose rows are the first ones of those given."""
        active, C = self.active[index], self.plan.chunk_size
        rows = active * self.heads
        norm = self.norm
        if active < self.shards:
            weights, momentum = _first(weights, rows), _first(momentum, rows)
            norm = None if norm is None else Norm(norm.weight[:rows], norm.bias[:rows])
        k, x, v, lr = (t[index][:active] for t in self._tokens)
        kx = torch.cat((k, x), dim=2).view(rows, 2 * C, -1)
        c = Coefficients(*(None if t is None else t[index][:active] for t in self._coefficients)).in_rows(rows, C)
        o, state = chunk_forward(
            self.stages, weights, None, momentum, kx, v.reshape(rows, C, -1), lr.reshape(rows, C, 1), norm, c,
            self.plan.intra,
        )  # fmt: skip
        return Chunk(active, weights, momentum, norm, c, state), o

    def _by_chunk(self, t: Tensor) -> Tensor:
        """[J, L, H, …] -> [n, J, H, C, …], a view."""
        t = t.unflatten(1, (-1, self.plan.chunk_size)).transpose(2, 3)
        return t.transpose(0, 1)


def named(weights: FastWeights, momentum: FastWeights | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state that are there, by the names that `ScanInputs` gives them."""
    for fields, group in ((WEIGHTS, weights), (MOMENTUM, momentum)):
        if group is not None:
            yield from ((name, t) for name, t in zip(fields, group, strict=True) if t is not None)


def group(tensors: dict[str, Tensor], fields: tuple[str, ...]) -> FastWeights | None:
    """The inverse of `named` for one of its two groups, or the first `fields` of it."""
    return FastWeights(*(tensors.get(name) for name in fields)) if fields[0] in tensors else None


def _own(weights: FastWeights | None) -> FastWeights | None:
    """[J, H, …] -> [J · H, …], a copy that may be overwritten."""
    if weights is None:
        return None
    return weights.map(lambda t: t.clone(memory_format=torch.contiguous_format).flatten(0, 1))


def _first(weights: FastWeights | None, rows: int) -> FastWeights | None:
    return None if weights is None else weights.map(lambda t: t[:rows])
