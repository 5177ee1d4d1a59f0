"""The reference backend: the recurrences of `api.py` as they are printed, one row and one token at a time.

Nothing here is fast, and nothing is clever: every other backend is tested against it. The gradient of the inner loss
is taken by `torch.func.grad`, so that it, too, is the definition and not a derivation. All operations are
differentiable, float64 inputs are computed in float64 and everything else in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import MemoryProblem
from .memories.kind import MemoryKind
from .types import FastWeights, MemoryParams, MemoryState, initial_memory_state

NORM_EPS = 1e-6


class _Token(NamedTuple):
    """One token of one row: q, k, v [H, D]; lr, momentum, decay [H] (the last two None when absent)."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    p = problem
    dtype = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    outputs, states = [], []
    with torch.autocast(p.q.device.type, enabled=False):
        params = MemoryParams(*(None if x is None else x.to(dtype) for x in p.params))
        first = _first_states(p, dtype)
        for row, tokens in enumerate(_sequences(p, dtype)):
            state = first.map(lambda x, row=row: x[row])
            row_outputs, state = _read_row(p, params, state, tokens)
            outputs += row_outputs
            states.append(state)
        o = torch.stack(outputs).reshape(p.q.shape).to(p.q.dtype)
        return o, _stack_rows(states) if output_final_state else None


def _read_row(
    p: MemoryProblem, params: MemoryParams, state: MemoryState, tokens: list[_Token]
) -> tuple[list[Tensor], MemoryState]:
    """Read the tokens of one row, whose state and parameters have no row dimension."""
    outputs = []
    position = int(state.position)
    if position % p.options.chunk_size == 0:
        state = _start_chunk(state, p.options.qk_projection)
    for token in tokens:
        if p.options.shard_length is not None and position % p.options.shard_length == 0:
            state = _reset(state, params)
        state = _learn(p, state, token, params)
        weights = state.weights
        if p.token_scale is not None:
            weights = _scaled(state, p.token_scale[position % p.options.chunk_size].to(weights.w1.dtype))
        if p.options.is_global:
            outputs.append(memory(p.kind, params, state.anchor, token.q))
        else:
            x = _project(token.q, state.projection, p.options.normalize_projection)
            outputs.append(memory(p.kind, params, weights, x))
        position += 1
        if position % p.options.chunk_size == 0:
            if p.options.update == "muon":
                weights = _orthogonal_step(state, params)
            state = _start_chunk(state._replace(weights=weights), p.options.qk_projection)
    return outputs, state._replace(position=torch.full_like(state.position, position))


def memory(kind: MemoryKind, params: MemoryParams, weights: FastWeights, x: Tensor) -> Tensor:
    """Read one row per head, x [H, D]: `f(W, x) = x + LN(y)`, or `y` without norm; y as the kind of memory defines."""
    y = kind.forward(weights, x, _linear)
    if params.norm_weight is None:
        return y
    centred = y - y.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return x + centred / torch.sqrt(variance + NORM_EPS) * params.norm_weight + params.norm_bias


def inner_gradient(kind: MemoryKind, params: MemoryParams, weights: FastWeights, k: Tensor, v: Tensor) -> FastWeights:
    """The derivative of `½‖f(W, k) − v‖²` with respect to the fast weights, for one token, k and v [H, D]."""
    names = [name for name, w in weights._asdict().items() if w is not None]

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return 0.5 * (memory(kind, params, FastWeights(**tensors), k) - v).square().sum()  # heads do not meet in it

    return FastWeights(**torch.func.grad(loss)({name: getattr(weights, name) for name in names}))


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y = torch.einsum("hi,hio->ho", x, w)
    return y if b is None else y + b


def _learn(p: MemoryProblem, state: MemoryState, token: _Token, params: MemoryParams) -> MemoryState:
    """One more token: `S = momentum S − lr G(W_anchor)`, `W = (1 − decay) W + S`, `M = M + k kᵀ/‖k‖²`.

    With Muon a matrix decays towards the anchor: `W = W_anchor + (1 − decay) (W − W_anchor) + S`.
    """
    gradient = inner_gradient(p.kind, params, state.anchor, token.k, token.v)
    step = gradient.map(lambda g: -_per_head(token.lr, g) * g)
    momentum = None
    if token.momentum is not None:
        step = state.momentum.zip_map(lambda s, u: _per_head(token.momentum, s) * s + u, step)
        momentum = step
    keep = torch.ones_like(token.lr) if token.decay is None else 1 - token.decay
    rest = state.anchor.map(lambda a: a if p.options.update == "muon" and a.dim() == 3 else torch.zeros_like(a))
    weights = state.weights.zip_map(lambda w, r, s: r + _per_head(keep, w) * (w - r) + s, rest, step)
    projection = state.projection
    if p.options.qk_projection != "none":
        unit = _unit(token.k)
        projection = projection + torch.einsum("hi,hj->hij", unit, unit)
    return MemoryState(weights, state.anchor, momentum, projection, state.position)


