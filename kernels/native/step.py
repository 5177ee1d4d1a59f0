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


class _Step(ctypes.Structure):
    """`Step` of step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("memories", "rows", "heads", "dim", "hidden", "maps")),
        *((name, ctypes.c_int64) for name in ("has_bias", "packed")),
        ("memory", ctypes.POINTER(_Memory)),
        *((name, ctypes.c_void_p) for name in ("weights", "anchor", "momentum", "projection", "position")),
        *((name, _Line) for name in "qkv"),
        ("is_raw", ctypes.c_int64),
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
    base_lrs: Sequence[float] | None = None,
) -> Tensor:
    """See `step.step_checked`; the stack is of float32.

    With base_lrs, one of each memory, q, k, v and gates are given before their activations, which saves a layer a dozen
    operations: q, k and v are silu of what is given, q and k at length 1; a gate is a sequence of each memory's logits,
    [rows, 1, H], of which its sigmoid is taken, and the step size's is multiplied by the memory's base.
    """
    stepper = stack.stepper
    if not isinstance(stepper, NativeStep) or stepper.options != options:
        stepper = stack.stepper = NativeStep(stack, options)
    if stack.aligned_to != stepper.chunk_sizes:  # step.cpp looks at no anchor where a chunk starts
        stack.aligned_to = None
    return stepper(q, k, v, gates, params, token_scales, active, base_lrs)


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

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: MemoryGates,
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
        active: Tensor | None,
        base_lrs: Sequence[float] | None,
    ) -> Tensor:
        """Learn from k, v and read at q, [rows, H, D] each; the states are advanced in place, of active rows.

        Returns:
            The sum of the memories' outputs [rows, H, D], in q.dtype; zeros where a row is not active.
        """
        arguments, kept = self._arguments, []  # copies for the call live as long as it
        for line, x in zip(self._lines, (q, k, v), strict=True):
            if x.dtype not in _TYPES or x.stride(-1) != 1:
                kept.append(x := x.float().contiguous())
            line.data, line.type, line.row, line.head = x.data_ptr(), _TYPES[x.dtype], x.stride(0), x.stride(1)
        of_memories = [[None] * len(params) if gate is None else gate for gate in gates]
        for i, (one, scale, *its_gates) in enumerate(zip(params, token_scales, *of_memories, strict=True)):
            _point((scale, *its_gates, *one[: self._params]), self._tensors[i], self._types[i], kept)
        arguments.is_raw = base_lrs is not None
        if base_lrs is not None:
            for memory, base_lr in zip(self._memories, base_lrs, strict=True):
                memory.base_lr = base_lr
        o = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        active = None if active is None else active.contiguous()
        arguments.active, arguments.o = None if active is None else active.data_ptr(), o.data_ptr()
        arguments.threads = min(self._max_threads, torch.get_num_threads())
        self._call(self._reference)
        # In a graph that was recorded with these buffers, a backward has to see that they were written.
        torch.autograd.graph.increment_version(self._buffers)
        return o if q.dtype == o.dtype else o.to(q.dtype)


def _memory(options: MemoryOptions, slot: int) -> _Memory:
    return _Memory(
        options.chunk_size, options.shard_length or 0, options.is_global, slot, options.qk_projection == "chunk",
        options.normalize_projection,
    )  # fmt: skip


def _point(tensors: Sequence[Tensor | None], pointers: ctypes.Array, types: ctypes.Array, kept: list[Tensor]) -> None:
    """Say where these tensors lie and what they hold; copies, where it takes one, are kept."""
    for i, x in enumerate(tensors):
        if x is None:
            pointers[i] = None
            continue
        if x.dtype not in _TYPES or not x.is_contiguous():
            kept.append(x := x.float().contiguous())
        pointers[i], types[i] = x.data_ptr(), _TYPES[x.dtype]
