"""What the rest asks of Triton's kernels: whether they can run, and to run.

triton is imported only behind `missing`, which says whether it is there and new enough. A checkpoint's copy of this
code calls these functions of the installed package, see border.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.torch_version import TorchVersion

from . import probe
from .backends import INTERFACE as INTERFACE
from .border import ours
from .checks import MemoryProblem
from .stack import MemoryStack
from .step import StepMemory
from .types import MemoryState

MIN_TRITON = "3.6"


def missing(device_type: str) -> str | None:
    """Why none of the kernels can run here on tensors of this device type, with the remedy; None if some can.

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


def obstacle(problem: MemoryProblem) -> str | None:
    """Why the kernels are not made for a call, with the rule, what was got and the remedy; None if they are."""
    from .fused import limits

    return limits.obstacle(ours(problem))


def failure(problem: MemoryProblem) -> str | None:
    """Why the kernels of a call do not compile or launch, found out by running them once; None if they do."""
    if isinstance(problem.q, FakeTensor):  # traced without torch.compile: nothing can run
        return None
    return probe.failure(probe.ReadConfiguration.of(ours(problem)))


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    from .fused import reader

    return reader.read(ours(problem), output_final_state)


def step_obstacle(
    memory_type: str, maps: int, update: str, head_dim: int, hidden: int, device: torch.device
) -> str | None:
    """`obstacle` of the step of memories of this kind with so many maps, the first [head_dim, hidden], on `device`."""
    from .fused import limits

    return limits.step_obstacle(memory_type, maps, update, head_dim, hidden, device)


def step_failure(q: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None) -> str | None:
    """`failure` of a step."""
    if isinstance(q, FakeTensor):
        return None
    return probe.failure(probe.StepConfiguration.of(q, [ours(memory) for memory in memories], stack, active))


def step(
    q: Tensor, k: Tensor, v: Tensor, memories: Sequence[StepMemory], stack: MemoryStack, active: Tensor | None
) -> Tensor:
    """See `step.step_memories`; of the stack the buffers are taken."""
    from .fused import decode

    return decode.launch_step(q, k, v, [ours(memory) for memory in memories], stack, active)
