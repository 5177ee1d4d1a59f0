"""One new token a row through all memories of a layer in plain torch: a few operations for all memories and heads.

A head's linear map and its bias lie next to each other in a `MemoryStack`, so they are one matrix [W; b] that is read
at [h, 1]; a bias then costs no operation of its own. With a = [h, 1] at the key and δ the gradient of
`½‖f(W_anchor, k) − v‖²` at a map's output (times lr), a token's gradient of a map is aᵀ δ: it is added to the state in
place, in one pass. Every product of a row with a matrix is a `bmm` over memories · rows · heads.

Chunks and shards begin and end at numbers, which the host reads from the stack: nearly every token is at no boundary,
and then nothing is copied. Where rows stand at different positions only those at a boundary are touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memories.kinds import memory_kind, type_of
from ..muon import chunk_step, end_chunk
from ..stack import MemoryStack
from ..types import MemoryGates, MemoryOptions, MemoryParams
from .chunk import NORM_EPS, sum_products

Matrices = tuple[Tensor, ...]
"""Of each linear map [N, inputs (+ 1), outputs], the bias as last row, where N = memories · rows · H."""


class _Lines(NamedTuple):
    """What the stages are read at, of some memories: views of the workspace, whose lines are the key and the query.

    x        [memories, rows, H, lines, D] the first stage's input
    values   of each stage, its input [N, lines, width]
    rows     of each stage, the same with the ones of a bias [N, lines, width (+ 1)]
    """

    x: Tensor
    values: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


class _Run(NamedTuple):
    """Neighbouring memories that read alike: which ones, their options, M, and views for reading at their weights."""

    memories: slice
    options: MemoryOptions
    projection: Tensor | None
    query: _Lines
    matrices: Matrices


class TorchStep:
    """The step of one stack with memories of these options; views and workspace are made once, not at every token.

    The anchors of a stack are brought in line with the chunk sizes at the first token after `MemoryStack.fill`.
    """

    def __init__(self, stack: MemoryStack, options: Sequence[MemoryOptions]) -> None:
        self.stack, self.options = stack, tuple(options)
        memory_type = type_of(options[0].memory_type, stack.states[0].weights)
        self._chunk_sizes = tuple(o.chunk_size for o in options)
        self._has_projection = any(slot >= 0 for slot in stack.slots)
        like = stack.states[0].weights
        self._stages = memory_kind(memory_type).stages(len(like.maps))
        self._shapes = [w.shape[-2:] for w, _ in like.maps]
        self._has_bias = like.b1 is not None
        self._dim = like.w1.shape[-2]
        self._positions = stack.position[:, :, 0]
        # Under Muon a matrix [rows, H, in, out] decays towards its anchor.
        self._tied_to_anchor = [
            (w, anchor)
            for state, o in zip(stack.states, options, strict=True)
            for (w, _), (anchor, _) in zip(state.weights.maps, state.anchor.maps, strict=True)
            if o.update == "muon"
        ]
        self._weights, anchor, *momentum = (self._matrices(group) for group in stack.weights)
        self._anchor, self._momentum = anchor, momentum[0] if momentum else None
        self._anchor_transposed = [
            matrix[:, :inputs].transpose(1, 2) for matrix, (inputs, _) in zip(anchor, self._shapes, strict=True)
        ]  # fmt: skip
        with torch.inference_mode(False):  # what is made in inference mode could be written only there
            self._make_workspace()
        self._runs = [self._run(span) for span in self._find_spans()]

    def _matrices(self, packed: Tensor) -> Matrices:
        sizes = [(inputs + int(self._has_bias), outputs) for inputs, outputs in self._shapes]
        parts = packed.flatten(0, 2).split([inputs * outputs for inputs, outputs in sizes], dim=1)
        return tuple(part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True))

    def _make_workspace(self) -> None:
        """For each stage [.., 2, width (+ 1)]: a line for the key, one for the query, and ones for biases."""
        lead, one = self.stack.weights.shape[1:4], int(self._has_bias)
        widths = [self._shapes[stage.maps[0]][0] for stage in self._stages]
        self._inputs = [self.stack.weights.new_ones(*lead, 2, width + one) for width in widths]
        # Only a global memory is read at its anchor; without one nothing but keys meets the anchors.
        self._at_anchor = self._lines(slice(None), slice(0, 2 if any(o.is_global for o in self.options) else 1))
        x = self._inputs[0]
        self._keys, self._queries = x[..., 0, : self._dim], x[..., 1, : self._dim]
        self._key_columns = [t.flatten(0, 2)[:, 0].unsqueeze(-1) for t in self._inputs]

    def _lines(self, memories: slice, lines: slice) -> _Lines:
        rows = [t[memories, ..., lines, :] for t in self._inputs]
        flat, one = [t.flatten(0, 2) for t in rows], int(self._has_bias)
        return _Lines(rows[0][..., : self._dim], tuple(t[..., : t.shape[-1] - one] for t in flat), tuple(flat))

    def _find_spans(self) -> list[slice]:
        """Neighbouring memories that read alike."""
        kinds = [(o.is_global, slot < 0, *o[3:]) for o, slot in zip(self.options, self.stack.slots, strict=True)]
        starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(kinds)], strict=True)]

    def _run(self, memories: slice) -> _Run:
        slots = [slot for slot in self.stack.slots[memories] if slot >= 0]
        return _Run(
            memories,
            self.options[memories.start],
            self.stack.projection[slots[0] : slots[-1] + 1] if slots else None,
            self._lines(memories, slice(1, 2)),
            self._matrices(self.stack.weights[0, memories]),
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: MemoryGates,
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
                return self(q, k, v, gates, params, token_scales)
        positions = self._positions.tolist()
        self._start(positions, params)
        norm = self._norm(params)
        self._keys.copy_(k)
        self._queries.copy_(q)
        f = self._learn(v, gates, norm)
        if self._has_projection:
            key = _unit(self._keys[0])
            self.stack.projection.addcmul_(key.unsqueeze(-1), key.unsqueeze(-2))
        outputs, scaled = [], {}
        for run in self._runs:
            if run.options.is_global:
                outputs.append(f[run.memories, ..., 1:, :])
                continue
            matrices = run.matrices
            if run.options.has_token_scale:
                weights = self._scale(run, positions, token_scales)
                scaled |= dict(zip(range(run.memories.start, run.memories.stop), weights, strict=True))
                matrices = self._matrices(weights)
            outputs.append(self._read(run, matrices, norm))
        self.stack.position.add_(1)
        self._finish(positions, scaled, params)
        total = None
        for o in outputs:
            o = o[0] if o.shape[0] == 1 else o.sum(0)
            total = o if total is None else total + o
        return total.squeeze(-2).to(q.dtype)

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

    def _finish(self, positions: list[list[int]], scaled: dict[int, Tensor], params: Sequence[MemoryParams]) -> None:
        """After the token that ends a chunk: its weights, scaled where they are, are the next anchor."""
        for i, rows in self._at_boundary(positions, self._chunk_sizes, 1):
            if i in scaled:
                self.stack.weights[0, i][rows] = scaled[i][rows]
            if self.options[i].update == "muon":
                self._learn_by_muon(i, rows, params[i])
            self._begin_chunk(i, rows)

    def _learn_by_muon(self, i: int, rows: slice | list[int], params: MemoryParams) -> None:
        state = self.stack.states[i]
        weights, anchor = (group.map(lambda t: t[rows]) for group in (state.weights, state.anchor))
        initial = params.fast_weights.map(lambda t: t.to(self.stack.weights.dtype))
        learned = end_chunk(chunk_step(weights, anchor, initial), anchor, initial)
        for target, new in zip(state.weights, learned, strict=True):
            if target is not None:
                target[rows] = new

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
        stacked = stacked.to(self._inputs[0].dtype).view(2, len(params), 1, -1, 1, self._dim)
        return stacked[0], stacked[1]

    def _learn(self, v: Tensor, gates: MemoryGates, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """One gradient step of every memory; returns f(W_anchor, ·) [memories, rows, H, lines, D], keys before queries.

        With the norm, f = k + γ n + β with n = LN(y), and δ = r (g − mean g − n mean(g n)) with g = lr γ (f − v).
        """
        ys = self._apply(self._at_anchor, self._anchor)
        y = f = ys[-1][0].view(self._at_anchor.x.shape)
        v, lr = v.to(y.dtype), gates.lr.to(y.dtype).unsqueeze(-1)
        if norm is None:
            delta = (f[..., 0, :] - v) * lr
        else:
            weight, bias = norm
            n, _, rstd = torch.native_layer_norm(y, (self._dim,), None, None, NORM_EPS)
            f = torch.addcmul(self._at_anchor.x + bias, n, weight)
            g = (f[..., 0, :] - v) * weight[..., 0, :] * lr
            n = n[..., 0, :]
            delta = torch.addcmul(g - g.mean(-1, keepdim=True), n, (g * n).mean(-1, keepdim=True), value=-1)
            delta = delta * rstd[..., 0, :]
        self._advance(ys, delta.view(-1, 1, self._dim), gates)
        return f

    def _advance(self, ys: list[list[Tensor]], delta: Tensor, gates: MemoryGates) -> None:
        """S = momentum S − lr G, W = (1 − decay) W + S; ys: each stage's outputs [N, lines, width]; delta [N, 1, D]."""
        stack, target = self.stack, self._weights
        if gates.decay is not None:
            for w, anchor in self._tied_to_anchor:
                w.sub_(anchor)
            stack.weights[0].mul_((1 - gates.decay.to(delta.dtype)).unsqueeze(-1))
            for w, anchor in self._tied_to_anchor:
                w.add_(anchor)
        if gates.momentum is not None:
            target = self._momentum
            stack.weights[2].mul_(gates.momentum.unsqueeze(-1))
        deltas = (delta,)
        for t in reversed(range(len(self._stages))):
            maps, joint = self._stages[t].maps, self._stages[t - 1].joint if t > 0 else None
            if joint is not None:
                u = sum_products([(d, self._anchor_transposed[i]) for i, d in zip(maps, deltas, strict=True)])
            for i, d in zip(maps, deltas, strict=True):
                target[i].addcmul_(self._key_columns[t], d, value=-1)
            if joint is not None:
                deltas = joint.gradients([y[:, :1] for y in ys[t - 1]], u)
        if gates.momentum is not None:
            stack.weights[0].add_(stack.weights[2])

    def _read(self, run: _Run, matrices: Matrices, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """f(W, M q) of the local memories of a run, [memories of the run, rows, H, 1, D]."""
        x = run.query.x
        if run.projection is not None:
            projected = torch.matmul(x, run.projection)
            x.copy_(_unit(projected) if run.options.normalize_projection else projected)
        y = self._apply(run.query, matrices)[-1][0].view(x.shape)
        if norm is None:
            return y
        weight, bias = (t[run.memories] for t in norm)
        n = torch.native_layer_norm(y, (self._dim,), None, None, NORM_EPS)[0]
        return torch.addcmul(x + bias, n, weight)

    def _apply(self, lines: _Lines, matrices: Matrices) -> list[list[Tensor]]:
        """The outputs of every stage's maps, [N, lines, width] each; the inputs of the stages behind the first one are
        left in `lines`."""
        outputs = []
        for t, stage in enumerate(self._stages):
            outputs.append([torch.bmm(lines.rows[t], matrices[i]) for i in stage.maps])
            if stage.joint is not None:
                stage.joint.write(outputs[t], lines.values[t + 1])
        return outputs

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
