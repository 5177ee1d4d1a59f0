"""Which implementation runs a call, and why."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

BACKENDS = ("auto", "reference", "torch", "triton")
_MODULES = {"reference": ".reference", "torch": ".torch_backend", "triton": ".triton_backend"}


class BackendChoice(NamedTuple):
    """The name of a backend and the reason it was picked."""

    name: str
    reason: str


def choose_backend(device_type: str) -> BackendChoice:
    """What `backend="auto"` runs for tensors on a device of this type ("cpu", "cuda", …), and why."""
    return BackendChoice("torch", f"the torch backend is the fastest one of this version on {device_type}")


def load_backend(name: str, like: Tensor) -> ModuleType:
    """The module that implements backend `name` for tensors like `like`.

    Raises:
        ValueError: for an unknown name, and for a backend named by the caller that this version does not have.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}")
    if name == "auto":
        name = choose_backend(like.device.type).name
    if name not in _MODULES:
        raise ValueError(f"backend={name!r} cannot run: this version has no {name} kernels; use 'auto' or 'torch'")
    return importlib.import_module(_MODULES[name], __package__)
