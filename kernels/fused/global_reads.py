"""Reads of the global memory, all at anchors and so independent of each other: forward and backward of a span."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import FastWeights
from .global_hidden import hidden
from .global_inputs import GlobalInputs, SpanGradients
from .global_output import output
from .global_output_backward import output_backward
from .global_products import product
from .global_rows import Span, empty_rows
from .global_slope import slope


def read(inputs: GlobalInputs, span: Span, anchors: FastWeights, o: Tensor) -> None:
    """Write the span's part of o [J, L, H, D]."""
    x = span.pack(inputs.x)
    y, bias = product(x, anchors.w1), anchors.b1
    if anchors.w2 is not None:
        y, bias = product(hidden(y, bias, x.dtype), anchors.w2), anchors.b2
    output(y, bias, x, inputs, o, span)


def read_backward(
    inputs: GlobalInputs, span: Span, anchors: FastWeights, grad_o: Tensor, grad_x: Tensor
) -> SpanGradients:
    """Write the span's part of grad_x [J, L, H, D], from grad_o [J, L, H, D]; activations are made again."""
    x = span.pack(inputs.x)
    has_norm = inputs.norm_weight is not None
    h, first, bias, last = x, None, anchors.b1, anchors.w1
    if anchors.w2 is not None:
        first = product(x, anchors.w1)
        h, bias, last = hidden(first, anchors.b1, x.dtype), anchors.b2, anchors.w2
    grad_norm = (None, None)
    if has_norm:
        y = product(h, last)
        grad_y, *grad_norm = output_backward(y, bias, inputs.norm_weight, grad_o, x.dtype, span)
    else:
        grad_y = span.pack(grad_o).to(x.dtype)
    grad_first, grad_w2, grad_b2 = grad_y, None, None
    if anchors.w2 is not None:
        grad_w2, grad_b2 = product(h.transpose(1, 2), grad_y), column_sums(grad_y, anchors.b2)
        grad_h = product(grad_y, last.transpose(1, 2))
        grad_first = empty_rows(first, first.shape[-1], x.dtype)
        slope(first, anchors.b1, grad_h, None, (None, None), grad_first, span)
    grads = FastWeights(
        product(x.transpose(1, 2), grad_first), column_sums(grad_first, anchors.b1), grad_w2, grad_b2
    )  # fmt: skip
    unpack_sum(
        product(grad_first, anchors.w1.transpose(1, 2)),
        span.view(grad_o) if has_norm else None,
        span.view(grad_x),
    )
    return SpanGradients(grads, *grad_norm)


def column_sums(rows: Tensor, bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias, if there is one: rows [N, C, F] of any dtype -> [N, F] float32."""
    return None if bias is None else rows.sum(1, dtype=torch.float32)


def unpack_sum(rows: Tensor, addend: Tensor | None, target: Tensor) -> None:
    """Write packed rows [N, C, F], plus an addend [chunks, shards, H, C, F], to such a view of the caller's tensor."""
    rows = rows.view(target.shape)
    if addend is None:
        target.copy_(rows)
    else:
        torch.add(rows, addend, out=target)
