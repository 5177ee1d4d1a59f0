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
from ..segment_scan import final_state, scan_inputs
from ..torch_backend.reader import Reader
from ..torch_backend.segments import plan_segments, segment_table, sequence_lengths
from ..torch_backend.slab import ScanInputs as ChunkInputs
from ..types import FastWeights, MemoryParams, MemoryState
from .global_scan import scan_global_chunks
from .limits import tiles_for
from .local_scan import Plan, scan_segments

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
    inputs = scan_inputs(p, params, tiles.multi, _pack)
    max_chunks = max(-(-(s.offset + s.count) // options.chunk_size) for s in segments)
    plan = Plan(
        hidden=params.w1.shape[-1], is_mlp=int(params.w2 is not None), has_b1=int(params.b1 is not None),
        has_b2=int(params.b2 is not None), chunk_size=options.chunk_size,
        projection=_PROJECTIONS[options.qk_projection],
        normalize=int(options.normalize_projection), multi=int(tiles.multi), max_chunks=max(max_chunks, 1),
        interval=math.isqrt(max(max_chunks, 1) - 1) + 1 if inputs.requires_grad else 0,
        ends=p.rows if output_final_state else 0, rows=tiles.rows, projection_rows=tiles.projection_rows,
        forward_warps=tiles.forward_warps, recompute_warps=tiles.recompute_warps, backward_warps=tiles.backward_warps,
        forward_stages=tiles.forward_stages, backward_stages=tiles.backward_stages, tall=int(tiles.tall),
    )  # fmt: skip
    table = segment_table(segments, p, output_final_state)
    with torch.autocast(p.q.device.type, enabled=False):
        o, end = scan_segments(inputs, table, plan)
    o = o.view(B, T, H, D)
    if not output_final_state:
        return o, None
    return o, final_state(p, end, lambda packed: _unpack(packed, params.fast_weights))


class _GlobalReader(Reader):
    """The torch backend's planning around the fused scan; begun and unfinished chunks stay with torch."""

    scans_in_input_dtype = True

    def spares_last_chunk(self) -> bool:
        return False

    def scan(self, inputs: ChunkInputs, lengths: list[int]) -> tuple[Tensor, FastWeights, FastWeights | None]:
        return scan_global_chunks(inputs, lengths, self.options.chunk_size)


def _pack(weights: FastWeights) -> Tensor:
    """[N, H, P] float32, as the local memory's kernels take it: the first matrix transposed."""
    return _first_transposed(weights).map(Tensor.float).pack()


def _unpack(packed: Tensor, like: FastWeights) -> FastWeights:
    """The inverse of `_pack`, as views; `like` without rows."""
    return _first_transposed(_first_transposed(like.map(lambda t: t.unsqueeze(0))).unpack(packed))


def _first_transposed(weights: FastWeights) -> FastWeights:
    return weights._replace(w1=weights.w1.mT)
