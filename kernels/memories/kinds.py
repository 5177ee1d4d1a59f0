"""Which kinds of memory there are."""

from __future__ import annotations

from ..types import FastWeights
from .kind import MemoryKind
from .linear import LinearMemory
from .mlp import MLPMemory
from .swiglu import SwiGLUMemory

_KINDS: dict[str, MemoryKind] = {kind.name: kind for kind in (MLPMemory(), LinearMemory(), SwiGLUMemory())}


def memory_types() -> tuple[str, ...]:
    """The names of all kinds."""
    return tuple(_KINDS)


def memory_kind(name: str) -> MemoryKind:
    """The kind of this name. Raises ValueError for one that there is not."""
    if name not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"memory_type={name!r} is unknown; use one of {known}, or register_memory a kind of this name")
    return _KINDS[name]


def register_memory(kind: MemoryKind) -> None:
    """Make a kind of memory known under its name, for this process: `memory_type=kind.name` then uses it.

    A checkpoint of such a model loads where the kind was registered before. Raises ValueError for a name that is taken.
    """
    if not isinstance(kind, MemoryKind):
        raise TypeError(f"kind must be a MemoryKind, got {type(kind).__name__}; make an instance of your class")
    if kind.name in _KINDS:
        raise ValueError(f"memory_type {kind.name!r} is taken by {type(_KINDS[kind.name]).__name__}; use another name")
    _KINDS[kind.name] = kind


def type_of(memory_type: str | None, weights: FastWeights) -> str:
    """The kind of fast weights; where it is not said (None): "linear" if they are one map, else "mlp"."""
    return memory_type or ("linear" if len(weights.maps) == 1 else "mlp")


def weight_shapes(
    memory_type: str, depth: int, heads: int, head_dim: int, hidden: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Of the fast weights of a memory of `heads` heads, by name: w1 [H, inputs, outputs], b1 [H, outputs], …"""
    kind = memory_kind(memory_type)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inputs, outputs) in enumerate(kind.shapes(head_dim, hidden, kind.maps(depth)), start=1):
        shapes |= {f"w{i}": (heads, inputs, outputs)} | ({f"b{i}": (heads, outputs)} if bias else {})
    return shapes
