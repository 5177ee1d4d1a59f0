"""Which implementation runs a call, and why.

A checkpoint's copy of this code has no Triton in it: there the "triton" backend is the installed package's, if any.
"""

from __future__ import annotations

import functools
import logging
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from .checks import MemoryProblem

logger = logging.getLogger(__name__)

INTERFACE = 1
"""Number of what `triton_backend` offers, and of the containers that it takes. A copy of this code uses the installed
package's kernels if both have the same number: raise it when a function there or a field of a container changes."""

BACKENDS = ("auto", "reference", "torch", "triton")


class BackendChoice(NamedTuple):
    """The name of a backend and the reason it was picked. `is_fallback`: a GPU must do without Triton's kernels."""

    name: str
    reason: str
    is_fallback: bool = False


def choose_backend(device_type: str, problem: MemoryProblem | None = None) -> BackendChoice:
    """What `backend="auto"` runs for tensors on a device of this type ("cpu", "cuda", …), and why.

    With a checked problem: what it runs for that call, which may be something the kernels cannot do, or that does not
    compile or launch. The first time that is asked for a configuration, its kernels are compiled and run, see probe.py.
    """
    if device_type != "cuda":
        return BackendChoice("torch", f"Triton's kernels need a CUDA device; on {device_type} the torch backend runs")
    obstacle = missing(device_type)
    if obstacle is None and problem is not None:
        triton = triton_backend()
        obstacle = triton.obstacle(problem) or triton.failure(problem)
    if obstacle is not None:
        return fall_back(obstacle)
    return BackendChoice("triton", "Triton's kernels run on cuda, with the local memories' weights on the chip")


def fall_back(obstacle: str) -> BackendChoice:
    """What "auto" runs on a GPU in spite of an obstacle to Triton's kernels."""
    return BackendChoice("torch", f"Triton's kernels cannot run here: {obstacle}", is_fallback=True)


def load_backend(name: str, problem: MemoryProblem) -> ModuleType:
    """The module that implements backend `name` for this call. "auto" warns, once a reason, if a GPU must do without
    the kernels.

    Raises:
        ValueError: for an unknown name, and for a backend named by the caller that cannot run this call.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if name == "auto":
        choice = choose_backend(problem.q.device.type, problem)
        if choice.is_fallback:
            warn_of_fallback(choice.reason)
        name = choice.name
    elif name == "triton":
        obstacle = missing(problem.q.device.type) or triton_backend().obstacle(problem)
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
    return triton_backend()


def triton_backend() -> ModuleType:
    """triton_backend.py of this package; asked for where `missing` sees no obstacle."""
    from . import triton_backend  # of the installed package

    return triton_backend


@torch.compiler.assume_constant_result
def missing(device_type: str) -> str | None:
    """Why none of Triton's kernels can run here on tensors of this device type, with the remedy; None if some can."""
    return _not_installed() or triton_backend().missing(device_type)


@functools.cache
def _not_installed() -> str | None:
    """Why this copy of the code has no kernels to use, or None. In the package there always are some."""
    try:
        kernels = triton_backend()
    except ImportError as error:
        return str(error)
    if getattr(kernels, "INTERFACE", None) != INTERFACE:
        return (
            "the installed modeling-tnt is of another version than this checkpoint's code, and its kernels do not fit; "
            "import modeling_tnt before the model is loaded, which runs the package's own code then"
        )
    if kernels.__package__ != __package__:
        logger.warning(f"Triton's kernels are those of the installed package modeling-tnt: {kernels.__file__}")
    return None


@functools.cache
def warn_of_fallback(reason: str) -> None:
    warnings.warn(f"backend='auto' runs the torch backend on cuda. {reason}", stacklevel=4)
