"""Reads by the native kernels: a checked problem as the two operators of memory.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import MemoryProblem
from ..operators import OPERATORS, operator
from ..segment_scan import (
    EndState,
    Gradients,
    ScanInputs,
    differentiate,
    final_state,
    gradients_like_inputs,
    scan_inputs,
)
from ..torch_backend.scan import keep_freed_memory
from ..torch_backend.segments import plan_segments, segment_table, sequence_lengths
from ..types import FastWeights, MemoryParams, MemoryState
from .build import library

_PROJECTIONS = {"none": 0, "shard": 1, "chunk": 2}
_ROWS = (8, 16)
"""Tokens that a tile may have."""


class Plan(NamedTuple):
    """The sizes of a call: plain ints (and 0/1), so that an operator can take them as a list.

    hidden      M, the width of the first map's output
    maps        number of linear maps
    biases      bit i: map i has a bias
    chunk_size  C
    projection  0 none, 1 since the last reset, 2 since the start of the chunk; normalize: 0 or 1
    is_global   read at the anchor
    rows        tokens of a tile
    interval    chunks of a group, between two states that are kept for a backward; 0: none is
    groups      of the longest segment
    ends        rows of the end state
    """

    hidden: int
    maps: int
    biases: int
    chunk_size: int
    projection: int
    normalize: int
    is_global: int
    rows: int
    interval: int
    groups: int
    ends: int


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    p, options = problem, problem.options
    C = options.chunk_size
    params = MemoryParams(*(None if t is None else t.float() for t in p.params))
    weights = params.fast_weights
    positions = None if p.initial_state is None else p.initial_state.position.tolist()
    segments = plan_segments(sequence_lengths(p), positions, C, options.shard_length, output_final_state)
    rows = _ROWS[0] if C <= _ROWS[0] else _ROWS[1]
    keeps_anchor = C > rows or any(segment.offset for segment in segments)
    inputs = scan_inputs(p, params, keeps_anchor, _pack)
    chunks = max([1, *(-(-(s.offset + s.count) // C) for s in segments)])
    interval = math.isqrt(chunks - 1) + 1 if inputs.requires_grad else 0
    plan = Plan(
        hidden=weights.w1.shape[-1], maps=len(weights.maps),
        biases=sum((bias is not None) << i for i, (_, bias) in enumerate(weights.maps)),
        chunk_size=C, projection=_PROJECTIONS[options.qk_projection], normalize=int(options.normalize_projection),
        is_global=int(options.is_global), rows=rows, interval=interval,
        groups=-(-chunks // interval) if interval else 0, ends=p.rows if output_final_state else 0,
    )  # fmt: skip
    table = segment_table(segments, p, output_final_state)
    o, *outputs = OPERATORS.native_forward(*inputs, table, list(plan))
    o = o.view(p.q.shape)
    if not output_final_state:
        return o, None
    like = weights.map(lambda t: t.unsqueeze(0))
    return o, final_state(p, EndState.from_outputs(outputs, inputs), like.unpack)


def _pack(weights: FastWeights) -> Tensor:
    return weights.map(lambda t: t.float()).pack().contiguous()


class _Call(ctypes.Structure):
    """`Call` of memory.cpp."""

    _POINTERS = (
        "q", "k", "v", "grad_o", "o", "grad_q", "grad_k", "grad_v", "lr", "momentum", "decay", "scale", "norm_weight",
        "norm_bias", "weights", "anchor", "momentum_state", "projection_state", "segments", "end_weights", "end_anchor",
        "end_momentum", "end_projection", "kept_weights", "kept_momentum", "kept_projection", "grad_lr",
        "grad_momentum", "grad_decay", "grad_scale", "grad_norm_weight", "carry_weights", "carry_anchor",
        "carry_momentum", "carry_projection",
    )  # fmt: skip
    _NUMBERS = (
        "segment_count", "heads", "head_dim", "hidden", "maps", "biases", "chunk_size", "projection", "is_global",
        "normalize", "interval", "is_bfloat16", "rows", "threads",
    )  # fmt: skip
    _fields_ = [(n, ctypes.c_void_p) for n in _POINTERS] + [(n, ctypes.c_int64) for n in _NUMBERS]


def _call(inputs: ScanInputs, segments: Tensor, plan: Plan, tensors: dict[str, Tensor | None]) -> _Call:
    """`tensors` must outlive the call."""
    given = inputs._asdict()
    given["projection_state"] = given.pop("projection")
    pointers = {name: None if t is None else t.data_ptr() for name, t in (given | tensors).items()}
    sizes = plan._asdict()
    del sizes["groups"], sizes["ends"]
    return _Call(
        **pointers, **sizes, segments=segments.data_ptr(), segment_count=segments.shape[0], heads=inputs.q.shape[1],
        head_dim=inputs.q.shape[2], is_bfloat16=int(inputs.q.dtype == torch.bfloat16), threads=torch.get_num_threads(),
    )  # fmt: skip


def _forward_outputs(inputs: ScanInputs, segments: int, plan: Plan) -> dict[str, Tensor]:
    """Unwritten outputs, those that are there, by the names of `_Call`."""
    _, H, D = inputs.q.shape
    kept = plan.groups - 1 if plan.interval else None
    out = {"o": torch.empty_like(inputs.q)}
    for state, rows in (("end", (plan.ends,)), ("kept", (kept, segments))):
        if rows[0] is None:
            continue
        out[f"{state}_weights"] = inputs.lr.new_empty(*rows, H, inputs.weights.shape[-1])
        if state == "end":
            out["end_anchor"] = torch.empty_like(out["end_weights"])
        if inputs.momentum is not None:
            out[f"{state}_momentum"] = torch.empty_like(out[f"{state}_weights"])
        if inputs.projection is not None:
            out[f"{state}_projection"] = inputs.lr.new_empty(*rows, H, D, D)
    return out


def _fake_forward(*arguments) -> list[Tensor]:
    *tensors, segments, plan = arguments
    return list(_forward_outputs(ScanInputs(*tensors), segments.shape[0], Plan(*plan)).values())


@operator(_fake_forward)
def native_forward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, decay: Tensor | None, scale: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    weights: Tensor, anchor: Tensor | None, momentum_state: Tensor | None, projection: Tensor | None,
    segments: Tensor, plan: list[int],
) -> list[Tensor]:  # fmt: skip
    """o, the end states, and the states kept for the backward."""
    inputs = ScanInputs(
        q, k, v, lr, momentum, decay, scale, norm_weight, norm_bias, weights, anchor, momentum_state, projection
    )
    sizes = Plan(*plan)
    out = _forward_outputs(inputs, segments.shape[0], sizes)
    library().tnt_memory_forward(ctypes.byref(_call(inputs, segments, sizes, out)))
    return list(out.values())


@operator(gradients_like_inputs)
def native_backward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Tensor | None, decay: Tensor | None, scale: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None,
    weights: Tensor, anchor: Tensor | None, momentum_state: Tensor | None, projection: Tensor | None,
    kept: list[Tensor], grad_o: Tensor, grad_ends: list[Tensor], segments: Tensor, plan: list[int],
) -> list[Tensor]:  # fmt: skip
    """Gradients of the tensors before `kept` that are there, in that order, from those of o and of the end states."""
    keep_freed_memory()
    inputs = ScanInputs(
        q, k, v, lr, momentum, decay, scale, norm_weight, norm_bias, weights, anchor, momentum_state, projection
    )
    gradients = Gradients(inputs, grad_o, grad_ends, segments)
    names = ("weights", *(name for name in ("momentum", "projection") if getattr(inputs, name) is not None))
    tensors = {f"kept_{name}": t for name, t in zip(names, kept, strict=True)} | {"grad_o": grad_o}
    tensors |= {f"grad_{name}": t for name, t in gradients.out.items()}
    tensors |= {f"carry_{name}": t for name, t in gradients.carried.items()}
    library().tnt_memory_backward(ctypes.byref(_call(inputs, segments, Plan(*plan), tensors)))
    return gradients.finish()


differentiate(native_forward, "native_backward")
