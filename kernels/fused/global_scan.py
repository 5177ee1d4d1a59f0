"""The global memory over whole chunks on a GPU: cuBLAS for the products, fused kernels for what lies between them.

Only the keys are sequential: chunk after chunk, the gradients at the anchor and the state after it. Reads depend on the
anchors alone, so those of several chunks go through one product. The states before all chunks are kept for the backward
in float32: 2 D · M / chunk_size numbers a token and head for an MLP, twice that with momentum; activations are made
again.

Both directions are custom operators, so that `torch.compile` and activation checkpointing see one node each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import NAMESPACE, OPERATORS
from ..slab import MOMENTUM, WEIGHTS, ScanInputs
from ..types import FastWeights
from .global_advance import BLOCK, advance
from .global_advance_backward import advance_backward
from .global_inputs import COEFFICIENTS, STATE, GlobalInputs, SpanGradients, anchors_of, as_operands, pair
from .global_keys import write, write_backward
from .global_reads import read, read_backward
from .global_rows import Layout, Span

# Bytes of one float32 hidden activation, [N, C, M], of the chunks that are worked on at a time: enough work to fill a
# large card. The backward holds about six times that.
SPAN_BYTES = 64 << 20

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def scan_global_chunks(
    inputs: ScanInputs, lengths: list[int], chunk_size: int
) -> tuple[Tensor, FastWeights, FastWeights | None]:
    """Read J independent shards of whole chunks at their anchors: `scan_chunks` with intra=False.

    Args:
        inputs: see `ScanInputs`; x, k, v of one dtype of `DTYPES`, the rest float32. Operands of products are rounded
            to that dtype, in the backward the gradients of the state too. Head dim and hidden width: powers of two.
        lengths: chunks per shard, falling, at least 1 each, `lengths[0] * chunk_size == L`.

    Returns:
        o [J, L, H, D] in the dtype of x (zero past a shard's end), and float32 weights and momentum after each shard.
    """
    tokens = {name: getattr(inputs, name).dtype for name in ("x", "k", "v")}
    if inputs.x.dtype not in DTYPES or len(set(tokens.values())) > 1:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"x, k, v must share one dtype of {names}, got {tokens}; convert them, or use backend='torch'")
    given = {name: getattr(inputs, name) for name in GlobalInputs._fields if name not in ("gain", "momentum_gain")}
    for name, effect in (("gain", inputs.end_gain), ("momentum_gain", inputs.momentum_gain)):
        given[name] = None if name == "momentum_gain" and effect is None else _per_token(inputs.lr, effect)
    given = {name: t.contiguous() for name, t in given.items() if t is not None}
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given.values())
    outputs = OPERATORS.global_forward(list(given.values()), ",".join(given), lengths, chunk_size, keep)
    end = dict(zip((name for name in STATE if name in given), outputs[1:], strict=False))
    momentum = FastWeights(*(end.get(name) for name in MOMENTUM)) if MOMENTUM[0] in end else None
    return outputs[0], FastWeights(*(end.get(name) for name in WEIGHTS)), momentum


def _per_token(lr: Tensor, effect: Tensor | None) -> Tensor:
    """lr [J, L, H] times a coefficient per token [J, n, H, C] (None: 1)."""
    return lr if effect is None else lr * effect.transpose(2, 3).flatten(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::global_forward", mutates_args=())
def global_forward(tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, keep: bool) -> list[Tensor]:
    """o, the state after each shard, and with `keep` the state before each chunk in packed order."""
    inputs = GlobalInputs.unpack(tensors, names)
    layout = Layout(lengths, chunk_size, inputs.x.shape[2])
    o, end = _empty_outputs(inputs, layout)
    with torch.autocast(inputs.x.device.type, enabled=False), torch.cuda.device_of(inputs.x):
        anchors, operands = _advance_all(inputs, layout, end)
        for span in layout.spans(_limit(inputs, chunk_size)):
            read(inputs, span, anchors_of(anchors, operands, span.rows), o)
    return [o, *end.values(), *(anchors.values() if keep else ())]


@global_forward.register_fake
def _(tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, keep: bool) -> list[Tensor]:
    inputs = GlobalInputs.unpack(tensors, names)
    layout = Layout(lengths, chunk_size, inputs.x.shape[2])
    o, end = _empty_outputs(inputs, layout)
    return [o, *end.values(), *(inputs.packed_state(layout).values() if keep else ())]


def _limit(inputs: GlobalInputs, chunk_size: int) -> int:
    """Chunks of shards that are worked on at a time."""
    heads, M = inputs.w1.shape[1], inputs.w1.shape[-1]
    return max(1, SPAN_BYTES // (4 * heads * chunk_size * M))


def _empty_outputs(inputs: GlobalInputs, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    o = torch.zeros_like(inputs.x) if layout.ragged else torch.empty_like(inputs.x)
    return o, {name: torch.empty_like(t) for name, t in inputs.state().items()}


def _advance_all(
    inputs: GlobalInputs, layout: Layout, end: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state before every chunk, packed, and its weights as operands. Fills the state after each shard."""
    anchors = inputs.packed_state(layout)
    for name, t in inputs.state().items():
        anchors[name][: layout.shards] = t
    operands = {}  # in float32 the anchors themselves
    if inputs.x.dtype != torch.float32:
        operands = {n: torch.empty_like(anchors[n], dtype=inputs.x.dtype) for n in ("w1", "w2") if n in anchors}
        for name, t in operands.items():
            t[: layout.shards] = getattr(inputs, name)
    for chunk in range(layout.chunks):
        for span in layout.chunk_spans(chunk, _limit(inputs, layout.chunk_size)):
            products = write(inputs, span, anchors_of(anchors, operands, span.rows))
            for name in inputs.weights:
                operand = operands[name][span.next_rows] if name in operands else None
                advance(
                    pair(anchors, name, span.rows),
                    getattr(products, name),
                    inputs.coefficients(span),
                    (*pair(anchors, name, span.next_rows), operand),
                    pair(end, name, span.of_shards),
                )
    return anchors, operands


@torch.library.custom_op(f"{NAMESPACE}::global_backward", mutates_args=())
def global_backward(
    tensors: list[Tensor],
    names: str,
    kept: list[Tensor],
    grads: list[Tensor],
    grad_names: str,
    lengths: list[int],
    chunk_size: int,
) -> list[Tensor]:
    """Gradients of all `tensors`, from those of o and of the state after each shard (missing ones are zero)."""
    inputs = GlobalInputs.unpack(tensors, names)
    layout = Layout(lengths, chunk_size, inputs.x.shape[2])
    given = dict(zip(grad_names.split(","), (g.contiguous() for g in grads), strict=True))
    with torch.autocast(inputs.x.device.type, enabled=False), torch.cuda.device_of(inputs.x):
        backward = _Backward(inputs, layout, dict(zip(inputs.state(), kept, strict=True)), given)
        backward.reads(given["o"])
        for chunk in reversed(range(layout.chunks)):
            for span in layout.chunk_spans(chunk, backward.limit):
                backward.keys(span)
        return backward.gradients(names)


@global_backward.register_fake
def _(
    tensors: list[Tensor],
    names: str,
    kept: list[Tensor],
    grads: list[Tensor],
    grad_names: str,
    lengths: list[int],
    chunk_size: int,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


class _Backward:
    """The gradients while they are made: `out` those of the inputs, `before` those of the state before every chunk."""

    def __init__(self, inputs: GlobalInputs, layout: Layout, anchors: dict[str, Tensor], given: dict[str, Tensor]):
        self.inputs, self.layout, self.anchors = inputs, layout, anchors
        self.limit = _limit(inputs, layout.chunk_size)
        self.before = inputs.packed_state(layout)
        self.end = {name: given[name] if name in given else torch.zeros_like(t) for name, t in inputs.state().items()}
        make = torch.zeros_like if layout.ragged else torch.empty_like
        self.out = {name: make(t) for name, t in inputs._asdict().items() if t is not None and name not in STATE}
        for name in ("norm_weight", "norm_bias"):
            if name in self.out:
                self.out[name].zero_()

    def reads(self, grad_o: Tensor) -> None:
        """All reads, at once but for the memory that they need."""
        operands = as_operands(self.anchors, self.inputs.x.dtype)
        for span in self.layout.spans(self.limit):
            anchors = anchors_of(self.anchors, operands, span.rows)
            g = read_backward(self.inputs, span, anchors, grad_o, self.out["x"])
            for name, target in self._of_anchors(span):
                target.copy_(getattr(g.anchors, name))
            self._add_norm(g)

    def keys(self, span: Span) -> None:
        """One chunk: from the gradients of the state after it to those of the state before it and of its tokens."""
        wide = self._step_back(span)
        g = write_backward(self.inputs, span, wide, self.out)
        for name, target in self._of_anchors(span):
            target.add_(getattr(g.anchors, name))
        self._add_norm(g)

    def gradients(self, names: str) -> list[Tensor]:
        first = slice(0, self.layout.shards)
        return [self.before[name][first].clone() if name in STATE else self.out[name] for name in names.split(",")]

    def _of_anchors(self, span: Span) -> list[tuple[str, Tensor]]:
        """The weights' gradients of a span, with a row per memory."""
        return [(name, self.before[name][span.rows].flatten(0, 1)) for name in self.inputs.weights]

    def _add_norm(self, g: SpanGradients) -> None:
        if g.norm_weight is not None:
            self.out["norm_weight"] += g.norm_weight
            self.out["norm_bias"] += g.norm_bias

    def _step_back(self, span: Span) -> FastWeights:
        """The part of the recurrences that touches no token. Returns the weights for `write_backward`."""
        inputs, coefficients = self.inputs, self.inputs.coefficients(span)
        blocks = {name: -(-getattr(inputs, name)[0, 0].numel() // BLOCK) for name in inputs.weights}
        dots = None
        if any(c is not None for c in coefficients):
            dots = inputs.gain.new_empty((span.memories, sum(blocks.values()), len(COEFFICIENTS)))
        wide, dot = {}, 0
        for name in inputs.weights:
            state = pair(self.anchors, name, span.rows)
            width = 2 if state[1] is None else 3
            dtype = inputs.x.dtype if name in ("w1", "w2") else torch.float32
            shape = state[0].shape
            wide[name] = state[0].new_empty((span.memories, *shape[2:-1], width * shape[-1]), dtype=dtype)
            advance_backward(
                state,
                coefficients,
                pair(self.before, name, span.next_rows),
                pair(self.end, name, span.of_shards),
                pair(self.before, name, span.rows),
                wide[name],
                dots,
                dot,
            )
            dot += blocks[name]
        for column, name in enumerate(COEFFICIENTS):
            if name in self.out:
                grad = dots[..., column].sum(1)
                self.out[name][span.of_shards, span.chunk] = grad.view(span.shards, -1)
        return FastWeights(**wide)


def _setup_context(ctx, inputs, output) -> None:
    tensors, names, lengths, chunk_size, _ = inputs
    ctx.set_materialize_grads(False)
    states = sum(name in STATE for name in names.split(","))
    ctx.save_for_backward(*tensors, *output[1 + states :])
    ctx.tensors = len(tensors)
    ctx.arguments = (names, lengths, chunk_size)


def _autograd_backward(ctx, grads):
    names, lengths, chunk_size = ctx.arguments
    saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    tensors, kept = list(saved[: ctx.tensors]), list(saved[ctx.tensors :])
    state = [name for name in STATE if name in names.split(",")]
    given = {name: g for name, g in zip(("o", *state), grads, strict=False) if g is not None}
    if "o" not in given:
        given["o"] = torch.zeros_like(tensors[0])
    result = OPERATORS.global_backward(tensors, names, kept, list(given.values()), ",".join(given), lengths, chunk_size)
    return result, None, None, None, None


global_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
