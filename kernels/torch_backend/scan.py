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

import torch
from torch import Tensor

from ..operators import OPERATORS, operator
from ..transfer import on_device
from ..types import FastWeights
from .slab import MOMENTUM, WEIGHTS, ScanInputs, ScanPlan, Slab, group, named

# Shards are taken in slabs whose fast weights fit into the caches of a CPU; see tests/benchmarks/LOG.md.
SLAB_BYTES = 4 << 20


def scan_chunks(
    inputs: ScanInputs, memory_type: str, lengths: list[int], chunk_size: int, intra: bool
) -> tuple[Tensor, FastWeights, FastWeights | None]:
    """Read J independent shards of whole chunks.

    Args:
        inputs: see `ScanInputs`.
        memory_type: the kind of memory.
        lengths: chunks per shard, falling, at least 1 each, `lengths[0] * chunk_size == L`.
        intra: see `chunk_forward`.

    Returns:
        o [J, L, H, D] (zero past a shard's end), and weights and momentum after each shard.
    """
    named_tensors = inputs.tensors()
    names, tensors = ",".join(named_tensors), list(named_tensors.values())
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    interval = math.isqrt(lengths[0] - 1) + 1 if needs_grad else 0
    o, *ends = OPERATORS.scan_forward(tensors, names, memory_type, lengths, chunk_size, intra, interval)
    end = dict(zip((name for name, _ in named(inputs.weights, inputs.momentum)), ends, strict=False))
    return o, group(end, WEIGHTS), group(end, MOMENTUM)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what the scan frees instead of handing it back to the system and mapping it afresh.

    Its malloc raises both of its thresholds (mmap and trim) when a large mapped block is freed, so freeing one that was
    never touched is enough; 36,000 page faults a call became 18, and a step 1.3 times faster (tests/benchmarks/LOG.md).
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _slabs(inputs: ScanInputs, lengths: list[int]) -> Iterator[slice]:
    """Shards per slab, by the bytes of their weights; slabs of about the same size."""
    shards = len(lengths)
    per_shard = sum(t[0].numel() * t.element_size() for t in inputs.weights if t is not None)
    slabs = -(-shards // max(1, SLAB_BYTES // per_shard))
    size = -(-shards // slabs)
    for first in range(0, shards, size):
        yield slice(first, min(first + size, shards))


def _unpack(tensors: list[Tensor], names: str) -> ScanInputs:
    return ScanInputs.from_tensors(dict(zip(names.split(","), tensors, strict=True)))


def _fake_forward(
    tensors: list[Tensor], names: str, _type: str, lengths: list[int], _size: int, _intra: bool, interval: int
):
    return list(_empty_outputs(_unpack(tensors, names), lengths, interval).values())


@operator(_fake_forward)
def scan_forward(
    tensors: list[Tensor], names: str, memory_type: str, lengths: list[int], chunk_size: int, intra: bool, interval: int
) -> list[Tensor]:
    """o, the state after each shard, and the states kept for the backward [chunks / interval, J, H, …]."""
    inputs = _unpack(tensors, names)
    outputs = _empty_outputs(inputs, lengths, interval)
    state_names = [name for name in names.split(",") if name in WEIGHTS + MOMENTUM]
    with torch.autocast(inputs.x.device.type, enabled=False):
        for slab in _slabs(inputs, lengths):
            part = {name: t[:, slab] if name.startswith("kept_") else t[slab] for name, t in outputs.items()}
            plan = ScanPlan(memory_type, lengths[slab], chunk_size, intra, interval)
            Slab(inputs.shards(slab.start, slab.stop), plan).forward(part)
    return [outputs[key] for key in ("o", *state_names, *(f"kept_{n}" for n in state_names if interval))]


def _empty_outputs(inputs: ScanInputs, lengths: list[int], interval: int) -> dict[str, Tensor]:
    ragged = lengths[-1] < lengths[0]
    o = torch.zeros_like(inputs.x) if ragged else torch.empty_like(inputs.x)
    outputs = {"o": o.contiguous()}
    state = dict(named(inputs.weights, inputs.momentum))
    outputs |= {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in state.items()}
    if interval:
        groups = -(-lengths[0] // interval)
        outputs |= {f"kept_{name}": t.new_empty((groups, *t.shape)) for name, t in state.items()}
    return outputs


@operator(lambda tensors, *_: [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors])
def scan_backward(
    tensors: list[Tensor],
    names: str,
    kept: list[Tensor],
    grads: list[Tensor],
    grad_names: str,
    memory_type: str,
    lengths: list[int],
    chunk_size: int,
    intra: bool,
    interval: int,
) -> list[Tensor]:
    """Gradients of all `tensors`, from those of o and of the state after each shard (missing ones are zero)."""
    if tensors[0].device.type == "cpu":
        keep_freed_memory()
    inputs = _unpack(tensors, names)
    given = dict(zip(grad_names.split(","), grads, strict=True))
    kept_by_name = dict(zip((name for name, _ in named(inputs.weights, inputs.momentum)), kept, strict=True))
    ragged = lengths[-1] < lengths[0]
    if ragged:  # past a shard's end o is a constant zero
        chunk_of_token = torch.arange(inputs.x.shape[1], device=inputs.x.device) // chunk_size
        reached = chunk_of_token < on_device(lengths, inputs.x)[:, None]
        given["o"] = given["o"] * reached[:, :, None, None]
    out = {}
    for name, t in zip(names.split(","), tensors, strict=True):
        if name in given:  # the gradient of the state after a shard turns into that of the one before it
            out[name] = given[name].clone(memory_format=torch.contiguous_format)
        elif ragged or name.startswith("norm_") or name in kept_by_name:
            out[name] = torch.zeros_like(t, memory_format=torch.contiguous_format)
        else:
            out[name] = torch.empty_like(t, memory_format=torch.contiguous_format)
    with torch.autocast(inputs.x.device.type, enabled=False):
        for slab in _slabs(inputs, lengths):
            part_kept = {name: t[:, slab] for name, t in kept_by_name.items()}
            part_out = {name: t if name.startswith("norm_") else t[slab] for name, t in out.items()}
            plan = ScanPlan(memory_type, lengths[slab], chunk_size, intra, interval)
            Slab(inputs.shards(slab.start, slab.stop), plan).backward(part_kept, given["o"][slab], part_out)
    if inputs.norm_weight is not None:
        out["norm_bias"] = given["o"].sum((0, 1)) - out["v"].sum((0, 1))
    return [out[name] for name in names.split(",")]


def _setup_context(ctx, inputs, output) -> None:
    tensors, names, memory_type, lengths, chunk_size, intra, interval = inputs
    ctx.set_materialize_grads(False)
    states = sum(name in WEIGHTS + MOMENTUM for name in names.split(","))
    ctx.save_for_backward(*tensors, *output[1 + states :])
    ctx.tensors = len(tensors)
    ctx.arguments = (names, memory_type, lengths, chunk_size, intra, interval)


def _autograd_backward(ctx, grads):
    names, *arguments = ctx.arguments
    saved = ctx.saved_tensors
    tensors, kept = list(saved[: ctx.tensors]), list(saved[ctx.tensors :])
    state_names = [name for name in names.split(",") if name in WEIGHTS + MOMENTUM]
    given = {name: g for name, g in zip(("o", *state_names), grads, strict=False) if g is not None}
    if "o" not in given:
        given["o"] = torch.zeros_like(tensors[0])
    result = OPERATORS.scan_backward(tensors, names, kept, list(given.values()), ",".join(given), *arguments)
    return result, None, None, None, None, None, None


scan_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
