"""What the native kernels can run."""

from __future__ import annotations

import torch

from ..checks import MemoryProblem

DTYPES = (torch.float32, torch.bfloat16)
MULTIPLE = 16  # of what widths of matrices are, see vector.h
KINDS = ("linear", "mlp")


def obstacle(problem: MemoryProblem) -> str | None:
    """Why the kernels are not made for a call, with the rule, what was got and the remedy; None if they are."""
    p = problem
    if p.q.device.type != "cpu":
        return f"its kernels are for CPUs, the tensors are on {p.q.device}; move them to 'cpu'"
    if p.kind.name not in KINDS:
        return f"its kernels run memories of memory_type {' and '.join(KINDS)}, got {p.kind.name!r}; use one of these"
    if p.options.update != "gradient":
        return f"the global memory's update (global_update of a model) must be 'gradient', got {p.options.update!r}"
    if p.q.dtype not in DTYPES:
        return f"q must be of dtype {' or '.join(map(str, DTYPES))}, got {p.q.dtype}"
    D, M = p.params.w1.shape[1:]
    if D % MULTIPLE:
        return f"the head dim must be a multiple of {MULTIPLE}, got {D}"
    if M % MULTIPLE:
        return f"the memory's hidden width must be a multiple of {MULTIPLE}, got {M}"
    return None
