"""The convolution, activation and norms behind the projections of q, k and v, as two operators of qkv.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..operators import OPERATORS, operator
from .build import library
from .limits import DTYPES, MULTIPLE

MAX_HEAD_DIM = 512  # of a buffer in qkv.cpp


def obstacle(q: Tensor, head_dim: int) -> str | None:
    """Why `qkv` is not made for such tokens, or None if it is."""
    if q.device.type != "cpu":
        return f"its kernels are for CPUs, the tensors are on {q.device}"
    if q.dtype not in DTYPES:
        return f"q must be of dtype {' or '.join(map(str, DTYPES))}, got {q.dtype}"
    if head_dim % MULTIPLE or head_dim > MAX_HEAD_DIM:
        return f"the head dim must be a multiple of {MULTIPLE} up to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def qkv(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, boundaries: Tensor | None, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the memories get of projected tokens.

    Args:
        q, k, v: [B, T, channels], or [1, total, channels] with boundaries.
        weight: [3 channels, K], the taps of q, k and v.
        boundaries: [N + 1] int64 on the CPU, of packed sequences; None: each row is one.

    Returns:
        [B, T, channels / head_dim, head_dim] each: silu of the causal convolution, and heads of q and k of length 1.
    """
    B, T, channels = q.shape
    if boundaries is None:
        boundaries = torch.arange(0, (B + 1) * T, T)
    outputs = OPERATORS.native_qkv_forward(
        *(t.contiguous() for t in (q, k, v)), weight.float().contiguous(), boundaries, head_dim
    )
    return tuple(t.view(B, T, channels // head_dim, head_dim) for t in outputs)


class _Call(ctypes.Structure):
    """`QkvCall` of qkv.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p * 3) for name in ("x", "grad_out", "out", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("weight", "grad_weight", "boundaries")),
        *((n, ctypes.c_int64) for n in ("rows", "channels", "head_dim", "taps", "is_bfloat16", "threads")),
    ]


def _call(x: list[Tensor], weight: Tensor, boundaries: Tensor, head_dim: int, **tensors: list[Tensor]) -> _Call:
    """`tensors` must outlive the call."""
    three = {name: (ctypes.c_void_p * 3)(*(t.data_ptr() for t in group)) for name, group in {"x": x, **tensors}.items()}
    return _Call(
        **three, weight=weight.data_ptr(), boundaries=boundaries.data_ptr(), rows=boundaries.shape[0] - 1,
        channels=x[0].shape[-1], head_dim=head_dim, taps=weight.shape[1],
        is_bfloat16=int(x[0].dtype == torch.bfloat16), threads=torch.get_num_threads(),
    )  # fmt: skip


@operator(lambda q, k, v, *_: [torch.empty_like(t) for t in (q, k, v)])
def native_qkv_forward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, boundaries: Tensor, head_dim: int
) -> list[Tensor]:
    """See `qkv`."""
    out = [torch.empty_like(t) for t in (q, k, v)]
    library().tnt_qkv_forward(ctypes.byref(_call([q, k, v], weight, boundaries, head_dim, out=out)))
    return out


@operator(lambda q, k, v, weight, *_: [torch.empty_like(t) for t in (q, k, v, weight)])
def native_qkv_backward(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, boundaries: Tensor, grads: list[Tensor], head_dim: int
) -> list[Tensor]:
    """Gradients of q, k, v and weight."""
    grad_x = [torch.empty_like(t) for t in (q, k, v)]
    call = _call([q, k, v], weight, boundaries, head_dim, grad_out=grads, grad_x=grad_x)
    count = library().tnt_qkv_blocks
    count.restype = ctypes.c_int64
    parts = weight.new_empty(count(ctypes.byref(call)), *weight.shape)
    call.grad_weight = parts.data_ptr()
    library().tnt_qkv_backward(ctypes.byref(call))
    return [*grad_x, parts.sum(0)]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _autograd_backward(ctx, grads):
    *tensors, weight, boundaries = ctx.saved_tensors
    grads = [g.contiguous() for g in grads]
    return *OPERATORS.native_qkv_backward(*tensors, weight, boundaries, grads, ctx.head_dim), None, None


native_qkv_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
