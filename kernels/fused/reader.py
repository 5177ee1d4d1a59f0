"""Reads by Triton's kernels.

A local memory is read by a kernel that walks the chunks of a segment with the fast weights on chip; this module turns a
checked problem into what it takes: a table of segments, packed states, float32 scalars. The global memory has few and
large chunks: its products are torch's, with fused kernels between them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import MemoryProblem
from ..torch_backend.reader import Reader
from ..torch_backend.segments import final_positions, plan_segments, segment_table, sequence_lengths
from ..torch_backend.slab import ScanInputs as ChunkInputs
from ..types import FastWeights, MemoryParams, MemoryState
from .global_scan import scan_global_chunks
from .limits import tiles_for
from .local_scan import EndState, Plan, ScanInputs, scan_segments

_PROJECTIONS = {"none": 0, "shard": 1, "chunk": 2}


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    if problem.options.is_global:
        return _GlobalReader(problem, output_final_state).read()
    return _read_local(problem, output_final_state)


def _read_local(p: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    options = p.options
    B, T, H, D = p.q.shape
    params = MemoryParams(*(None if t is None else t.float() for t in p.params))
    # Where a sequence stands in its chunk and shard decides how it is cut: behind a state, the device is waited for.
    positions = None if p.initial_state is None else p.initial_state.position.tolist()
    lengths, C = sequence_lengths(p), options.chunk_size
    segments = plan_segments(lengths, positions, C, options.shard_length, output_final_state)
    multi_start = any(segment.offset for segment in segments)
    tiles = tiles_for(p, multi_start)
    inputs = _inputs(p, params, tiles.multi)
    max_chunks = max(-(-(s.offset + s.count) // options.chunk_size) for s in segments)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    plan = Plan(
        hidden=params.w1.shape[-1], is_mlp=int(params.w2 is not None), has_b1=int(params.b1 is not None),
        has_b2=int(params.b2 is not None), chunk_size=options.chunk_size,
        projection=_PROJECTIONS[options.qk_projection],
        normalize=int(options.normalize_projection), multi=int(tiles.multi), max_chunks=max(max_chunks, 1),
        interval=math.isqrt(max(max_chunks, 1) - 1) + 1 if needs_grad else 0,
        ends=p.rows if output_final_state else 0, rows=tiles.rows, projection_rows=tiles.projection_rows,
        forward_warps=tiles.forward_warps, recompute_warps=tiles.recompute_warps, backward_warps=tiles.backward_warps,
        forward_stages=tiles.forward_stages, backward_stages=tiles.backward_stages, tall=int(tiles.tall),
    )  # fmt: skip
    table = segment_table(segments, p, output_final_state)
    with torch.autocast(p.q.device.type, enabled=False):
        o, end = scan_segments(inputs, table, plan)
    o = o.view(B, T, H, D)
    return o, _final_state(p, params, end) if output_final_state else None


class _GlobalReader(Reader):
    """The torch backend's planning around the fused scan; begun and unfinished chunks stay with torch."""

    scans_in_input_dtype = True

    def spares_last_chunk(self) -> bool:
        return False

    def scan(self, inputs: ChunkInputs, lengths: list[int]) -> tuple[Tensor, FastWeights, FastWeights | None]:
        return scan_global_chunks(inputs, lengths, self.options.chunk_size)


def _inputs(p: MemoryProblem, params: MemoryParams, multi: bool) -> ScanInputs:
    """The kernels' tensors. Row 0 of every start state is the learned one, row 1 + n that of sequence n."""

    def scalars(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float().flatten(0, 1).contiguous()

    def rows(first: Tensor, others: Tensor | None) -> Tensor:
        return first if others is None else torch.cat([first, others.float()])

    H, D = p.q.shape[2:]
    state = p.initial_state
    weights = _pack(params.fast_weights.map(lambda t: t.unsqueeze(0)))
    anchor = weights
    momentum = torch.zeros_like(weights) if p.gates.momentum is not None else None
    projection = weights.new_zeros(1, H, D, D) if p.options.qk_projection != "none" else None
    if state is not None:
        weights, anchor = rows(weights, _pack(state.weights)), rows(weights, _pack(state.anchor))
        momentum = None if momentum is None else rows(momentum, _pack(state.momentum))
        projection = None if projection is None else rows(projection, state.projection)
    return ScanInputs(
        *(t.flatten(0, 1).contiguous() for t in (p.q, p.k, p.v)), *map(scalars, p.gates),
        None if p.token_scale is None else p.token_scale.float().contiguous(),
        *(None if t is None else t.contiguous() for t in params.norm),
        weights, anchor if multi else None, momentum, projection,
    )  # fmt: skip


def _pack(weights: FastWeights) -> Tensor:
    """[N, H, P] float32, as the local memory's kernels take it: the first matrix transposed."""
    return _first_transposed(weights).map(Tensor.float).pack()


def _unpack(packed: Tensor, like: FastWeights) -> FastWeights:
    """The inverse of `_pack`, as views; `like` without rows."""
    return _first_transposed(_first_transposed(like.map(lambda t: t.unsqueeze(0))).unpack(packed))


def _first_transposed(weights: FastWeights) -> FastWeights:
    return weights._replace(w1=weights.w1.mT)


def _final_state(p: MemoryProblem, params: MemoryParams, end: EndState) -> MemoryState:
    like = params.fast_weights
    momentum = None if end.momentum is None else _unpack(end.momentum, like)
    weights, anchor = _unpack(end.weights, like), _unpack(end.anchor, like)
    return MemoryState(weights, anchor, momentum, end.projection, final_positions(p))
