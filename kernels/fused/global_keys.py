"""What the keys of a chunk do to the state, forward and backward, for the shards of a span of one chunk.

Gradients of all tokens are taken at the anchor. What meets in one product lies side by side (`wide`): in the forward δ
times the gain and, with momentum, δ times the momentum gain; in the backward, beside the gradient of a layer's output,
again these, and beside the layer's weights minus the gradients of weights and momentum after the chunk. So one product
stands for two or three of the derivation.
"""

from __future__ import annotations

from torch import Tensor

from ..types import FastWeights
from .global_curvature import curvature
from .global_error import error
from .global_error_backward import error_backward
from .global_hidden import hidden
from .global_inputs import GlobalInputs, SpanGradients
from .global_products import product
from .global_reads import column_sums, unpack_sum
from .global_rows import Span, empty_rows
from .global_slope import slope


def write(inputs: GlobalInputs, span: Span, anchors: FastWeights) -> FastWeights:
    """Σ gain a δ for each weight, and beside it with momentum Σ momentum_gain a δ: [N, …, S · last] float32."""
    k, S = span.pack(inputs.k), inputs.gain_count
    D, M = anchors.w1.shape[1:]
    wide = empty_rows(k, S * D, k.dtype)
    z = product(k, anchors.w1)
    if anchors.w2 is None:
        error(z, anchors.b1, k, inputs, None, wide, span)
        return FastWeights(product(k.transpose(1, 2), wide), column_sums(wide, anchors.b1))
    a = hidden(z, anchors.b1, k.dtype)
    delta = empty_rows(k, D, k.dtype)
    error(product(a, anchors.w2), anchors.b2, k, inputs, delta, wide, span)
    wide_in = empty_rows(k, S * M, k.dtype)
    slope(z, anchors.b1, product(delta, anchors.w2.transpose(1, 2)), None, inputs.gains, wide_in, span)
    return FastWeights(
        product(k.transpose(1, 2), wide_in),
        column_sums(wide_in, anchors.b1),
        product(a.transpose(1, 2), wide),
        column_sums(wide, anchors.b2),
    )


def write_backward(inputs: GlobalInputs, span: Span, wide: FastWeights, grads: dict[str, Tensor]) -> SpanGradients:
    """Fill the span's part of the gradients of k, v, gain and momentum_gain among `grads`, [J, L, H, …].

    Args:
        wide: weights, beside them minus the gradients of the weights after the chunk, and with momentum of that:
            [N, …, (1 + S) · last], w1 and w2 as operands, biases float32.

    Returns:
        gradients of the anchors as far as they come through the keys, and of the norm.
    """
    k = span.pack(inputs.k)
    backward = _linear_backward if wide.w2 is None else _mlp_backward
    wide_rows, grad_error, g = backward(k, inputs, span, wide, grads)
    target = span.view(grads["k"])
    grad_k = product(wide_rows, wide.w1.transpose(1, 2))
    unpack_sum(grad_k, None if grad_error is None else grad_error.view(target.shape), target)
    return g


# Both return what meets the first layer's `wide` weights, the part of the keys' gradient that comes through the error,
# and the gradients of the anchors and the norm.


def _linear_backward(
    k: Tensor, inputs: GlobalInputs, span: Span, wide: FastWeights, grads: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, SpanGradients]:
    D = k.shape[-1]
    weight, gradients, bias = wide.w1[..., :D], wide.w1[..., D:], _first_columns(wide.b1, D)
    wide_rows = empty_rows(k, wide.w1.shape[-1], k.dtype)
    z = product(k, weight)
    error(z, bias, k, inputs, None, wide_rows, span)
    t = product(k, gradients)
    grad_error, *grad_norm = error_backward(z, bias, k, inputs, t, wide.b1, None, grads, wide_rows, span)
    grad_z = wide_rows[..., :D]
    anchors = FastWeights(product(k.transpose(1, 2), grad_z), column_sums(grad_z, bias))
    return wide_rows, grad_error, SpanGradients(anchors, *grad_norm)


def _mlp_backward(
    k: Tensor, inputs: GlobalInputs, span: Span, wide: FastWeights, grads: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, SpanGradients]:
    D, M = k.shape[-1], wide.w2.shape[1]
    w1, gradients_in, b1 = wide.w1[..., :M], wide.w1[..., M:], _first_columns(wide.b1, M)
    w2, gradients_out, b2 = wide.w2[..., :D], wide.w2[..., D:], _first_columns(wide.b2, D)
    rows_in = empty_rows(k, wide.w1.shape[-1], k.dtype)
    rows_out = empty_rows(k, wide.w2.shape[-1], k.dtype)
    delta = empty_rows(k, D, k.dtype)

    z_in = product(k, w1)
    a = hidden(z_in, b1, k.dtype)
    z_out = product(a, w2)
    error(z_out, b2, k, inputs, delta, rows_out, span)
    u = product(delta, w2.transpose(1, 2))
    t = product(k, gradients_in)
    grad_u = curvature(z_in, b1, u, t, wide.b1, inputs, grads, rows_in, span)
    through_u = product(grad_u, w2)
    t = product(a, gradients_out)
    grad_error, *grad_norm = error_backward(
        z_out, b2, k, inputs, t, wide.b2, through_u, grads, rows_out, span
    )  # fmt: skip
    grad_a = product(rows_out, wide.w2.transpose(1, 2))
    slope(z_in, b1, grad_a, u, (None, None), rows_in, span)  # u holds what reaches z_in by way of φ'

    grad_z_in, grad_z_out = rows_in[..., :M], rows_out[..., :D]
    anchors = FastWeights(
        product(k.transpose(1, 2), grad_z_in),
        column_sums(grad_z_in, b1),
        product(a.transpose(1, 2), grad_z_out).add_(product(grad_u.transpose(1, 2), delta)),
        column_sums(grad_z_out, b2),
    )
    return rows_in, grad_error, SpanGradients(anchors, *grad_norm)


def _first_columns(bias: Tensor | None, columns: int) -> Tensor | None:
    return None if bias is None else bias[:, :columns].contiguous()
