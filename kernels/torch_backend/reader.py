"""The torch backend: chunks in dual form, all pieces that have no common past side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import MemoryProblem
from ..transfer import on_device
from ..types import FastWeights, MemoryParams, MemoryState, initial_memory_state
from .chunk import Coefficients, Norm, advance, chunk_forward, read_only
from .coefficients import Gates, global_coefficients, local_coefficients, token_scale_coefficients
from .projection import project_queries
from .scan import ScanInputs, scan_chunks
from .segments import (
    HEAD,
    INIT,
    JOB,
    STATE,
    TAIL,
    Piece,
    Plan,
    Source,
    Tokens,
    final_positions,
    plan_pieces,
    scatter,
    sequence_lengths,
    start_positions,
)


def read(problem: MemoryProblem, output_final_state: bool) -> tuple[Tensor, MemoryState | None]:
    """See `api.local_memory` and `api.global_memory`."""
    from .muon import MuonReader  # a Reader

    reader = MuonReader if problem.options.update == "muon" else Reader
    return reader(problem, output_final_state).read()


class Block(NamedTuple):
    """The tokens of some pieces: tensors [pieces, length, H, …], scalars [pieces, length, H]."""

    tokens: Tokens
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    decay: Tensor | None


class Reader:
    """One call of a memory operation. `states` holds the end states of what has been read, by kind of piece.

    Another backend may bring its own way to read the jobs, by `scan`, in the dtype of the inputs.
    """

    scans_in_input_dtype = False

    def __init__(self, problem: MemoryProblem, output_final_state: bool):
        self.problem, self.options, self.output_final_state = problem, problem.options, output_final_state
        self.intra = not problem.options.is_global
        self.dtype = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
        self.params = MemoryParams(*(None if t is None else t.to(self.dtype) for t in problem.params))
        self.stages = problem.stages
        self.projects = self.options.qk_projection != "none"
        self.states: dict[str, MemoryState] = {}

    def read(self) -> tuple[Tensor, MemoryState | None]:
        p = self.problem
        with torch.autocast(p.q.device.type, enabled=False):
            self.states[INIT] = initial_memory_state(
                self.params,
                1,
                with_momentum=p.gates.momentum is not None,
                with_projection=self.projects,
                dtype=self.dtype,
            )
            positions = None
            if p.initial_state is not None:
                positions = p.initial_state.position.tolist()
                state = p.initial_state.map(lambda t: t.to(self.dtype))
                self.states[STATE] = state._replace(position=start_positions(p))
            plan = plan_pieces(
                sequence_lengths(p), positions, self.options.chunk_size, self.options.shard_length,
                spare_last=self.spares_last_chunk(),
            )  # fmt: skip
            outputs = []
            for kind, pieces, run in (
                (HEAD, plan.heads, self._read_heads),
                (JOB, plan.jobs, self._read_jobs),
                (TAIL, plan.tails, self._read_tails),
            ):
                if pieces:
                    dtype = p.q.dtype if kind == JOB and self.scans_in_input_dtype else self.dtype
                    block = self._block(pieces, dtype)
                    o, state = run(pieces, block)
                    outputs.append((block.tokens, o))
                    if state is not None:
                        self.states[kind] = state
            o = scatter(outputs, p.q.shape[0] * p.q.shape[1]).view(p.q.shape).to(p.q.dtype)
            return o, self._final_state(plan) if self.output_final_state else None

    def spares_last_chunk(self) -> bool:
        """Whether a last full chunk is left to the tail, which learns nothing that nobody wants."""
        return not self.intra and not self.output_final_state

    def scan(self, inputs: ScanInputs, lengths: list[int]) -> tuple[Tensor, FastWeights, FastWeights | None]:
        """Read independent jobs of whole chunks; see `scan_chunks`."""
        return scan_chunks(inputs, self.problem.kind.name, lengths, self.options.chunk_size, self.intra)

    def _block(self, pieces: list[Piece], dtype: torch.dtype) -> Block:
        p, tokens = self.problem, Tokens(pieces, self.problem.q)

        def block(t: Tensor | None, dtype: torch.dtype = self.dtype) -> Tensor | None:
            return None if t is None else tokens.gather(t.flatten(0, 1)).to(dtype)

        q, k, v = (block(t, dtype) for t in (p.q, p.k, p.v))
        return Block(tokens, q, k, v, block(p.gates.lr), block(p.gates.momentum), block(p.gates.decay))

    def _read_heads(self, pieces: list[Piece], b: Block) -> tuple[Tensor, MemoryState]:
        """Finish chunks that an earlier call began: gradients at its anchor, reads from its weights on."""
        start = self._gather([piece.source for piece in pieces])
        x, projection = self._project(b, start.projection)
        gates = self._gates(b)
        reached = [piece.offset + piece.count for piece in pieces]
        ends = on_device(reached, self.problem.q) == self.options.chunk_size
        momentum = start.momentum
        if self.problem.token_scale is not None:
            c = self._scaled_head(pieces, b, ends)
            momentum = start.anchor
        elif self.intra:
            c = local_coefficients(gates)
        else:
            c = global_coefficients(gates)
        o, weights, momentum = self._chunk(b, x, c, start.anchor, start.weights, momentum)

        def per_row(t: Tensor) -> Tensor:
            return ends.view(-1, *[1] * (t.dim() - 1))

        weights = weights.zip_map(
            lambda w, end: torch.where(per_row(w), end, w), self._end_chunk(weights, start.anchor)
        )
        anchor = weights.zip_map(lambda w, a: torch.where(per_row(w), w, a), start.anchor)
        if self.options.qk_projection == "chunk":
            projection = projection.masked_fill(per_row(projection), 0.0)
        has_momentum = start.momentum is not None
        return o, MemoryState(weights, anchor, momentum if has_momentum else None, projection, start.position)

    def _scaled_head(self, pieces: list[Piece], b: Block, ends: Tensor) -> Coefficients:
        """Token scale in mid-chunk: with U = W_anchor − Σ lr G so far, W_t = (1 − r_t) W_anchor + r_t (U − Σ_new lr G).

        The anchor takes the place of the momentum. After the chunk's last token the state is W_t, before it U.
        """
        scale = self.problem.token_scale.to(self.dtype)
        offsets = on_device([piece.offset for piece in pieces], self.problem.q)
        place = (offsets[:, None] + torch.arange(b.tokens.length, device=scale.device)).clamp(max=len(scale) - 1)
        r = scale[place]
        end = torch.where(ends, scale[-1], 1.0)
        H = b.q.shape[2]
        r, end = r.repeat_interleave(H, 0), end.repeat_interleave(H)[:, None, None]
        column = r.unsqueeze(-1)
        return Coefficients(
            theta=token_scale_coefficients(r).theta, read_decay=column, read_momentum=1 - column,
            end_gain=end, end_decay=end, end_momentum=1 - end,
        )  # fmt: skip

    def _read_jobs(self, pieces: list[Piece], b: Block) -> tuple[Tensor, MemoryState]:
        """Read whole chunks up to a reset or the end: the scan."""
        p, C = self.problem, self.options.chunk_size
        start = self._gather([piece.source for piece in pieces])
        by_chunk = self.options.qk_projection == "chunk"
        x, projection = self._project(b, None if by_chunk or self._fresh(pieces) else start.projection)
        J, L, H, _ = b.q.shape

        def chunks(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.view(J, L // C, C, H).transpose(2, 3)

        if p.token_scale is not None:
            c = token_scale_coefficients(p.token_scale.to(self.dtype).expand(J, L // C, H, C))
        else:
            gates = Gates(chunks(b.momentum), chunks(b.decay))
            c = local_coefficients(gates) if self.intra else global_coefficients(gates)
        inputs = ScanInputs(x, b.k, b.v, b.lr, start.weights, start.momentum, *self.params.norm, c)
        o, weights, momentum = self.scan(inputs, [piece.count // C for piece in pieces])
        if by_chunk:
            projection = torch.zeros_like(start.projection)
        return o, MemoryState(weights, weights, momentum, projection, start.position)

    def _read_tails(self, pieces: list[Piece], b: Block) -> tuple[Tensor, MemoryState | None]:
        """Begin chunks that a later call may finish; the state is only advanced if somebody wants it."""
        start = self._gather([piece.source for piece in pieces])
        if not self.intra and not self.output_final_state:
            rows = start.weights.map(lambda t: t.flatten(0, 1))
            return _blocks(read_only(self.stages, rows, _rows(b.q), self._norm(len(pieces))), b), None
        x, projection = self._project(b, None if self.options.qk_projection == "chunk" else start.projection)
        if self.problem.token_scale is not None:
            scale = self.problem.token_scale.to(self.dtype)[: b.tokens.length]
            rows = len(pieces) * b.q.shape[2]
            c = Coefficients(theta=token_scale_coefficients(scale.expand(rows, -1)).theta)
        elif self.intra:
            c = local_coefficients(self._gates(b))
        else:
            c = global_coefficients(self._gates(b))
        o, weights, momentum = self._chunk(b, x, c, start.weights, None, start.momentum)
        if weights is None:
            return o, None
        return o, MemoryState(weights, start.weights, momentum, projection, start.position)

    def _gates(self, b: Block) -> Gates:
        """Momentum and decay in rows [N, length]."""
        valid = b.tokens.valid()
        H = b.q.shape[2]

        def rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.transpose(1, 2).flatten(0, 1)

        if valid is not None:
            valid = rows(valid.unsqueeze(-1).expand(-1, -1, H)).to(self.dtype)
        return Gates(rows(b.momentum), rows(b.decay), valid)

    def _chunk(
        self,
        b: Block,
        x: Tensor,
        c: Coefficients,
        anchor: FastWeights,
        current: FastWeights | None,
        momentum: FastWeights | None,
    ) -> tuple[Tensor, FastWeights | None, FastWeights | None]:
        """One chunk, or a part of one, with autograd. States come and go as [pieces, H, …]."""
        pieces, C, H = b.q.shape[:3]

        def rows(weights: FastWeights | None) -> FastWeights | None:
            return None if weights is None else weights.map(lambda t: t.flatten(0, 1))

        def unrows(weights: FastWeights | None) -> FastWeights | None:
            return None if weights is None else weights.map(lambda t: t.unflatten(0, (pieces, H)))

        c = c.in_rows(pieces * H, C)
        anchor, current, momentum = rows(anchor), rows(current), rows(momentum)
        kx = torch.cat((_rows(b.k), _rows(x)), dim=1)
        lr = _rows(b.lr.unsqueeze(-1))
        o, s = chunk_forward(
            self.stages, anchor, current, momentum, kx, _rows(b.v), lr, self._norm(pieces), c, self.intra
        )
        weights = None
        if self.output_final_state or current is not None:
            weights, momentum = advance(self.stages, anchor if current is None else current, momentum, s, c)
        return _blocks(o, b), unrows(weights), unrows(momentum)

    def _end_chunk(self, weights: FastWeights, anchor: FastWeights) -> FastWeights:
        """What the next chunk starts from, given the weights after the last token of this one."""
        return weights

    def _norm(self, pieces: int) -> Norm | None:
        if self.params.norm_weight is None:
            return None
        return Norm(*(t.repeat(pieces, 1).unsqueeze(1) for t in self.params.norm))

    def _project(self, b: Block, start: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows to read at, and M after them."""
        options = self.options
        if not self.projects:
            return b.q, None
        if options.qk_projection == "chunk" and b.tokens.length > options.chunk_size:
            J, L, H, D = b.q.shape
            shape = (J * L // options.chunk_size, options.chunk_size, H, D)
            x, end = project_queries(b.q.reshape(shape), b.k.reshape(shape), None, options.normalize_projection, False)
            return x.reshape(J, L, H, D), end
        return project_queries(b.q, b.k, start, options.normalize_projection, need_end=True)

    def _fresh(self, pieces: list[Piece]) -> bool:
        return all(piece.source.kind == INIT for piece in pieces)

    def _gather(self, sources: list[Source]) -> MemoryState:
        """The states that some pieces start from, [pieces, H, …]."""
        kinds = sorted({source.kind for source in sources})
        if kinds == [INIT]:
            return self.states[INIT].map(lambda t: t.expand(len(sources), *t.shape[1:]))
        if len(kinds) == 1 and [s.index for s in sources] == list(range(len(self.states[kinds[0]].position))):
            return self.states[kinds[0]]
        first_row, rows = {}, 0
        for kind in kinds:
            first_row[kind] = rows
            rows += len(self.states[kind].position)
        index = on_device([first_row[s.kind] + s.index for s in sources], self.problem.q)

        def cat(*parts: Tensor) -> Tensor:
            return torch.cat(parts).index_select(0, index) if len(parts) > 1 else parts[0].index_select(0, index)

        return _zip_states(cat, [self.states[kind] for kind in kinds])

    def _final_state(self, plan: Plan) -> MemoryState:
        p = self.problem
        state = self._gather(plan.final)
        if p.initial_state is not None:  # a chunk size other than the one the state was made with may end here
            aligned = start_positions(p) % self.options.chunk_size == 0
            kept = on_device([int(source.kind == STATE) for source in plan.final], self.problem.q)
            unread = (kept != 0) & aligned
            anchor = state.anchor.zip_map(
                lambda a, w: torch.where(unread.view(-1, *[1] * (a.dim() - 1)), w, a), state.weights
            )
            state = state._replace(anchor=anchor)
        return state._replace(position=final_positions(p))


def _zip_states(fn, states: list[MemoryState]) -> MemoryState:
    """Apply `fn` to the corresponding tensors of several states."""
    first = states[0]

    def group(name: str) -> FastWeights | None:
        if getattr(first, name) is None:
            return None
        return getattr(first, name).zip_map(fn, *(getattr(s, name) for s in states[1:]))

    projection = None if first.projection is None else fn(*(s.projection for s in states))
    return MemoryState(
        group("weights"), group("anchor"), group("momentum"), projection, fn(*(s.position for s in states))
    )


def _rows(t: Tensor) -> Tensor:
    """[pieces, C, H, F] -> [pieces · H, C, F]."""
    return t.transpose(1, 2).flatten(0, 1)


def _blocks(rows: Tensor, b: Block) -> Tensor:
    """[pieces · H, C, F] -> [pieces, C, H, F]."""
    return rows.unflatten(0, (b.q.shape[0], b.q.shape[2])).transpose(1, 2)
