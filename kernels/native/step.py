"""The decode step on a CPU: one new token of every row through all memories of a layer, in one call of step.cpp.

The call's arguments are one structure that is made once a stack, with what does not change: sizes, options, and where
the states lie. A token brings its own pointers and those of the parameters, which may have been written or replaced
since the last one. Nothing is copied but what is no float32, bfloat16 or float16, or does not lie in a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..stack import MemoryStack
from ..types import MemoryGates, MemoryOptions, MemoryParams
from .build import library

KINDS = ("linear", "mlp")

# Numbers of state that are worth a thread: about 20 µs of one. Waking another takes a few.
NUMBERS_A_THREAD = 1 << 16

# What step.cpp widens by itself, by its numbers.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_PLACES = 1 + len(MemoryGates._fields) + len(MemoryParams._fields)


class _Memory(ctypes.Structure):
    """`Memory` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("chunk_size", "shard_length", "is_global", "slot")),
        *((name, ctypes.c_int64) for name in ("projects_by_chunk", "normalizes")),
        ("tensors", ctypes.c_void_p * _PLACES),
        ("types", ctypes.c_int64 * _PLACES),
        ("base_lr", ctypes.c_double),
    ]


class _Line(ctypes.Structure):
    """`Line` of step.cpp."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("type", "row", "head"))]


class _Layer(ctypes.Structure):
    """`Layer` of step.cpp."""

    _fields_ = [
        ("is_given", ctypes.c_int64),
        ("taps", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("taps_type", "tap_count")),
        *((name, ctypes.c_void_p) for name in ("tail", "norm")),
        ("norm_type", ctypes.c_int64),
        ("norm_eps", ctypes.c_double),
        ("gate", ctypes.c_void_p),
        ("gate_type", ctypes.c_int64),
    ]


class _Step(ctypes.Structure):
    """`Step` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("memories", "rows", "heads", "dim", "hidden", "maps")),
        *((name, ctypes.c_int64) for name in ("has_bias", "packed")),
        ("memory", ctypes.POINTER(_Memory)),
        *((name, ctypes.c_void_p) for name in ("weights", "anchor", "momentum", "projection", "position")),
        *((name, _Line) for name in "qkv"),
        ("layer", _Layer),
        *((name, ctypes.c_void_p) for name in ("active", "o")),
        ("threads", ctypes.c_int64),
    ]


def obstacle(
    memory_type: str, maps: int, update: str, head_dim: int, hidden: int, device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> str | None:  # fmt: skip
    """Why a step of memories of this kind with so many maps, the first [head_dim, hidden], whose states on `device`
    are of this dtype, is not made here, with the rule, what was got and the remedy; None if it is."""
    if device.type != "cpu":
        return f"a step's tensors must be on a CPU, got {device}"
    if memory_type not in KINDS:
        return f"memory_type of a step must be one of {', '.join(map(repr, KINDS))}, got {memory_type!r}"
    if update != "gradient":
        return f"update of a step's global memory must be 'gradient', got {update!r}"
    if dtype == torch.float64:
        return "a step's states must be float32, got float64; read float32 tensors"
    return None


def launch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: MemoryGates,
    options: tuple[MemoryOptions, ...],
    params: Sequence[MemoryParams],
    token_scales: Sequence[Tensor | None],
    stack: MemoryStack,
    active: Tensor | None,
) -> Tensor:
    """See `step.step_checked`; the stack is of float32."""
    return _stepper(stack, options).step(q, k, v, gates, params, token_scales, active)


def launch_layer_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    logits: MemoryGates,
    base_lrs: Sequence[float],
    options: tuple[MemoryOptions, ...],
    params: Sequence[MemoryParams],
    token_scales: Sequence[Tensor | None],
    stack: MemoryStack,
    active: Tensor | None,
    norm: tuple[Tensor, float] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """A step with what a layer does around it, which is a few hundred numbers and would be some thirty operators: q, k
    and v are silu of a convolution of what is given, q and k at length 1; gates are sigmoids.

    Args:
        q, k, v: [rows, 1, H D].
        taps: [3 H D, K] of the convolution, or None.
        tail: its last inputs of each row, [rows, K − 1, 3 H D], in a row and of no float64; advanced in place.
        logits: of each gate those of every memory, [rows, 1, H] each.
        base_lrs: of each memory what the sigmoid of the step size's logit is multiplied by.
        options, params, token_scales, stack, active: see `step.step_checked`; the stack is of float32.
        norm: weight [D] and ε of an RMSNorm of each head of the result; gate [rows, 1, H D], with a norm only: what is
            normed is multiplied by silu of it.

    Returns:
        The sum of the memories' outputs [rows, 1, H, D], or what norm and gate make of it, in float32; zeros where a
        row is not active.
    """
    return _stepper(stack, options).step_layer(
        q, k, v, taps, tail, logits, base_lrs, params, token_scales, active, norm, gate
    )  # fmt: skip


def _stepper(stack: MemoryStack, options: tuple[MemoryOptions, ...]) -> NativeStep:
    stepper = stack.stepper
    if not isinstance(stepper, NativeStep) or stepper.options != options:
        stepper = stack.stepper = NativeStep(stack, options)
    if stack.aligned_to != stepper.chunk_sizes:  # step.cpp looks at no anchor where a chunk starts
        stack.aligned_to = None
    return stepper


