"""The Q-K projection `x_t = M_t q_t`, `M_t = M_0 + Σ_{τ≤t} k_τ k_τᵀ / ‖k_τ‖²` (TNT eq. 7, 15, appendix C).

It does not depend on the memory, so it runs over the whole sequence before the scan. With unit keys K, queries Q and M
before a block of tokens: X = Q M + tril(Q Kᵀ) K, and M + Kᵀ K after it. Both directions walk through the blocks of some
rows at a time, so that what they compute stays in a CPU's cache; nothing but the inputs is kept for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Tokens per block, which bounds the quadratic part, and bytes of a block of queries.
BLOCK = 64
SLAB_BYTES = 1 << 20


def project_queries(
    q: Tensor, k: Tensor, start: Tensor | None, normalize: bool, need_end: bool
) -> tuple[Tensor, Tensor | None]:
    """Project the queries of J independent pieces.

    Args:
        q, k: [J, L, H, D]; a padded token has k = 0, and a zero key adds nothing.
        start: M before the first token [J, H, D, D], or None for zero.
        normalize: divide the result by its norm; a zero one stays zero and passes no gradient.
        need_end: also return M after the last token.

    Returns:
        x [J, L, H, D] and M [J, H, D, D] or None.
    """
    if start is None:
        J, _, H, D = q.shape
        start = q.new_zeros(1, 1, 1, 1).expand(J, H, D, D)
    x, end = torch.ops.modeling_tnt.project_forward(q, k, start, normalize, BLOCK)
    return x, end if need_end else None


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ‖x‖ over the last dimension and 1 / ‖x‖; a zero vector stays zero and has the factor 0."""
    square = (x * x).sum(-1, keepdim=True)
    factor = torch.where(square == 0, 0.0, square.rsqrt())
    return x * factor, factor


def _unit_backward(unit: Tensor, factor: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of x / ‖x‖."""
    along = (grad * unit).sum(-1, keepdim=True)
    return torch.addcmul(grad, unit, along, value=-1).mul_(factor)


def _slabs(q: Tensor, block: int) -> Iterator[slice]:
    """Pieces that are walked through together."""
    J, L, H, D = q.shape
    size = max(1, SLAB_BYTES // (min(block, L) * H * D * q.element_size()))
    for first in range(0, J, size):
        yield slice(first, min(first + size, J))


def _rows(t: Tensor, slab: slice, span: slice) -> Tensor:
    """The tokens `span` of the pieces `slab`, in rows: [J, L, H, D] -> [N, C, D]."""
    block = t[slab, span].transpose(1, 2)
    return block.reshape(-1, *block.shape[2:])


def _store(target: Tensor, slab: slice, span: slice, rows: Tensor) -> None:
    """The inverse of `_rows`."""
    block = target[slab, span].transpose(1, 2)
    block.copy_(rows.view(block.shape))


def _read(q: Tensor, k: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """X = Q M + tril(Q Kᵀ) K, and that triangle."""
    p = torch.bmm(q, k.transpose(1, 2)).tril_()
    return torch.bmm(q, m).baddbmm_(p, k), p


@torch.library.custom_op("modeling_tnt::project_forward", mutates_args=())
def project_forward(q: Tensor, k: Tensor, start: Tensor, normalize: bool, block: int) -> tuple[Tensor, Tensor]:
    """x and M after the last token."""
    x, end = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(start.shape)
    with torch.autocast(q.device.type, enabled=False):
        for slab in _slabs(q, block):
            m = start[slab].clone(memory_format=torch.contiguous_format).flatten(0, 1)
            for first in range(0, q.shape[1], block):
                span = slice(first, min(first + block, q.shape[1]))
                unit_k, _ = _unit(_rows(k, slab, span))
                rows, _ = _read(_rows(q, slab, span), unit_k, m)
                _store(x, slab, span, _unit(rows)[0] if normalize else rows)
                m.baddbmm_(unit_k.transpose(1, 2), unit_k)
            end[slab] = m.view(end[slab].shape)
    return x, end


@project_forward.register_fake
def _(q: Tensor, k: Tensor, start: Tensor, normalize: bool, block: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(start.shape)


@torch.library.custom_op("modeling_tnt::project_backward", mutates_args=())
def project_backward(
    q: Tensor, k: Tensor, start: Tensor, grad_x: Tensor, grad_end: Tensor, normalize: bool, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and start."""
    grad_q, grad_k = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    grad_start = torch.empty_like(grad_end, memory_format=torch.contiguous_format)
    with torch.autocast(q.device.type, enabled=False):
        for slab in _slabs(q, block):
            spans = [slice(i, min(i + block, q.shape[1])) for i in range(0, q.shape[1], block)]
            before = [start[slab].reshape(-1, *start.shape[2:])]  # M before each block
            for span in spans[:-1]:
                unit_k, _ = _unit(_rows(k, slab, span))
                before.append(torch.baddbmm(before[-1], unit_k.transpose(1, 2), unit_k))
            grad_m = grad_end[slab].clone(memory_format=torch.contiguous_format).flatten(0, 1)
            while spans:
                span, m = spans.pop(), before.pop()
                query, grad = _rows(q, slab, span), _rows(grad_x, slab, span)
                unit_k, factor = _unit(_rows(k, slab, span))
                if normalize:
                    rows, p = _read(query, unit_k, m)
                    grad = _unit_backward(*_unit(rows), grad)
                else:
                    p = torch.bmm(query, unit_k.transpose(1, 2)).tril_()
                r = torch.bmm(grad, unit_k.transpose(1, 2)).tril_()
                _store(grad_q, slab, span, torch.bmm(grad, m.transpose(1, 2)).baddbmm_(r, unit_k))
                grad_unit = torch.bmm(unit_k, grad_m + grad_m.transpose(1, 2))
                grad_unit.baddbmm_(r.transpose(1, 2), query).baddbmm_(p.transpose(1, 2), grad)
                _store(grad_k, slab, span, _unit_backward(unit_k, factor, grad_unit))
                grad_m.baddbmm_(query.transpose(1, 2), grad)
            grad_start[slab] = grad_m.view(grad_start[slab].shape)
    return grad_q, grad_k, grad_start


@project_backward.register_fake
def _(
    q: Tensor, k: Tensor, start: Tensor, grad_x: Tensor, grad_end: Tensor, normalize: bool, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, grad_end))


def _setup_context(ctx, inputs, output) -> None:
    q, k, start, ctx.normalize, ctx.block = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, start)


def _autograd_backward(ctx, grad_x: Tensor | None, grad_end: Tensor | None):
    q, k, start = ctx.saved_tensors
    grad_x = torch.zeros_like(q) if grad_x is None else grad_x
    grad_end = q.new_zeros(start.shape) if grad_end is None else grad_end
    grads = torch.ops.modeling_tnt.project_backward(q, k, start, grad_x, grad_end, ctx.normalize, ctx.block)
    return *grads, None, None


project_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
