"""Which implementation runs a call, and why."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor
from torch.torch_version import TorchVersion

from . import probe
from .checks import MemoryProblem

MIN_TRITON = "3.6"

BACKENDS = ("auto", "reference", "torch", "triton")


class BackendChoice(NamedTuple):
    """The name of a backend and the reason it was picked. `is_fallback`: a GPU must do without Triton's kernels."""

    name: str
    reason: str
    is_fallback: bool = False


def choose_backend(device_type: str, problem: MemoryProblem | None = None, is_global: bool = False) -> BackendChoice:
    """What `backend="auto"` runs for tensors on a device of this type ("cpu", "cuda", …), and why.

    With a checked problem: what it runs for that call, which may be something the kernels cannot do, or that does not
    compile or launch. The first time that is asked for a configuration, its kernels are compiled and run, see probe.py.
    """
    if device_type != "cuda":
        return BackendChoice("torch", f"Triton's kernels need a CUDA device; on {device_type} the torch backend runs")
    obstacle = missing(device_type)
    if obstacle is None and problem is not None:
        obstacle = _obstacle(problem, is_global) or _failure(problem, is_global)
    if obstacle is not None:
        return BackendChoice("torch", f"Triton's kernels cannot run here: {obstacle}", is_fallback=True)
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
        choice = choose_backend(problem.q.device.type, problem, is_global)
        if choice.is_fallback:
            warn_of_fallback(choice.reason)
        name = choice.name
    elif name == "triton":
        obstacle = missing(problem.q.device.type) or _obstacle(problem, is_global)
        if obstacle is not None:
            raise ValueError(f"backend='triton' cannot run: {obstacle}; or use backend='torch' or 'auto'")
    return _module(name)


def _module(name: str) -> ModuleType:
    """Import statements and not importlib, which torch.compile does not trace."""
    if name == "reference":
        from . import reference

        return reference
    if name == "torch":
        from .torch_backend import reader

        return reader
    from .fused import reader

    return reader


@torch.compiler.assume_constant_result
def missing(device_type: str) -> str | None:
    """Why none of Triton's kernels can run here on tensors of this device type, with the remedy; None if some can.

    Asked before anything of `fused` is imported: an older triton need not have what the kernels are written with.
    """
    if device_type == "cuda" and torch.version.hip is not None:
        return (
            f"its kernels are for NVIDIA GPUs, and in this torch, built for ROCm {torch.version.hip}, 'cuda' is an AMD "
            "GPU; run on an NVIDIA GPU"
        )
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # without an origin: some folder of that name
        return "triton is not installed; install it with pip install triton"
    version = _triton_version()
    if TorchVersion(version) < MIN_TRITON:
        return (
            f"triton {version} is installed, its kernels need {MIN_TRITON} or newer; upgrade torch, each release of "
            f"which brings its own triton, or pip install -U 'triton>={MIN_TRITON}'"
        )
    return None


def _triton_version() -> str:
    """Of what `import triton` finds, whichever distribution that is (triton, pytorch-triton, triton-windows, …)."""
    import triton

    return triton.__version__


def _obstacle(problem: MemoryProblem, is_global: bool) -> str | None:
    from .fused import limits

    return limits.obstacle(problem, is_global)


def _failure(problem: MemoryProblem, is_global: bool) -> str | None:
    if isinstance(problem.q, FakeTensor):  # traced without torch.compile: nothing can run
        return None
    return probe.failure(probe.ReadConfiguration.of(problem, is_global))


@functools.cache
def warn_of_fallback(reason: str) -> None:
    warnings.warn(f"backend='auto' runs the torch backend on cuda. {reason}", stacklevel=4)
