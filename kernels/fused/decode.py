"""The decode step: one new token of every row through all memories of a layer, in one launch.

One program per (row, head) walks the memories of the layer: gradient at the anchor, momentum, decay, Q-K projection,
read, and the bookkeeping of chunks and shards, from any position per row. Nothing here asks the device for a number,
so a launch may be captured in a CUDA graph. The state is written in place; outputs are summed in the order of the
memories. A single token leaves tensor cores nothing to do, so products of a row and a matrix are sums over tiles.

Rows are [1, D] or [1, M], of the state's dtype. `weights`, `anchor` and `momentum` point to the packed state of one
memory and head, see `kernels/stack.py`; `momentum` is not read where there is none.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from ..stack import MemoryStack
from ..step import StepMemory
from .math import gelu_sigmoid, gelu_slope, normalise, normalise_backward, unit

WARPS = 8


@triton.jit
def column(x):
    """[1, F] → [F, 1]. By way of a vector: a transposed row would hold each entry several times a thread."""
    return tl.reshape(x, [x.shape[1]])[:, None]


@triton.jit
def row_times(x, matrix):
    """x [1, R] times a matrix [R, F] → [1, F]."""
    return tl.sum(column(x) * matrix, axis=0)[None, :]


@triton.jit
def copy(source, target, COUNT: tl.constexpr):
    """COUNT neighbouring entries."""
    BLOCK: tl.constexpr = 1024
    for first in range(0, COUNT, BLOCK):
        where = first + tl.arange(0, BLOCK)
        inside = where < COUNT
        tl.store(target + where, tl.load(source + where, mask=inside).to(target.dtype.element_ty), mask=inside)


@triton.jit
def clear(target, COUNT: tl.constexpr):
    """COUNT neighbouring entries become zero."""
    BLOCK: tl.constexpr = 1024
    for first in range(0, COUNT, BLOCK):
        where = first + tl.arange(0, BLOCK)
        tl.store(target + where, tl.zeros([BLOCK], target.dtype.element_ty), mask=where < COUNT)


@triton.jit
def advance(
    step, before, weights, anchor, momentum, where, m, keep, r, at_start, at_end,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """`S = m S − lr G`, `W = keep W + S` in place at the offsets `where`, given step = lr G; returns what a read meets.

    `before` is the anchor's value, and used if SCALED. At the end of a chunk the weights become the next anchor; at its
    start the stored anchor need not be the weights yet (after a restart, or from a call with another chunk size).
    """
    old = tl.load(weights + where)
    s = -step
    if MOMENTUM:
        s += m * tl.load(momentum + where)
    w = old
    if DECAY:
        w *= keep
    w += s
    read = w
    if SCALED:
        read = before + r * (w - before)
        w = tl.where(at_end, read, w)
    tl.debug_barrier()  # another thread may still have to load what this one is about to overwrite
    tl.store(weights + where, w)
    if MOMENTUM:
        tl.store(momentum + where, s)
    if at_start | at_end:
        tl.store(anchor + where, tl.where(at_end, w, old))
    return read


@triton.jit
def output_step(z, k, v, lr, norm_weight, norm_bias, NORM: tl.constexpr):
    """lr times the derivative of `½‖f(W, k) − v‖²` by the last layer's output z."""
    if NORM:
        n, rstd = normalise(z)
        delta = normalise_backward(n, rstd, (k + n * norm_weight + norm_bias - v) * norm_weight)
    else:
        delta = z - v
    return lr * delta


@triton.jit
def output(y, x, norm_weight, norm_bias, NORM: tl.constexpr):
    """`f(W, x)` of the last layer's output y: `x + LN(y)`, or y."""
    o = y
    if NORM:
        n, _ = normalise(y)
        o = x + n * norm_weight + norm_bias
    return o