def _per_head(c: Tensor, like: Tensor) -> Tensor:
    """One number per head [H], shaped to multiply a tensor [H, …]."""
    return c.reshape(-1, *[1] * (like.dim() - 1))


def _scaled(state: MemoryState, r: Tensor) -> FastWeights:
    """`W_anchor − r Σ lr G`, from weights that hold `W_anchor − Σ lr G` (token scale)."""
    return state.weights.zip_map(lambda w, anchor: anchor + r * (w - anchor), state.anchor)


def _orthogonal_step(state: MemoryState, params: MemoryParams) -> FastWeights:
    """Muon: `W_anchor + NS(W − W_anchor)` of each matrix, its columns rescaled to the norms of the learned start."""

    def learn(w: Tensor, anchor: Tensor, initial: Tensor) -> Tensor:
        if w.dim() < 3:
            return w
        w = anchor + _newton_schulz(w - anchor)
        return _unit(w.mT).mT * initial.norm(dim=1, keepdim=True)

    return state.weights.zip_map(learn, state.anchor, params.fast_weights)


def _newton_schulz(x: Tensor) -> Tensor:
    """Five times `X ← 3.4445 X − 4.775 (X Xᵀ) X + 2.0315 (X Xᵀ)² X`, from x of Frobenius norm 1, x [H, in, out]."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


def _project(q: Tensor, projection: Tensor | None, normalize: bool) -> Tensor:
    if projection is None:
        return q
    x = torch.einsum("hi,hij->hj", q, projection)
    return _unit(x) if normalize else x


def _unit(x: Tensor) -> Tensor:
    """`x/‖x‖` along the last dimension. A zero row stays zero, and no gradient goes through it."""
    square = x.square().sum(-1, keepdim=True)
    is_zero = square == 0
    return torch.where(is_zero, 0, x) / torch.sqrt(torch.where(is_zero, 1, square))


def _reset(state: MemoryState, params: MemoryParams) -> MemoryState:
    """What a shard starts with."""
    weights = params.fast_weights
    momentum = None if state.momentum is None else state.momentum.map(torch.zeros_like)
    projection = None if state.projection is None else torch.zeros_like(state.projection)
    return MemoryState(weights, weights, momentum, projection, state.position)


def _start_chunk(state: MemoryState, qk_projection: str) -> MemoryState:
    """The weights become the anchor of the chunk, and a projection "since the start of the chunk" is empty."""
    if qk_projection == "chunk":
        state = state._replace(projection=torch.zeros_like(state.projection))
    return state._replace(anchor=state.weights)


def _first_states(p: MemoryProblem, dtype: torch.dtype) -> MemoryState:
    if p.initial_state is not None:
        return p.initial_state.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return initial_memory_state(
        p.params,
        p.rows,
        with_momentum=p.gates.momentum is not None,
        with_projection=p.options.qk_projection != "none",
        dtype=dtype,
    )


def _sequences(p: MemoryProblem, dtype: torch.dtype) -> Iterator[list[_Token]]:
    """The tokens of each row: of each batch row, or of each packed sequence of the only batch row."""
    fields = [None if x is None else x.to(dtype) for x in (p.q, p.k, p.v, *p.gates)]
    B, T = p.q.shape[:2]
    if p.cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        ends = p.cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in zip(ends, ends[1:], strict=False)]
    for b, start, end in spans:
        yield [_Token(*(None if x is None else x[b, t] for x in fields)) for t in range(start, end)]


def _stack_rows(states: list[MemoryState]) -> MemoryState:
    tensors = [state.tensors() for state in states]
    return MemoryState.from_tensors({name: torch.stack([t[name] for t in tensors]) for name in tensors[0]})
