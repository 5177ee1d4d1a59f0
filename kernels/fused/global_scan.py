"""The global memory over whole chunks on a GPU: kernels for what happens to each token, cuBLAS for sums over a chunk's.

Only the keys are sequential: chunk after chunk, the gradients at the anchor and the state after it. Reads depend on the
anchors alone, and all are one launch. The states before all chunks are kept for the backward in float32: 2 D · M /
chunk_size numbers a token and head for an MLP, twice that with momentum; activations are made again.

Both directions are custom operators, so that `torch.compile` and activation checkpointing see one node each.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..operators import OPERATORS, operator
from ..torch_backend.slab import ScanInputs, group
from ..types import FastWeights
from .global_backward import StateGradients, backward_tiles, chunk_backward
from .global_forward import BLOCK, advance, read, write
from .global_layout import COEFFICIENTS, MOMENTUM, STATE, WEIGHTS, GlobalInputs, Layout, pack_state, unpack_state
from .limits import gradient_dtype

# Bytes of one float32 hidden activation, [N, C, M], of the chunks that are worked on at a time: enough work to fill a
# large card. The backward holds about three times that.
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
    given, c = inputs.tensors(), inputs.coefficients
    given["gain"] = _per_token(inputs.lr, c.end_gain)
    given.pop("momentum_gain", None)
    if c.momentum_gain is not None:
        given["momentum_gain"] = _per_token(inputs.lr, c.momentum_gain)
    given = {name: given[name].contiguous() for name in GlobalInputs._fields if name in given}
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given.values())
    outputs = OPERATORS.global_forward(list(given.values()), ",".join(given), lengths, chunk_size, keep)
    end = dict(zip((name for name in STATE if name in given), outputs[1:], strict=False))
    return outputs[0], group(end, WEIGHTS), group(end, MOMENTUM)


def _per_token(lr: Tensor, effect: Tensor | None) -> Tensor:
    """lr [J, L, H] times a coefficient per token [J, n, H, C] (None: 1)."""
    return lr if effect is None else lr * effect.transpose(2, 3).flatten(1, 2)


def _fake_forward(tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, keep: bool) -> list[Tensor]:
    inputs = GlobalInputs.unpack(tensors, names)
    layout = Layout(lengths, chunk_size, inputs.x.shape[2])
    o, end = _empty_outputs(inputs, layout)
    return [o, *end.values(), *(rows for rows in _empty_states(inputs, layout) if keep and rows is not None)]


@operator(_fake_forward)
def global_forward(tensors: list[Tensor], names: str, lengths: list[int], chunk_size: int, keep: bool) -> list[Tensor]:
    """o, the state after each shard, and with `keep` weights and momentum before each chunk, [P, H, F] each."""
    inputs = GlobalInputs.unpack(tensors, names)
    layout = Layout(lengths, chunk_size, inputs.x.shape[2])
    o, end = _empty_outputs(inputs, layout)
    with torch.autocast(inputs.x.device.type, enabled=False), torch.cuda.device_of(inputs.x):
        states, operands = _first_states(inputs, layout)
        ends = tuple(None if rows is None else rows.new_empty(layout.shards, *rows.shape[1:]) for rows in states)
        for chunk in range(layout.chunks):
            for span in layout.chunk_spans(chunk, _limit(inputs, chunk_size)):
                products = write(inputs, span, states[0], states[0] if operands is None else operands)
                advance(inputs, span, states, operands, ends, products)
        for span in layout.spans():
            read(inputs, span, states[0], states[0] if operands is None else operands, o)
        end |= _unpack_both(ends, inputs)
    return [o, *end.values(), *(rows for rows in states if keep and rows is not None)]


def _limit(inputs: GlobalInputs, chunk_size: int) -> int:
    """Shards of a chunk that are worked on at a time."""
    heads, M = inputs.w1.shape[1], inputs.w1.shape[-1]
    return max(1, SPAN_BYTES // (4 * heads * chunk_size * M))


def _empty_outputs(inputs: GlobalInputs, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    o = torch.zeros_like(inputs.x) if layout.ragged else torch.empty_like(inputs.x)
    return o, {name: torch.empty_like(t) for name, t in inputs.state().items()}


def _empty_states(inputs: GlobalInputs, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Room for weights and momentum before every chunk, [P, H, F]."""
    sizes = inputs.sizes()
    shape = (layout.rows, sizes["H"], sizes["F"])
    return inputs.w1.new_empty(shape), None if inputs.momentum_w1 is None else inputs.w1.new_empty(shape)