@triton.jit
def project(
    q, k, projection, at_start, at_end,
    D: tl.constexpr, BY_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """`M += k kᵀ/‖k‖²` in place, then `x = q M`; the sum of a chunk begins anew with each."""
    where = tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    total = tl.load(projection + where)
    unit_k, _ = unit(k)
    if BY_CHUNK:
        total = tl.where(at_start, 0.0, total)
    total += column(unit_k) * unit_k
    tl.debug_barrier()  # as in `advance`
    if BY_CHUNK:
        tl.store(projection + where, tl.where(at_end, 0.0, total))
    else:
        tl.store(projection + where, total)
    x = row_times(q, total)
    if NORMALIZE:
        x, _ = unit(x)
    return x


@triton.jit
def step_linear(
    k, v, x, lr, norm_weight, norm_bias, weights, anchor, momentum, m, keep, r, at_start, at_end,
    D: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, IS_GLOBAL: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Learn from k, v and read at x with a linear memory."""
    feature = tl.arange(0, D)[None, :]
    at_w = tl.arange(0, D)[:, None] * D + feature
    at_b = D * D + feature
    chunk_start = anchor
    if at_start:
        chunk_start = weights

    w = tl.load(chunk_start + at_w)
    z = row_times(k, w)
    y = row_times(x, w)
    if BIAS:
        b = tl.load(chunk_start + at_b)
        z += b
        y += b
    delta = output_step(z, k, v, lr, norm_weight, norm_bias, NORM)
    w = advance(
        column(k) * delta, w, weights, anchor, momentum, at_w, m, keep, r, at_start, at_end, MOMENTUM, DECAY, SCALED
    )
    if not IS_GLOBAL:
        y = row_times(x, w)
    if BIAS:
        b = advance(
            delta, b, weights, anchor, momentum, at_b, m, keep, r, at_start, at_end, MOMENTUM, DECAY, SCALED
        )  # fmt: skip
        if not IS_GLOBAL:
            y += b
    return output(y, x, norm_weight, norm_bias, NORM)


@triton.jit
def step_mlp(
    k, v, x, lr, norm_weight, norm_bias, weights, anchor, momentum, m, keep, r, at_start, at_end,
    D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, IS_GLOBAL: tl.constexpr,
    MOMENTUM: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Learn from k, v and read at x with an MLP, TILE hidden units at a time: once to its output, once back."""
    feature = tl.arange(0, D)[None, :]
    hidden = tl.arange(0, TILE)[None, :]
    at_b1 = D * M + hidden
    at_w1 = tl.arange(0, D)[:, None] * M + hidden
    at_w2 = D * M + (M if BIAS else 0) + tl.arange(0, TILE)[:, None] * D + feature
    at_b2 = D * M + M + M * D + feature
    chunk_start = anchor
    if at_start:
        chunk_start = weights

    z2 = tl.zeros_like(k)
    y2 = tl.zeros_like(k)
    for first in range(0, M, TILE):
        w1 = tl.load(chunk_start + first + at_w1)
        w2 = tl.load(chunk_start + first * D + at_w2)
        z1 = row_times(k, w1)
        y1 = row_times(x, w1)
        if BIAS:
            b1 = tl.load(chunk_start + first + at_b1)
            z1 += b1
            y1 += b1
        z2 += row_times(z1 * gelu_sigmoid(z1), w2)
        if IS_GLOBAL:
            y2 += row_times(y1 * gelu_sigmoid(y1), w2)
    if BIAS:
        b2 = tl.load(chunk_start + at_b2)
        z2 += b2
        y2 += b2
    delta2 = output_step(z2, k, v, lr, norm_weight, norm_bias, NORM)

    read2 = tl.zeros_like(k)
    for first in range(0, M, TILE):
        w1 = tl.load(chunk_start + first + at_w1)
        w2 = tl.load(chunk_start + first * D + at_w2)
        z1 = row_times(k, w1)
        if BIAS:
            b1 = tl.load(chunk_start + first + at_b1)
            z1 += b1
        s1 = gelu_sigmoid(z1)
        delta1 = tl.sum(w2 * delta2, axis=1)[None, :] * gelu_slope(z1, s1)
        w1 = advance(
            column(k) * delta1, w1, weights, anchor, momentum, first + at_w1, m, keep, r, at_start, at_end,
            MOMENTUM, DECAY, SCALED,
        )  # fmt: skip
        y1 = row_times(x, w1)
        if BIAS:
            b1 = advance(
                delta1, b1, weights, anchor, momentum, first + at_b1, m, keep, r, at_start, at_end,
                MOMENTUM, DECAY, SCALED,
            )  # fmt: skip
            y1 += b1
        w2 = advance(
            column(z1 * s1) * delta2, w2, weights, anchor, momentum, first * D + at_w2, m, keep, r, at_start, at_end,
            MOMENTUM, DECAY, SCALED,
        )  # fmt: skip
        if not IS_GLOBAL:
            read2 += row_times(y1 * gelu_sigmoid(y1), w2)
    if BIAS:
        b2 = advance(
            delta2, b2, weights, anchor, momentum, at_b2, m, keep, r, at_start, at_end, MOMENTUM, DECAY, SCALED
        )
        read2 += b2
    return output(y2 if IS_GLOBAL else read2, x, norm_weight, norm_bias, NORM)


@triton.jit
def decode_kernel(
    q_pointer, k_pointer, v_pointer,  # [rows, H, D], features contiguous
    o_pointer,  # [rows, H, D]
    active_pointer,  # [rows] bool: is there a token; or None: everywhere
    lr, momentum, decay,  # one [rows, H] for each memory; momentum and decay may be None
    token_scale,  # one [chunk size] for each memory (anything where it is not SCALED), or None
    learned_w1, learned_b1,  # one [H, D, M], [H, M] for each memory; biases may be None
    learned_w2, learned_b2,  # one [H, M, D], [H, D] for each memory; None: linear memories
    norm_weight, norm_bias,  # one [H, D] for each memory, or None
    weights_pointer,  # [groups, memories, rows, H, P], groups: weights, anchor and, with MOMENTUM, momentum
    projection_pointer,  # [memories with a projection, rows, H, D, D]
    position_pointer,  # [memories, rows, H] int64
    q_row, q_head, k_row, k_head, v_row, v_head,  # strides
    MEMORIES: tl.constexpr, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, TILE: tl.constexpr,
    MLP: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, DECAY: tl.constexpr,
    # One entry for each memory. SHARDS: 0 is never; SLOTS: index among the projections, -1 without one.
    CHUNKS: tl.constexpr, SHARDS: tl.constexpr, IS_GLOBAL: tl.constexpr, SCALED: tl.constexpr,
    SLOTS: tl.constexpr, BY_CHUNK: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    head = tl.program_id(1)
    DT: tl.constexpr = weights_pointer.dtype.element_ty
    W2_AT: tl.constexpr = D * M + (M if BIAS else 0)
    B2_AT: tl.constexpr = W2_AT + M * D
    P: tl.constexpr = (B2_AT + (D if BIAS else 0)) if MLP else W2_AT
    feature = tl.arange(0, D)[None, :]
    o_at = o_pointer + (row * H + head) * D + feature
    if active_pointer is not None:
        if tl.load(active_pointer + row) == 0:
            tl.store(o_at, tl.zeros([1, D], o_pointer.dtype.element_ty))
            return

    q = tl.load(q_pointer + row * q_row + head * q_head + feature).to(DT)
    k = tl.load(k_pointer + row * k_row + head * k_head + feature).to(DT)
    v = tl.load(v_pointer + row * v_row + head * v_head + feature).to(DT)
    total = tl.zeros([1, D], DT)
    for i in tl.static_range(MEMORIES):
        weights = weights_pointer + ((i * rows + row) * H + head) * P
        anchor = weights + MEMORIES * rows * H * P
        surprise = weights
        if MOMENTUM:
            surprise = anchor + MEMORIES * rows * H * P
        projection = projection_pointer + ((SLOTS[i] * rows + row) * H + head) * D * D
        position_at = position_pointer + (i * rows + row) * H + head
        position = tl.load(position_at)
        at_start = position % CHUNKS[i] == 0
        at_end = (position + 1) % CHUNKS[i] == 0
        if SHARDS[i] > 0:
            if position % SHARDS[i] == 0:
                copy(learned_w1[i] + head * D * M, weights, D * M)
                if BIAS:
                    copy(learned_b1[i] + head * M, weights + D * M, M)
                if MLP:
                    copy(learned_w2[i] + head * M * D, weights + W2_AT, M * D)
                if MLP and BIAS:
                    copy(learned_b2[i] + head * D, weights + B2_AT, D)
                if MOMENTUM:
                    clear(surprise, P)
                if SLOTS[i] >= 0:
                    clear(projection, D * D)
                tl.debug_barrier()  # what some threads have written, others read

        gate_at = row * H + head
        step_size = tl.load(lr[i] + gate_at).to(DT)
        m = 0.0
        keep = 1.0
        r = 1.0
        if MOMENTUM:
            m = tl.load(momentum[i] + gate_at).to(DT)
        if DECAY:
            keep = 1 - tl.load(decay[i] + gate_at).to(DT)
        if SCALED[i]:
            r = tl.load(token_scale[i] + position % CHUNKS[i]).to(DT)
        norm_w = 0.0
        norm_b = 0.0
        if NORM:
            norm_w = tl.load(norm_weight[i] + head * D + feature).to(DT)
            norm_b = tl.load(norm_bias[i] + head * D + feature).to(DT)
        x = q
        if SLOTS[i] >= 0:
            x = project(q, k, projection, at_start, at_end, D, BY_CHUNK[i], NORMALIZE[i])
        if MLP:
            o = step_mlp(
                k, v, x, step_size, norm_w, norm_b, weights, anchor, surprise, m, keep, r, at_start, at_end,
                D, M, TILE, BIAS, NORM, IS_GLOBAL[i], MOMENTUM, DECAY, SCALED[i],
            )  # fmt: skip
        else:
            o = step_linear(
                k, v, x, step_size, norm_w, norm_b, weights, anchor, surprise, m, keep, r, at_start, at_end,
                D, BIAS, NORM, IS_GLOBAL[i], MOMENTUM, DECAY, SCALED[i],
            )  # fmt: skip
        total += o
        tl.store(position_at, position + 1)
    tl.store(o_at, total.to(o_pointer.dtype.element_ty))


# How the operator's `projections` name the projection of a memory.
PROJECTIONS = ("none", "shard", "chunk")

# The fields of `MemoryParams` that the operator takes, in its order.
PARAMS = ("w1", "b1", "w2", "b2", "norm_weight", "norm_bias")


@operator(lambda q, *_: _empty_output(q), mutates_args=("weights", "projection", "position"))
def decode_step(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor | None,
    lr: list[Tensor], momentum: list[Tensor], decay: list[Tensor], token_scale: list[Tensor],
    w1: list[Tensor], b1: list[Tensor], w2: list[Tensor], b2: list[Tensor],
    norm_weight: list[Tensor], norm_bias: list[Tensor],
    weights: Tensor, projection: Tensor, position: Tensor,
    chunk_sizes: list[int], shard_lengths: list[int], is_global: list[bool], is_scaled: list[bool],
    projections: list[int], slots: list[int], normalize: list[bool],
) -> Tensor:  # fmt: skip
    """The sum of the memories' outputs [rows, H, D], in the dtype of q; see `decode_kernel` for the shapes.

    Lists have one entry for each memory, or none where the memories have nothing of the kind. `shard_lengths`: 0 is
    never; `projections`: indices into PROJECTIONS.
    """
    rows, H, D = q.shape
    M = w1[0].shape[-1]
    o = _empty_output(q)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))

    def pointers(tensors: list[Tensor]) -> tuple[Tensor, ...] | None:
        return tuple(t.contiguous() for t in tensors) or None

    with torch.cuda.device_of(q):
        decode_kernel[(rows, H)](
            q, k, v, o, active, pointers(lr), pointers(momentum), pointers(decay), pointers(token_scale),
            pointers(w1), pointers(b1), pointers(w2), pointers(b2), pointers(norm_weight), pointers(norm_bias),
            weights, projection, position, *(x.stride(i) for x in (q, k, v) for i in (0, 1)),
            MEMORIES=len(lr), H=H, D=D, M=M, TILE=tile(D, M), MLP=bool(w2), BIAS=bool(b1), NORM=bool(norm_weight),
            MOMENTUM=bool(momentum), DECAY=bool(decay), CHUNKS=tuple(chunk_sizes), SHARDS=tuple(shard_lengths),
            IS_GLOBAL=tuple(is_global), SCALED=tuple(is_scaled), SLOTS=tuple(slots),
            BY_CHUNK=tuple(PROJECTIONS[p] == "chunk" for p in projections), NORMALIZE=tuple(normalize),
            num_warps=WARPS,
        )  # fmt: skip
    return o


def _empty_output(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def tile(D: int, M: int) -> int:
    """Hidden units at a time, a power of two that divides M: as many as registers hold without a spill."""
    return min(M & -M, 128 if D <= 64 else 32)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None
) -> Tensor:
    """See `step.step_memories`, whose checks the arguments have passed."""

    def each(values: list[Tensor | None]) -> list[Tensor]:
        return [] if values[0] is None else values

    scaled = [m.token_scale is not None for m in memories]
    # The kernel does not look at the token scale of a memory that has none.
    token_scale = [m.lr if m.token_scale is None else m.token_scale for m in memories] if any(scaled) else []
    return decode_step(
        q, k, v, active,
        *(each([getattr(m, name) for m in memories]) for name in ("lr", "momentum", "decay")), token_scale,
        *(each([getattr(m.params, name) for m in memories]) for name in PARAMS),
        stack.weights, stack.projection, stack.position,
        [m.chunk_size for m in memories], [m.shard_length or 0 for m in memories], [m.is_global for m in memories],
        scaled, [PROJECTIONS.index(m.qk_projection) for m in memories], stack.slots,
        [m.normalize_projection for m in memories],
    )  # fmt: skip
