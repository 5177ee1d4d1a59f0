"""Which implementation runs a call, and why.

Kernels are for one type of device: Triton's for "cuda", the native ones, in C++, for "cpu". A checkpoint's copy of this
code has neither: there both are the installed package's, if any.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import MemoryProblem

logger = logging.getLogger(__name__)

INTERFACE = 1
"""Number of what `triton_backend` and `native_backend` offer, and of the containers that they take. A copy of this code
uses the installed package's kernels if both have the same number: raise it when a function there or a field of a
container changes."""

BACKENDS = ("auto", "reference", "torch", "native", "triton")

KERNELS = {"native": "the native kernels", "triton": "Triton's kernels"}
"""The backends that need more than torch, and what they are called. A call is a few operators of theirs, which
`torch.compile` keeps in its graph."""


class BackendChoice(NamedTuple):
    """The name of a backend and the reason it was picked. `instead_of`: the backend that a device of this type should
    run, where it lacks what that needs, or on a GPU the call does: worth a message, see `report`."""

    name: str
    reason: str
    instead_of: str | None = None

    @property
    def is_fallback(self) -> bool:
        return self.instead_of is not None


def choose_backend(device_type: str, problem: MemoryProblem | None = None) -> BackendChoice:
    """What `backend="auto"` runs for tensors on a device of this type ("cpu", "cuda", …), and why.

    With a checked problem: what it runs for that call, which may be something the kernels cannot do, or that does not
    compile or launch. The first time that is asked, kernels are compiled: the native ones all at once, Triton's for
    each configuration, which is run, too, see probe.py.
    """
    if device_type == "cpu":
        return choose_native(lambda native: None if problem is None else native.obstacle(problem))
    if device_type != "cuda":
        return BackendChoice("torch", f"kernels are for CUDA devices and CPUs; on {device_type} the torch backend runs")
    obstacle = missing("triton", device_type)
    if obstacle is None and problem is not None:
        triton = triton_backend()
        obstacle = triton.obstacle(problem) or triton.failure(problem)
    if obstacle is not None:
        return fall_back("triton", obstacle)
    return BackendChoice("triton", "Triton's kernels run on cuda, with the local memories' weights on the chip")


def choose_native(unfit: Callable[[ModuleType], str | None]) -> BackendChoice:
    """What "auto" runs on a CPU. `unfit` asks `native_backend` why the kernels are not made for something; then, and
    for who wants none or only has a checkpoint, nothing is lacking, and nobody is told more than the reason."""
    reason = _unwanted() or absent("native")
    if reason is None:
        obstacle = _misfit("native")  # before anything else is asked
        reason = unfit(native_backend()) if obstacle is None else None
    if reason is not None:
        return BackendChoice("torch", f"the native kernels do not run this on cpu: {reason}")
    obstacle = obstacle or missing("native", "cpu") or native_backend().failure()
    if obstacle is not None:
        return fall_back("native", obstacle)
    return BackendChoice("native", "the native kernels, compiled for this machine, run on cpu")


def qkv_kernels(backend: str, q: Tensor, head_dim: int) -> ModuleType | None:
    """The border of kernels that do what stands between the projections of q, k and v and the memories, or None where
    that is left to torch: everywhere but on a CPU with the native kernels."""
    if backend not in ("auto", "native") or q.device.type != "cpu":
        return None
    choice = choose_native(lambda native: native.qkv_obstacle(q, head_dim))
    return native_backend() if choice.name == "native" else None


def fall_back(kernels: str, obstacle: str) -> BackendChoice:
    """What "auto" runs in spite of an obstacle to the kernels that the device should run."""
    return BackendChoice("torch", f"{KERNELS[kernels]} cannot run here: {obstacle}", instead_of=kernels)


def load_backend(name: str, problem: MemoryProblem) -> ModuleType:
    """The module that implements backend `name` for this call. "auto" says, once a reason, if the device must do
    without kernels.

    Raises:
        ValueError: for an unknown name, and for a backend named by the caller that cannot run this call.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    device_type = problem.q.device.type
    if name == "auto":
        choice = choose_backend(device_type, problem)
        report(choice)
        name = choice.name
    elif name in KERNELS:
        obstacle = missing(name, device_type) or border(name).obstacle(problem)
        if obstacle is None and name == "native":  # Triton's, compiled call by call, raise what their compiler says
            obstacle = native_backend().failure()
        if obstacle is not None:
            raise ValueError(f"backend={name!r} cannot run: {obstacle}; or use backend='torch' or 'auto'")
    return _module(name)


def _module(name: str) -> ModuleType:
    """Import statements and not importlib, which torch.compile does not trace."""
    if name == "reference":
        from . import reference

        return reference
    if name == "torch":
        from .torch_backend import reader

        return reader
    return border(name)


def border(name: str) -> ModuleType:
    """What this package offers of some kernels; asked for where `missing`, or `absent`, sees no obstacle."""
    return native_backend() if name == "native" else triton_backend()


def triton_backend() -> ModuleType:
    """triton_backend.py of this package."""
    from . import triton_backend  # of the installed package

    return triton_backend


def native_backend() -> ModuleType:
    """native_backend.py of this package."""
    from . import native_backend  # of the installed package

    return native_backend


@torch.compiler.assume_constant_result
def missing(kernels: str, device_type: str) -> str | None:
    """Why none of these kernels can run here on tensors of this device type, with the remedy; None if some can."""
    obstacle = _import_error(kernels) or _misfit(kernels) or border(kernels).missing(device_type)
    if obstacle is None:
        _say_whose(kernels)
    return obstacle


@torch.compiler.assume_constant_result
def absent(kernels: str) -> str | None:
    """Why this copy of the code has no such kernels to use, or None. In the package they always are there."""
    return _import_error(kernels)


@functools.cache
def _import_error(kernels: str) -> str | None:
    try:
        border(kernels)
    except ImportError as error:
        return str(error)
    return None


@torch.compiler.assume_constant_result
def _unwanted() -> str | None:
    """That the user asks for none of the native kernels, if so. A call that names them is refused by `missing`."""
    return "TNT_NATIVE=0 in the environment" if os.environ.get("TNT_NATIVE") == "0" else None


@torch.compiler.assume_constant_result
def _misfit(kernels: str) -> str | None:
    """Why the kernels that are there are not for this copy of the code, or None."""
    if getattr(border(kernels), "INTERFACE", None) == INTERFACE:
        return None
    return (
        "the installed modeling-tnt is of another version than this checkpoint's code, and its kernels do not fit; "
        "import modeling_tnt before the model is loaded, which runs the package's own code then"
    )


@functools.cache
def _say_whose(kernels: str) -> None:
    installed = border(kernels)
    if installed.__package__ != __package__:
        logger.warning(f"{KERNELS[kernels]} are those of the installed package modeling-tnt: {installed.__file__}")


def report(choice: BackendChoice) -> None:
    """Tell the user, once a reason, that a device must do without its kernels."""
    if choice.instead_of == "triton":
        warn_of_fallback(choice.reason)
    elif choice.instead_of == "native":
        advise(choice.reason)


@functools.cache
def warn_of_fallback(reason: str) -> None:
    warnings.warn(f"backend='auto' runs the torch backend on cuda. {reason}", stacklevel=5)


@functools.cache
def advise(reason: str) -> None:
    """A line in the log and no warning: on a CPU nothing is wrong, it could be faster."""
    logger.warning(
        f"backend='auto' runs the torch backend on cpu, several times slower, since {reason} (TNT_NATIVE=0 in the "
        "environment silences this)"
    )
