"""What the rest asks of the native kernels, which are C++ for CPUs: whether they can run, and to run.

A checkpoint's copy of this code calls these functions of the installed package, see border.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import INTERFACE as INTERFACE
from .border import ours
from .checks import MemoryProblem
from .stack import MemoryStack
from .types import MemoryGates, MemoryOptions, MemoryParams, MemoryState


def missing(device_type: str) -> str | None:
    """Why none of the kernels can run here on tensors of this device type, with the remedy; None if some can.

    Cheap: whether they compile is found out by `failure`.
    """
    if device_type != "cpu":
        return f"its kernels are for CPUs, and the tensors are on {device_type}; move them to 'cpu'"
    from .native import build

    return build.missing()


def obstacle(problem: MemoryProblem) -> str | None:
    """Why the kernels are not made for a call, with the rule, what was got and the remedy; None if they are."""
    from .native import limits

    return limits.obstacle(ours(problem))


@torch.compiler.assume_constant_result
def failure() -> str | None:
    """Why the kernels do not compile, with the remedy, found out by building them once a process; None if they do."""
    from .native import build

    try:
        build.library()
    except RuntimeError as error:
        return str(error)
    return None


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    from .native import reader

    return reader.read(ours(problem), output_final_state)


def qkv_obstacle(q: Tensor, head_dim: int) -> str | None:
    """Why the kernels are not made for `qkv` of such tokens, or None if they are."""
    from .native import qkv

    return qkv.obstacle(q, head_dim)


def qkv(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, boundaries: Tensor | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution, silu and unit length of projected tokens, see `native.qkv`."""
    from .native import qkv as module

    return module.qkv(q, k, v, weight, boundaries, head_dim)


def step_obstacle(
    memory_type: str, maps: int, update: str, head_dim: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """`obstacle` of the step of memories of this kind with so many maps, the first [head_dim, hidden], whose states on
    `device` are of a dtype."""
    from .native import step

    return step.obstacle(memory_type, maps, update, head_dim, hidden, device, dtype)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: MemoryGates,
    options: Sequence[MemoryOptions],
    params: Sequence[MemoryParams],
    token_scales: Sequence[Tensor | None],
    stack: MemoryStack,
    active: Tensor | None,
) -> Tensor:
    """See `step.step_checked`; of the stack the buffers are taken."""
    from .native import step

    return step.launch_step(
        q, k, v, ours(gates), tuple(map(ours, options)), list(map(ours, params)), token_scales, stack, active
    )


def layer_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    logits: MemoryGates,
    base_lrs: Sequence[float],
    options: Sequence[MemoryOptions],
    params: Sequence[MemoryParams],
    token_scales: Sequence[Tensor | None],
    stack: MemoryStack,
    active: Tensor | None,
    norm: tuple[Tensor, float] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """See `native.step.launch_layer_step`; of the stack the buffers are taken."""
    from .native import step

    return step.launch_layer_step(
        q, k, v, taps, tail, ours(logits), base_lrs, tuple(map(ours, options)), list(map(ours, params)), token_scales,
        stack, active, norm, gate,
    )  # fmt: skip
