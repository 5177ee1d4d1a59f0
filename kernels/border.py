"""What a checkpoint's copy of this code hands to the installed package's kernels, turned into this package's classes.

`triton_backend` and `native_backend` are the borders: a copy ends there, has no kernels, and calls their functions with
containers of its own classes. What is returned has this package's classes, which any copy takes (see `types.is_of`).
"""

from __future__ import annotations

from typing import Any

from .checks import MemoryProblem
from .step import StepMemory
from .types import FastWeights, MemoryGates, MemoryOptions, MemoryParams, MemoryState

_CROSSING = (FastWeights, MemoryGates, MemoryOptions, MemoryParams, MemoryProblem, MemoryState, StepMemory)
CONTAINERS = {cls.__name__: cls for cls in _CROSSING}


def ours(value: Any) -> Any:
    """A container of a copy of this code, with those in it, as one of ours; anything else as it is."""
    cls = CONTAINERS.get(type(value).__name__)
    if cls is None or isinstance(value, cls):
        return value
    return cls(*(ours(part) for part in value))
