"""One new token a row through all memories of a layer in plain torch: a few operations for all memories and heads.

A head's layer and its bias lie next to each other in a `MemoryStack`, so they are one matrix [W; b] that is read at
[x, 1]; a bias then costs no operation of its own. With a = [k, 1] at the first layer, [gelu, 1] at the last and δ the
gradient of `½‖f(W_anchor, k) − v‖²` at a layer's output (times lr), a token's gradient of a layer is aᵀ δ: it is added
to the state in place, in one pass. Every product of a row with a matrix is a `bmm` over memories · rows · heads.

Chunks and shards begin and end at numbers, which the host reads from the stack: nearly every token is at no boundary,
and then nothing is copied. Where rows stand at different positions only those at a boundary are touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .chunk import NORM_EPS
from .stack import MemoryStack
from .types import MemoryParams


class StepOptions(NamedTuple):
    """How one memory reads; the fields are those of `local_memory`. A global memory has a chunk_size only."""

    chunk_size: int
    shard_length: int | None = None
    is_global: bool = False
    qk_projection: str = "none"
    normalize_projection: bool = False
    has_token_scale: bool = False


class StepGates(NamedTuple):
    """The gates of one token of every row, for all memories: [memories, rows, H]; momentum and decay may be None."""

    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None


class _Layers(NamedTuple):
    """Packed weights [memories, rows, H, P] as matrices with the bias as their last row; N = memories · rows · H."""

    first: Tensor  # [N, D (+ 1), M]
    last: Tensor | None  # [N, M (+ 1), D]; None: a linear memory


class _Run(NamedTuple):
    """Neighbouring memories that read alike."""

    memories: slice
    is_global: bool
    projections: slice | None
    normalize: bool
    scaled: bool


class TorchStep:
    """The step of one stack with memories of these options; views and workspace are made once, not at every token.

    The anchors of a stack are brought in line with the chunk sizes at the first token after `MemoryStack.fill`.
    """

    def __init__(self, stack: MemoryStack, options: Sequence[StepOptions]) -> None:
        self.stack, self.options = stack, tuple(options)
        self._chunk_sizes = tuple(o.chunk_size for o in options)
        self._slots = stack.slots
        self._projects = max(self._slots) >= 0
        self._runs = self._find_runs()
        like = stack.states[0].weights
        self._has_bias, self._is_mlp = like.b1 is not None, like.w2 is not None
        self._dim, self._hidden = like.w1.shape[-2:]
        self._weights, self._anchor, *momentum = (self._layers(group) for group in stack.weights)
        self._momentum = momentum[0] if momentum else None
        self._positions = stack.position[:, :, 0]
        with torch.inference_mode(False):  # what is made in inference mode could be written only there
            self._make_workspace()

    def _find_runs(self) -> list[_Run]:
        runs: list[_Run] = []
        for i, (o, slot) in enumerate(zip(self.options, self._slots, strict=True)):
            projections = None if slot < 0 else slice(slot, slot + 1)
            run = _Run(slice(i, i + 1), o.is_global, projections, o.normalize_projection, o.has_token_scale)
            alike = runs and runs[-1][3:] == run[3:] and runs[-1].is_global == run.is_global
            if alike and (runs[-1].projections is None) == (projections is None):
                grown = None if projections is None else slice(runs[-1].projections.start, slot + 1)
                runs[-1] = runs[-1]._replace(memories=slice(runs[-1].memories.start, i + 1), projections=grown)
            else:
                runs.append(run)
        return runs

    def _layers(self, packed: Tensor) -> _Layers:
        one = int(self._has_bias)
        rows = packed.flatten(0, 2)
        size = (self._dim + one) * self._hidden
        first = rows[:, :size].unflatten(1, (self._dim + one, self._hidden))
        return _Layers(first, rows[:, size:].unflatten(1, (self._hidden + one, self._dim)) if self._is_mlp else None)

    def _make_workspace(self) -> None:
        """What a layer is read at, [.., 2, width (+ 1)]: a line for the key, one for the query, and ones for biases."""
        stack, one = self.stack, int(self._has_bias)
        lead = stack.weights.shape[1:4]
        # Only a global memory is read at its anchor; without one nothing but keys meets the anchors.
        self._lines = 2 if any(run.is_global for run in self._runs) else 1
        self._x = stack.weights.new_ones(*lead, 2, self._dim + one)
        self._a = stack.weights.new_ones(*lead, 2, self._hidden + one) if self._is_mlp else self._x
        self._x_keys, self._x_queries = self._x[..., 0, : self._dim], self._x[..., 1, : self._dim]
        self._x_lines = self._x[..., : self._lines, : self._dim]
        self._x_rows, self._a_rows = self._x.flatten(0, 2), self._a.flatten(0, 2)
        self._k_column, self._a_column = self._x_rows[:, 0].unsqueeze(-1), self._a_rows[:, 0].unsqueeze(-1)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: StepGates,
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
    ) -> Tensor:
        """Learn from k, v and read at q, [rows, H, D] each; the states are advanced in place.

        Args:
            params: of each memory; read at every token, so that they may change in between.
            token_scales: [chunk_size] of each memory that has one.

        Returns:
            The sum of the memories' outputs [rows, H, D], in q.dtype.
        """
        if torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):
                return self._step(q, k, v, gates, params, token_scales)
        return self._step(q, k, v, gates, params, token_scales)

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: StepGates,
        params: Sequence[MemoryParams],
        token_scales: Sequence[Tensor | None],
    ) -> Tensor:
        positions = self._positions.tolist()
        self._start(positions, params)
        norm = self._norm(params)
        self._x_keys.copy_(k)
        self._x_queries.copy_(q)
        f = self._learn(v, gates, norm)
        if self._projects:
            key = _unit(self._x_keys[0])
            self.stack.projection.addcmul_(key.unsqueeze(-1), key.unsqueeze(-2))
        outputs, scaled = [], {}
        for run in self._runs:
            if run.is_global:
                outputs.append(f[run.memories, ..., 1, :])
                continue
            layers = self._weights
            if run.scaled:
                weights = self._scale(run, positions, token_scales)
                scaled |= dict(zip(range(run.memories.start, run.memories.stop), weights, strict=True))
                layers = self._layers(weights)
            outputs.append(self._read(run, layers, norm))
        self.stack.position.add_(1)
        self._finish(positions, scaled)
        total = None
        for o in outputs:
            o = o[0] if o.shape[0] == 1 else o.sum(0)
            total = o if total is None else total + o
        return total.to(q.dtype)

    # -------------------------------------------------------------------------------------------------- boundaries

    def _start(self, positions: list[list[int]], params: Sequence[MemoryParams]) -> None:
        """Before the token: a shard begins with the learned weights."""
        if self.stack.aligned_to != self._chunk_sizes:
            for i, rows in self._at_boundary(positions, self._chunk_sizes, 0):
                self._begin_chunk(i, rows)
            self.stack.aligned_to = self._chunk_sizes
        for i, rows in self._at_boundary(positions, [o.shard_length for o in self.options], 0):
            state = self.stack.states[i]
            for group in (state.weights, state.anchor):
                for target, learned in zip(group, params[i].fast_weights, strict=True):
                    if target is not None:
                        target[rows] = learned.to(target.dtype)
            if state.momentum is not None:
                self.stack.weights[2, i][rows] = 0
            if state.projection is not None:
                state.projection[rows] = 0

    def _finish(self, positions: list[list[int]], scaled: dict[int, Tensor]) -> None:
        """After the token that ends a chunk: its weights, scaled where they are, are the next anchor."""
        for i, rows in self._at_boundary(positions, self._chunk_sizes, 1):
            if i in scaled:
                self.stack.weights[0, i][rows] = scaled[i][rows]
            self._begin_chunk(i, rows)

    def _begin_chunk(self, i: int, rows: slice | list[int]) -> None:
        weights, anchor = self.stack.weights[0, i], self.stack.weights[1, i]
        anchor[rows] = weights[rows]
        if self.options[i].qk_projection == "chunk":
            self.stack.states[i].projection[rows] = 0

    def _at_boundary(
        self, positions: list[list[int]], lengths: Sequence[int | None], ahead: int
    ) -> Iterator[tuple[int, slice | list[int]]]:
        """Memories with rows whose position (and so many tokens) is a multiple of their length; and these rows."""
        for i, (length, row_positions) in enumerate(zip(lengths, positions, strict=True)):
            if length is not None:
                rows = [r for r, position in enumerate(row_positions) if (position + ahead) % length == 0]
                if rows:
                    yield i, slice(None) if len(rows) == len(row_positions) else rows

    # ---------------------------------------------------------------------------------------------------- the token

    def _norm(self, params: Sequence[MemoryParams]) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the residual norm, [memories, 1, H, 1, D]."""
        if params[0].norm_weight is None:
            return None
        stacked = torch.stack([p.norm_weight for p in params] + [p.norm_bias for p in params])
        stacked = stacked.to(self._x.dtype).view(2, len(params), 1, -1, 1, self._dim)
        return stacked[0], stacked[1]

    def _learn(self, v: Tensor, gates: StepGates, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """One gradient step of every memory; returns f(W_anchor, ·) [memories, rows, H, lines, D], keys before queries.

        With the norm, f = k + γ n + β with n = LN(y), and δ = r (g − mean g − n mean(g n)) with g = lr γ (f − v).
        """
        lines = self._lines
        y = z = torch.bmm(self._x_rows[:, :lines], self._anchor.first)
        if self._is_mlp:
            torch.ops.aten.gelu.out(z, approximate="tanh", out=self._a_rows[:, :lines, : self._hidden])
            y = torch.bmm(self._a_rows[:, :lines], self._anchor.last)
        y = f = y.view(self._x_lines.shape)
        v, lr = v.to(y.dtype), gates.lr.to(y.dtype).unsqueeze(-1)
        if norm is None:
            delta = (f[..., 0, :] - v) * lr
        else:
            weight, bias = norm
            n, _, rstd = torch.native_layer_norm(y, (self._dim,), None, None, NORM_EPS)
            f = torch.addcmul(self._x_lines + bias, n, weight)
            g = (f[..., 0, :] - v) * weight[..., 0, :] * lr
            n = n[..., 0, :]
            delta = torch.addcmul(g - g.mean(-1, keepdim=True), n, (g * n).mean(-1, keepdim=True), value=-1)
            delta = delta * rstd[..., 0, :]
        self._advance(z, delta.view(-1, 1, self._dim), gates)
        return f

    def _advance(self, z: Tensor, delta: Tensor, gates: StepGates) -> None:
        """S = momentum S − lr G, W = (1 − decay) W + S; z [N, lines, M]: the first layer's output; delta [N, 1, D]."""
        stack = self.stack
        target = self._weights
        if gates.decay is not None:
            stack.weights[0].mul_((1 - gates.decay.to(delta.dtype)).unsqueeze(-1))
        if gates.momentum is not None:
            target = self._momentum
            stack.weights[2].mul_(gates.momentum.unsqueeze(-1))
        if self._is_mlp:
            u = torch.bmm(delta, self._anchor.last[:, : self._hidden].transpose(1, 2))
            target.last.addcmul_(self._a_column, delta, value=-1)
            delta = torch.ops.aten.gelu_backward(u, z[:, :1], approximate="tanh")
        target.first.addcmul_(self._k_column, delta, value=-1)
        if gates.momentum is not None:
            stack.weights[0].add_(stack.weights[2])

    def _read(self, run: _Run, layers: _Layers, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """f(W, M q) of local memories, [memories of the run, rows, H, D]; `layers` are those of the run if scaled."""
        x = self._x_queries[run.memories]
        if run.projections is not None:
            m = self.stack.projection[run.projections]
            projected = torch.matmul(x.unsqueeze(-2), m).squeeze(-2)
            x.copy_(_unit(projected) if run.normalize else projected)
        per_memory = self._x_rows.shape[0] // len(self.options)
        span = slice(run.memories.start * per_memory, run.memories.stop * per_memory)
        first, last = layers if run.scaled else (layers.first[span], layers.last[span] if self._is_mlp else None)
        y = torch.bmm(self._x_rows[span, 1:], first)
        if self._is_mlp:
            torch.ops.aten.gelu.out(y, approximate="tanh", out=self._a_rows[span, 1:, : self._hidden])
            y = torch.bmm(self._a_rows[span, 1:], last)
        y = y.view(x.shape)
        if norm is None:
            return y
        weight, bias = (t[run.memories, ..., 0, :] for t in norm)
        n = torch.native_layer_norm(y, (self._dim,), None, None, NORM_EPS)[0]
        return torch.addcmul(x + bias, n, weight)

    def _scale(self, run: _Run, positions: list[list[int]], token_scales: Sequence[Tensor | None]) -> Tensor:
        """W_anchor + r (W − W_anchor) of the run's memories, packed; r by each row's position in its chunk (TTT)."""
        memories = range(run.memories.start, run.memories.stop)
        r = torch.stack([token_scales[i][[p % self._chunk_sizes[i] for p in positions[i]]] for i in memories])
        weights, anchor = self.stack.weights[0, run.memories], self.stack.weights[1, run.memories]
        return torch.lerp(anchor, weights, r.to(weights.dtype)[:, :, None, None])


def _unit(x: Tensor) -> Tensor:
    """x/‖x‖ along the last dimension; a zero row stays zero."""
    square = (x * x).sum(-1, keepdim=True)
    return x * torch.where(square == 0, 0.0, square.rsqrt())
