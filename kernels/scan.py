"""The sequential part of the torch backend: chunk after chunk over many shards at once, with an analytic backward.

Both directions are custom operators, so that `torch.compile` and activation checkpointing see one node each. The
forward keeps the weights at the start of every `interval`-th chunk; the backward recomputes a group of chunks from
there. Shards are sorted by length, so those that are still running are always the first ones and nothing is computed
for padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import ChunkState, Coefficients, Norm, advance, chunk_forward
from .chunk_backward import chunk_backward
from .types import FastWeights

# Shards are taken in slabs whose fast weights fit into the caches of a CPU; see tests/benchmarks/LOG.md.
SLAB_BYTES = 2 << 20

_WEIGHTS = FastWeights._fields
_MOMENTUM = tuple(f"momentum_{name}" for name in _WEIGHTS)


class ScanInputs(NamedTuple):
    """The tensors of a scan over J shards of at most L = n · C tokens, H heads; None where the memory does without.

    x, k, v        [J, L, H, D] read rows, keys, values
    lr             [J, L, H]
    w1 … b2        [J, H, …] weights at the start of each shard; momentum_* alike
    norm_*         [H, D]
    coefficients   as in `Coefficients`: theta [J, n, H, C, C], per token [J, n, H, C], per chunk [J, n, H]
    """

    x: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    w1: Tensor
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    momentum_w1: Tensor | None = None
    momentum_b1: Tensor | None = None
    momentum_w2: Tensor | None = None
    momentum_b2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    theta: Tensor | None = None
    read_decay: Tensor | None = None
    read_momentum: Tensor | None = None
    end_gain: Tensor | None = None
    end_decay: Tensor | None = None
    end_momentum: Tensor | None = None
    momentum_gain: Tensor | None = None
    momentum_decay: Tensor | None = None

    @property
    def weights(self) -> FastWeights:
        return FastWeights(*(getattr(self, name) for name in _WEIGHTS))

    @property
    def momentum(self) -> FastWeights | None:
        return None if self.momentum_w1 is None else FastWeights(*(getattr(self, name) for name in _MOMENTUM))

    def shards(self, first: int, last: int) -> ScanInputs:
        """The inputs of some of the shards, as views."""
        return ScanInputs(
            **{k: t if t is None or k.startswith("norm_") else t[first:last] for k, t in self._asdict().items()}
        )


class ScanPlan(NamedTuple):
    """lengths: number of chunks of each shard, falling. interval: chunks between kept states, 0 to keep none."""

    lengths: list[int]
    chunk_size: int
    intra: bool
    interval: int

    def active(self, chunk: int) -> int:
        """How many shards (the first ones) have this chunk."""
        return sum(n > chunk for n in self.lengths)


def scan_chunks(
    inputs: ScanInputs, lengths: list[int], chunk_size: int, intra: bool
) -> tuple[Tensor, FastWeights, FastWeights | None]:
    """Read J independent shards of whole chunks.

    Args:
        inputs: see `ScanInputs`.
        lengths: chunks per shard, falling, at least 1 each, `lengths[0] * chunk_size == L`.
        intra: see `chunk_forward`.

    Returns:
        o [J, L, H, D] (zero past a shard's end), and weights and momentum after each shard.
    """
    names = [name for name, t in inputs._asdict().items() if t is not None]
    tensors = [getattr(inputs, name) for name in names]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    interval = math.isqrt(lengths[0] - 1) + 1 if needs_grad else 0
    o, *ends = torch.ops.modeling_tnt.scan_forward(tensors, ",".join(names), lengths, chunk_size, intra, interval)
    state = [name for name in names if name in _WEIGHTS + _MOMENTUM]
    end = dict(zip(state, ends, strict=False))
    weights = FastWeights(*(end.get(name) for name in _WEIGHTS))
    has_momentum = inputs.momentum_w1 is not None
    return o, weights, FastWeights(*(end.get(name) for name in _MOMENTUM)) if has_momentum else None


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep what the scan frees instead of handing it back to the system and mapping it afresh.

    Its malloc raises both of its thresholds (mmap and trim) when a large mapped block is freed, so freeing one that was
    never touched is enough; 36,000 page faults a call became 18, and a step 1.3 times faster (tests/benchmarks/LOG.md).
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _rows(t: Tensor) -> Tensor:
    """[J, C, H, …] -> [J · H, C, …]."""
    return t.transpose(1, 2).flatten(0, 1)


def _chunk_inputs(inputs: ScanInputs, chunk: int, active: int, C: int) -> tuple[Tensor, Tensor, Tensor, Coefficients]:
    """kx, v, lr and coefficients of one chunk of the active shards, in rows."""
    span = slice(chunk * C, (chunk + 1) * C)
    k, x, v, lr = (t[:active, span] for t in (inputs.k, inputs.x, inputs.v, inputs.lr))
    kx = torch.cat((k.transpose(1, 2), x.transpose(1, 2)), dim=2).flatten(0, 1)
    shapes = {"theta": (C, C), "end_decay": (1, 1), "end_momentum": (1, 1), "momentum_decay": (1, 1)}
    coefficients = {}
    for name in Coefficients._fields:
        t = getattr(inputs, name)
        coefficients[name] = None if t is None else t[:active, chunk].reshape(-1, *shapes.get(name, (C, 1)))
    return kx, _rows(v), _rows(lr).unsqueeze(-1), Coefficients(**coefficients)


def _norm_rows(inputs: ScanInputs, shards: int) -> Norm | None:
    if inputs.norm_weight is None:
        return None
    return Norm(*(t.repeat(shards, 1).unsqueeze(1) for t in (inputs.norm_weight, inputs.norm_bias)))


def _own(weights: FastWeights | None) -> FastWeights | None:
    """[J, H, …] -> [J · H, …], a copy that may be overwritten."""
    if weights is None:
        return None
    return weights.map(lambda t: t.clone(memory_format=torch.contiguous_format).flatten(0, 1))


class _Chunk(NamedTuple):
    """A chunk as the forward leaves it for the backward."""

    index: int
    active: int
    weights: FastWeights
    momentum: FastWeights | None
    norm: Norm | None
    coefficients: Coefficients
    state: ChunkState


def _read_chunk(
    inputs: ScanInputs,
    plan: ScanPlan,
    index: int,
    weights: FastWeights,
    momentum: FastWeights | None,
    norm: Norm | None,
) -> tuple[_Chunk, Tensor]:
    """Read one chunk of the shards that have it, whose rows are the first ones of those given."""
    active = plan.active(index)
    rows = active * inputs.x.shape[2]
    weights, momentum = _first(weights, rows), _first(momentum, rows)
    norm = None if norm is None else Norm(norm.weight[:rows], norm.bias[:rows])
    kx, v, lr, c = _chunk_inputs(inputs, index, active, plan.chunk_size)
    o, state = chunk_forward(weights, None, momentum, kx, v, lr, norm, c, plan.intra)
    return _Chunk(index, active, weights, momentum, norm, c, state), o


def _first(weights: FastWeights | None, rows: int) -> FastWeights | None:
    return None if weights is None else weights.map(lambda t: t[:rows])


def _slabs(inputs: ScanInputs) -> Iterator[slice]:
    """Shards per slab, by the bytes of their weights."""
    per_shard = sum(t[0].numel() * t.element_size() for t in inputs.weights if t is not None)
    size = max(1, SLAB_BYTES // per_shard)
    for first in range(0, inputs.x.shape[0], size):
        yield slice(first, min(first + size, inputs.x.shape[0]))


def _unpack(tensors: list[Tensor], names: str) -> ScanInputs:
    return ScanInputs(**dict(zip(names.split(","), tensors, strict=True)))


def _store(target: Tensor, rows: Tensor, H: int) -> None:
    """Write [N, C, …] rows to [J, C, H, …]."""
    target.copy_(rows.unflatten(0, (-1, H)).transpose(1, 2))


@torch.library.custom_op("modeling_tnt::scan_forward", mutates_args=())
def scan_forward(
    tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, intra: bool, interval: int
) -> list[Tensor]:
    """o, the state after each shard, and the states kept for the backward [chunks / interval, J, H, …]."""
    inputs = _unpack(tensors, names)
    outputs = _empty_outputs(inputs, lengths, interval)
    o, state_names = outputs["o"], [n for n in names.split(",") if n in _WEIGHTS + _MOMENTUM]
    H = o.shape[2]
    with torch.autocast(o.device.type, enabled=False):
        for slab in _slabs(inputs):
            part = inputs.shards(slab.start, slab.stop)
            plan = ScanPlan(lengths[slab], chunk_size, intra, interval)
            weights, momentum = _own(part.weights), _own(part.momentum)
            norm = _norm_rows(part, len(plan.lengths))
            for index in range(plan.lengths[0]):
                chunk, o_rows = _read_chunk(part, plan, index, weights, momentum, norm)
                span = slice(index * chunk_size, (index + 1) * chunk_size)
                _store(o[slab][: chunk.active, span], o_rows, H)
                if interval and index % interval == 0:
                    for name, t in _named(chunk.weights, chunk.momentum):
                        kept = outputs[f"kept_{name}"][index // interval, slab]
                        kept[: chunk.active] = t.unflatten(0, (-1, H))
                advance(chunk.weights, chunk.momentum, chunk.state, chunk.coefficients, overwrite=True)
            for name, t in _named(weights, momentum):
                outputs[name][slab] = t.unflatten(0, (-1, H))
    return [outputs[key] for key in ("o", *state_names, *(f"kept_{n}" for n in state_names if interval))]


@scan_forward.register_fake
def _(
    tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, intra: bool, interval: int
) -> list[Tensor]:
    return list(_empty_outputs(_unpack(tensors, names), lengths, interval).values())


def _named(weights: FastWeights, momentum: FastWeights | None) -> Iterator[tuple[str, Tensor]]:
    for fields, group in ((_WEIGHTS, weights), (_MOMENTUM, momentum)):
        if group is not None:
            yield from ((name, t) for name, t in zip(fields, group, strict=True) if t is not None)


def _empty_outputs(inputs: ScanInputs, lengths: list[int], interval: int) -> dict[str, Tensor]:
    ragged = lengths[-1] < lengths[0]
    o = torch.zeros_like(inputs.x) if ragged else torch.empty_like(inputs.x)
    outputs = {"o": o.contiguous()}
    state = dict(_named(inputs.weights, inputs.momentum))
    outputs |= {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in state.items()}
    if interval:
        groups = -(-lengths[0] // interval)
        outputs |= {f"kept_{name}": t.new_empty((groups, *t.shape)) for name, t in state.items()}
    return outputs


@torch.library.custom_op("modeling_tnt::scan_backward", mutates_args=())
def scan_backward(
    tensors: list[Tensor],
    names: str,
    kept: list[Tensor],
    grads: list[Tensor],
    grad_names: str,
    lengths: list[int],
    chunk_size: int,
    intra: bool,
    interval: int,
) -> list[Tensor]:
    """Gradients of all `tensors`, from those of o and of the state after each shard (missing ones are zero)."""
    if tensors[0].device.type == "cpu":
        _keep_freed_memory()
    inputs = _unpack(tensors, names)
    given = dict(zip(grad_names.split(","), grads, strict=True))
    state = list(_named(inputs.weights, inputs.momentum))
    kept_by_name = dict(zip((name for name, _ in state), kept, strict=True))
    ragged = lengths[-1] < lengths[0]
    if ragged:  # past a shard's end o is a constant zero
        chunk_of_token = torch.arange(inputs.x.shape[1], device=inputs.x.device) // chunk_size
        reached = chunk_of_token < torch.tensor(lengths, device=inputs.x.device)[:, None]
        given["o"] = given["o"] * reached[:, :, None, None]
    out = {
        name: torch.zeros_like(t, memory_format=torch.contiguous_format)
        if ragged or name.startswith("norm_")
        else torch.empty_like(t, memory_format=torch.contiguous_format)
        for name, t in zip(names.split(","), tensors, strict=True)
    }
    for name, t in state:
        out[name] = given[name].clone(memory_format=torch.contiguous_format) if name in given else torch.zeros_like(t)
        out[name] = out[name].contiguous()
    with torch.autocast(inputs.x.device.type, enabled=False):
        for slab in _slabs(inputs):
            plan = ScanPlan(lengths[slab], chunk_size, intra, interval)
            part = inputs.shards(slab.start, slab.stop)
            part_kept = {name: t[:, slab] for name, t in kept_by_name.items()}
            part_out = {name: t if name.startswith("norm_") else t[slab] for name, t in out.items()}
            _backward_slab(part, plan, part_kept, given["o"][slab], part_out)
    if inputs.norm_weight is not None:
        out["norm_bias"] = given["o"].sum((0, 1)) - out["v"].sum((0, 1))
    return [out[name] for name in names.split(",")]


def _backward_slab(
    inputs: ScanInputs, plan: ScanPlan, kept: dict[str, Tensor], grad_o: Tensor, out: dict[str, Tensor]
) -> None:
    """Write the gradients of one slab into `out`, whose state entries hold the gradients of the end state."""
    J, H, C = len(plan.lengths), inputs.x.shape[2], plan.chunk_size
    D = inputs.x.shape[-1]
    flat = {name: out[name].flatten(0, 1) for name, _ in _named(inputs.weights, inputs.momentum)}
    grad_weights = FastWeights(*(flat.get(name) for name in _WEIGHTS))
    grad_momentum = None if inputs.momentum is None else FastWeights(*(flat.get(name) for name in _MOMENTUM))
    grad_norm_weight = None if inputs.norm_weight is None else inputs.x.new_zeros(J * H, C, D)
    norm = _norm_rows(inputs, J)
    total = plan.lengths[0]
    for start in reversed(range(0, total, plan.interval)):
        at_start = {name: t[start // plan.interval].flatten(0, 1) for name, t in kept.items()}
        weights = FastWeights(*(at_start.get(name) for name in _WEIGHTS))
        momentum = None if grad_momentum is None else FastWeights(*(at_start.get(name) for name in _MOMENTUM))
        stop = min(start + plan.interval, total)
        chunks = []
        for index in range(start, stop):
            chunks.append(_read_chunk(inputs, plan, index, weights, momentum, norm)[0])
            if index + 1 < stop:
                weights, momentum = advance(*chunks[-1][2:4], chunks[-1].state, chunks[-1].coefficients)
        while chunks:
            chunk = chunks.pop()
            span, rows = slice(chunk.index * C, (chunk.index + 1) * C), chunk.active * H
            g = chunk_backward(
                chunk.state,
                chunk.weights,
                chunk.momentum,
                chunk.norm,
                chunk.coefficients,
                plan.intra,
                _rows(grad_o[: chunk.active, span]),
                _first(grad_weights, rows),
                _first(grad_momentum, rows),
                None if chunk.norm is None else grad_norm_weight[:rows],
            )
            for name in ("x", "k", "v"):
                _store(out[name][: chunk.active, span], getattr(g, name), H)
            _store(out["lr"][: chunk.active, span], g.lr.squeeze(-1), H)
            for name, grad in g.coefficients._asdict().items():
                if grad is not None:
                    target = out[name][: chunk.active, chunk.index]
                    target.copy_(grad.view(target.shape))
    if grad_norm_weight is not None:
        out["norm_weight"] += grad_norm_weight.sum(1).unflatten(0, (J, H)).sum(0)


@scan_backward.register_fake
def _(
    tensors: list[Tensor],
    names: str,
    kept: list[Tensor],
    grads: list[Tensor],
    grad_names: str,
    lengths: list[int],
    chunk_size: int,
    intra: bool,
    interval: int,
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]


def _setup_context(ctx, inputs, output) -> None:
    tensors, names, lengths, chunk_size, intra, interval = inputs
    ctx.set_materialize_grads(False)
    states = sum(name in _WEIGHTS + _MOMENTUM for name in names.split(","))
    ctx.save_for_backward(*tensors, *output[1 + states :])
    ctx.tensors, ctx.states = len(tensors), states
    ctx.arguments = (names, lengths, chunk_size, intra, interval)


def _autograd_backward(ctx, grads):
    names, lengths, chunk_size, intra, interval = ctx.arguments
    saved = ctx.saved_tensors
    tensors, kept = list(saved[: ctx.tensors]), list(saved[ctx.tensors :])
    state_names = [name for name in names.split(",") if name in _WEIGHTS + _MOMENTUM]
    given = {name: g for name, g in zip(("o", *state_names), grads, strict=False) if g is not None}
    if "o" not in given:
        given["o"] = torch.zeros_like(tensors[0])
    result = torch.ops.modeling_tnt.scan_backward(
        tensors, names, kept, list(given.values()), ",".join(given), lengths, chunk_size, intra, interval
    )
    return result, None, None, None, None, None


scan_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