class NativeStep:
    """The step of one stack with memories of these options; its arguments are laid out once, not at every token."""

    def __init__(self, stack: MemoryStack, options: Sequence[MemoryOptions]) -> None:
        self.options = tuple(options)
        self.chunk_sizes = tuple(o.chunk_size for o in options)
        self._buffers = (stack.weights, stack.projection, stack.position)
        self._memories = (_Memory * len(options))(*map(_memory, options, stack.slots))
        self._tensors, self._types = [m.tensors for m in self._memories], [m.types for m in self._memories]
        like = stack.states[0].weights
        groups, memories, rows, heads, packed = stack.weights.shape
        places = [group.data_ptr() for group in stack.weights] + [None] * (3 - groups)
        maps = len(like.maps)
        self._params = 1 + MemoryParams._fields.index(f"b{maps}" if maps > 2 else "norm_bias")  # that may be there
        self._arguments = _Step(
            memories, rows, heads, *like.w1.shape[-2:], maps, int(like.b1 is not None), packed,
            self._memories, *places, stack.projection.data_ptr(), stack.position.data_ptr(),
        )  # fmt: skip
        self._lines = (self._arguments.q, self._arguments.k, self._arguments.v)
        self._max_threads = max(1, min(memories * rows * heads, stack.weights.numel() // NUMBERS_A_THREAD))
        self._call, self._reference = library().tnt_step, ctypes.byref(self._arguments)
        self._call.restype = None

    def __reduce__(self) -> tuple:
        """A copy of a stack has buffers of its own, so it begins without a stepper."""
        return type(None), ()

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: MemoryGates,
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
        active: Tensor | None,
    ) -> Tensor:
        """See `launch_step`."""
        kept: list[Tensor] = []
        for line, x in zip(self._lines, (q, k, v), strict=True):
            if x.dtype not in _TYPES or x.stride(-1) != 1:
                kept.append(x := x.float().contiguous())
            line.data, line.type, line.row, line.head = x.data_ptr(), _TYPES[x.dtype], x.stride(0), x.stride(1)
        self._arguments.layer.is_given = False
        o = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        self._run(o, gates, params, token_scales, active, kept)
        return o if q.dtype == o.dtype else o.to(q.dtype)

    def step_layer(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        taps: Tensor | None,
        tail: Tensor | None,
        logits: MemoryGates,
        base_lrs: Sequence[float],
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
        active: Tensor | None,
        norm: tuple[Tensor, float] | None,
        gate: Tensor | None,
    ) -> Tensor:
        """See `launch_layer_step`."""
        arguments, kept = self._arguments, []
        layer, dim = arguments.layer, arguments.dim
        dtype = tail.dtype if taps is not None else q.dtype if q.dtype in _TYPES else torch.float32
        for line, x in zip(self._lines, (q, k, v), strict=True):
            if x.dtype != dtype or x.stride(-1) != 1:
                kept.append(x := x.to(dtype).contiguous())
            line.data, line.type, line.row, line.head = x.data_ptr(), _TYPES[dtype], x.stride(0), dim
        layer.is_given, layer.taps = True, None
        if taps is not None:
            _point((taps,), pointer := [None], types := [0], kept)
            layer.taps, layer.taps_type, layer.tap_count, layer.tail = *pointer, *types, taps.shape[1], tail.data_ptr()
        layer.norm = layer.gate = None
        if norm is not None:
            _point((norm[0], gate), pointers := [None, None], types := [0, 0], kept)
            (layer.norm, layer.gate), (layer.norm_type, layer.gate_type), layer.norm_eps = pointers, types, norm[1]
        for memory, base_lr in zip(self._memories, base_lrs, strict=True):
            memory.base_lr = base_lr
        o = torch.empty(arguments.rows, 1, arguments.heads, dim, dtype=torch.float32, device=q.device)
        self._run(o, logits, params, token_scales, active, kept)
        if taps is not None:
            torch.autograd.graph.increment_version(tail)
        return o

    def _run(
        self,
        o: Tensor,
        gates: MemoryGates,
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
        active: Tensor | None,
        kept: list[Tensor],
    ) -> None:
        """The call, whose tokens are in place, with what both kinds of step have. `kept`: copies that live as long."""
        arguments = self._arguments
        of_memories = [[None] * len(params) if gate is None else gate for gate in gates]
        for i, (one, scale, *its_gates) in enumerate(zip(params, token_scales, *of_memories, strict=True)):
            _point((scale, *its_gates, *one[: self._params]), self._tensors[i], self._types[i], kept)
        active = None if active is None else active.contiguous()
        arguments.active, arguments.o = None if active is None else active.data_ptr(), o.data_ptr()
        arguments.threads = min(self._max_threads, torch.get_num_threads())
        self._call(self._reference)
        # In a graph that was recorded with these buffers, a backward has to see that they were written.
        torch.autograd.graph.increment_version(self._buffers)


def _memory(options: MemoryOptions, slot: int) -> _Memory:
    return _Memory(
        options.chunk_size, options.shard_length or 0, options.is_global, slot, options.qk_projection == "chunk",
        options.normalize_projection,
    )  # fmt: skip


def _point(
    tensors: Sequence[Tensor | None],
    pointers: ctypes.Array | list[int | None],
    types: ctypes.Array | list[int],
    kept: list[Tensor],
) -> None:
    """Say where these tensors lie and what they hold; copies, where it takes one, are kept."""
    for i, x in enumerate(tensors):
        if x is None:
            pointers[i] = None
            continue
        if x.dtype not in _TYPES or not x.is_contiguous():
            kept.append(x := x.float().contiguous())
        pointers[i], types[i] = x.data_ptr(), _TYPES[x.dtype]
