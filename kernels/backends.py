"""Which implementation runs a call, and why."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from .checks import MemoryProblem

BACKENDS = ("auto", "reference", "torch", "triton")


class BackendChoice(NamedTuple):
    """The name of a backend and the reason it was picked."""

    name: str
    reason: str


def choose_backend(device_type: str, problem: MemoryProblem | None = None, is_global: bool = False) -> BackendChoice:
    """What `backend="auto"` runs for tensors on a device of this type ("cpu", "cuda", …), and why.

    With a checked problem: what it runs for that call, which may be something the kernels cannot do.
    """
    if device_type != "cuda":
        return BackendChoice("torch", f"Triton's kernels need a CUDA device; on {device_type} the torch backend runs")
    obstacle = missing()
    if obstacle is None and problem is not None:
        obstacle = _obstacle(problem, is_global)
    if obstacle is not None:
        return BackendChoice("torch", f"Triton's kernels cannot run here: {obstacle}")
    return BackendChoice("triton", "Triton's kernels run on cuda, with the local memories' weights on the chip")


def load_backend(name: str, problem: MemoryProblem, is_global: bool) -> ModuleType:
    """The module that implements backend `name` for this call. "auto" warns, once a reason, if a GPU must do without
    the kernels.

    Raises:
        ValueError: for an unknown name, and for a backend named by the caller that cannot run this call.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if name == "auto":
        device_type = problem.q.device.type
        choice = choose_backend(device_type, problem, is_global)
        if choice.name == "torch" and device_type == "cuda":
            _warn(choice.reason)
        name = choice.name
    elif name == "triton":
        obstacle = missing() or _obstacle(problem, is_global)
        if obstacle is not None:
            raise ValueError(f"backend='triton' cannot run: {obstacle}; or use backend='torch' or 'auto'")
    return _module(name)


def _module(name: str) -> ModuleType:
    """Import statements and not importlib, which torch.compile does not trace."""
    if name == "reference":
        from . import reference

        return reference
    if name == "torch":
        from . import torch_backend

        return torch_backend
    from . import triton_backend

    return triton_backend


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """What must be installed for Triton's kernels, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install it with pip install triton"
    return None


def _obstacle(problem: MemoryProblem, is_global: bool) -> str | None:
    from .fused import limits

    return limits.obstacle(problem, is_global)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"backend='auto' runs the torch backend on cuda. {reason}", stacklevel=4)