def _first_states(inputs: GlobalInputs, layout: Layout) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """Room for the states before all chunks, and for their matrices as operands (None where those are the same), with
    those of the first chunks in it."""
    states, matrices = _empty_states(inputs, layout), inputs.sizes()["FW"]
    for rows, packed in zip(states, _pack_both(inputs.state()), strict=True):
        if rows is not None:
            rows[: layout.shards] = packed
    if inputs.x.dtype == torch.float32:
        return states, None
    operands = inputs.x.new_empty(*states[0].shape[:2], matrices)
    operands[: layout.shards] = states[0][: layout.shards, :, :matrices]
    return states, operands


def _pack_both(state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return pack_state(state), pack_state(state, "momentum_")


def _unpack_both(rows: tuple[Tensor, Tensor | None], inputs: GlobalInputs) -> dict[str, Tensor]:
    weights, momentum = rows
    state = unpack_state(weights, inputs.state())
    return state if momentum is None else state | unpack_state(momentum, inputs.state(), "momentum_")


@operator(lambda tensors, *_: [torch.empty_like(t) for t in tensors])
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
        out = _backward(inputs, layout, (kept[0], kept[1] if len(kept) > 1 else None), given)
    return [out[name] for name in names.split(",")]


def _backward(
    inputs: GlobalInputs, layout: Layout, states: tuple[Tensor, Tensor | None], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The gradients of all inputs, by name."""
    sizes, blocks = inputs.sizes(), backward_tiles(inputs, layout).blocks
    make = torch.zeros_like if layout.ragged else torch.empty_like
    out = {name: make(getattr(inputs, name)) for name in ("x", "k", "v", "gain")}
    if inputs.momentum_gain is not None:
        out["momentum_gain"] = make(inputs.momentum_gain)
    shape = (layout.shards, layout.chunks, layout.heads, triton.cdiv(sizes["F"], BLOCK))
    new = torch.zeros if layout.ragged else torch.empty
    dots = {
        name: new(shape, device=inputs.x.device) for name in COEFFICIENTS if getattr(inputs, name) is not None
    }  # fmt: skip
    norm_sums = None
    if inputs.norm_weight is not None:
        norm_sums = inputs.gain.new_empty(2, 2, layout.rows, layout.heads, blocks, sizes["D"])

    operands = states[0]
    if inputs.x.dtype != torch.float32:
        operands = states[0][..., : sizes["FW"]].to(inputs.x.dtype)
    after = _end_gradients(inputs, given)
    for chunk in reversed(range(layout.chunks)):
        for span in layout.chunk_spans(chunk, _limit(inputs, layout.chunk_size)):
            chunk_backward(inputs, span, states, operands, after, given["o"], out, dots, norm_sums)
    out |= _unpack_both((after.weights, after.momentum), inputs)
    out |= {name: parts.sum(-1) for name, parts in dots.items()}
    if norm_sums is not None:
        out |= {name: norm_sums[i].sum((0, 1, 3)) for i, name in enumerate(("norm_weight", "norm_bias"))}
    return out


def _end_gradients(inputs: GlobalInputs, given: dict[str, Tensor]) -> StateGradients:
    """Those of the state after each shard, with zeros for what has none."""
    end = {name: given[name] if name in given else torch.zeros_like(t) for name, t in inputs.state().items()}
    rows, matrices, dtype = _pack_both(end), inputs.sizes()["FW"], gradient_dtype(inputs.x.dtype)
    operands = (
        None if t is None else t[..., :matrices].neg().to(dtype, memory_format=torch.contiguous_format) for t in rows
    )
    return StateGradients(*rows, *operands)


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
