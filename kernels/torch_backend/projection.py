"""The Q-K projection `x_t = M_t q_t`, `M_t = M_0 + Σ_{τ≤t} k_τ k_τᵀ / ‖k_τ‖²` (TNT eq. 7, 15, appendix C).

It does not depend on the memory, so it runs over the whole sequence before the scan. With unit keys K, queries Q and M
before a block of tokens: X = Q M + tril(Q Kᵀ) K, and M + Kᵀ K after it. Both directions walk through the blocks of some
rows at a time, so that what they compute stays in a CPU's cache; nothing but the inputs is kept for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..operators import OPERATORS, operator

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
    outputs = OPERATORS.project_forward(q, k, start, normalize, need_end, BLOCK)
    return outputs[0], outputs[1] if need_end else None


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


def _state_rows(m: Tensor | None, slab: slice) -> Tensor | None:
    """[J, H, D, D] -> [N, D, D], a copy; None stands for zero."""
    return None if m is None else m[slab].clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _read(q: Tensor, k: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
    """X = Q M + tril(Q Kᵀ) K, and that triangle."""
    p = torch.bmm(q, k.transpose(1, 2)).tril_()
    return _add_product(None if m is None else torch.bmm(q, m), p, k), p


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place; None stands for zero."""
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


@operator(lambda q, k, start, normalize, need_end, block: _empty_outputs(q, need_end))
def project_forward(
    q: Tensor, k: Tensor, start: Tensor | None, normalize: bool, need_end: bool, block: int
) -> list[Tensor]:
    """x and, if it is needed, M after the last token. No M is made where nothing reads it."""
    outputs = _empty_outputs(q, need_end)
    L = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        for slab in _slabs(q, block):
            m = _state_rows(start, slab)
            for first in range(0, L, block):
                span = slice(first, min(first + block, L))
                unit_k, _ = _unit(_rows(k, slab, span))
                rows, _ = _read(_rows(q, slab, span), unit_k, m)
                _store(outputs[0], slab, span, _unit(rows)[0] if normalize else rows)
                if need_end or span.stop < L:
                    m = _add_product(m, unit_k.transpose(1, 2), unit_k)
            if need_end:
                target = outputs[1][slab]
                target.copy_(m.view(target.shape))
    return outputs


def _empty_outputs(q: Tensor, need_end: bool) -> list[Tensor]:
    J, _, H, D = q.shape
    x = torch.empty_like(q, memory_format=torch.contiguous_format)
    return [x, q.new_empty(J, H, D, D)] if need_end else [x]


@operator(lambda q, k, start, *_: _empty_gradients(q, k, start))
def project_backward(
    q: Tensor, k: Tensor, start: Tensor | None, grad_x: Tensor, grad_end: Tensor | None, normalize: bool, block: int
) -> list[Tensor]:
    """Gradients of q, k and, where it is given, start."""
    grads = _empty_gradients(q, k, start)
    L = q.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        for slab in _slabs(q, block):
            spans = [slice(i, min(i + block, L)) for i in range(0, L, block)]
            before = [_state_rows(start, slab)]  # M before each block
            for span in spans[:-1]:
                unit_k, _ = _unit(_rows(k, slab, span))
                earlier = None if before[-1] is None else before[-1].clone()
                before.append(_add_product(earlier, unit_k.transpose(1, 2), unit_k))
            grad_m = _state_rows(grad_end, slab)
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
                from_m = None if m is None else torch.bmm(grad, m.transpose(1, 2))
                _store(grads[0], slab, span, _add_product(from_m, r, unit_k))
                grad_unit = None if grad_m is None else torch.bmm(unit_k, grad_m + grad_m.transpose(1, 2))
                grad_unit = _add_product(grad_unit, r.transpose(1, 2), query).baddbmm_(p.transpose(1, 2), grad)
                _store(grads[1], slab, span, _unit_backward(unit_k, factor, grad_unit))
                if m is not None:
                    grad_m = _add_product(grad_m, query.transpose(1, 2), grad)
            if start is not None:
                target = grads[2][slab]
                target.copy_(grad_m.view(target.shape))
    return grads


def _empty_gradients(q: Tensor, k: Tensor, start: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, start) if t is not None]


def _setup_context(ctx, inputs, output) -> None:
    q, k, start, ctx.normalize, _, ctx.block = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, start)


def _autograd_backward(ctx, grads):
    q, k, start = ctx.saved_tensors
    grad_x = torch.zeros_like(q) if grads[0] is None else grads[0]
    grad_end = grads[1] if len(grads) > 1 else None
    result = OPERATORS.project_backward(q, k, start, grad_x, grad_end, ctx.normalize, ctx.block)
    return result[0], result[1], result[2] if start is not None else None, None, None, None


project_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
