"""A global memory that learns by Muon: a loop over chunks with autograd, T / chunk_size steps of a few products each.

It has no dual form and needs none: what a chunk has learned is read only when the chunk is whole. The tokens of a chunk
and their coefficients are those of `reader`, applied to U of `kernels.muon` instead of W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..muon import chunk_step, end_chunk, plain_sum
from ..types import FastWeights, MemoryState
from .chunk import Coefficients
from .coefficients import Gates, global_coefficients
from .reader import Block, Reader
from .segments import Piece


class MuonReader(Reader):
    """Reads with `update="muon"`."""

    def _read_jobs(self, pieces: list[Piece], b: Block) -> tuple[Tensor, MemoryState]:
        C = self.options.chunk_size
        start = self._gather([piece.source for piece in pieces])
        weights, momentum = start.weights, start.momentum
        lengths = [piece.count // C for piece in pieces]
        outputs, ends = [], []
        for index in range(lengths[0]):
            jobs, going_on = (sum(length > i for length in lengths) for i in (index, index + 1))  # the first ones
            chunk = Block(b.tokens, *(None if t is None else t[:jobs, index * C : (index + 1) * C] for t in b[1:]))
            o, weights, momentum = checkpoint(
                self._read_whole_chunk, chunk, weights, momentum, use_reentrant=False, preserve_rng_state=False
            )
            outputs.append(F.pad(o, (0, 0, 0, 0, 0, 0, 0, len(pieces) - jobs)))
            ends.insert(0, (_rows(weights, going_on, jobs), _rows(momentum, going_on, jobs)))
            weights, momentum = _rows(weights, 0, going_on), _rows(momentum, 0, going_on)
        weights, momentum = (_cat(group) for group in zip(*ends, strict=True))
        return torch.cat(outputs, dim=1), MemoryState(weights, weights, momentum, None, start.position)

    def _read_whole_chunk(
        self, b: Block, anchor: FastWeights, momentum: FastWeights | None
    ) -> tuple[Tensor, FastWeights, FastWeights | None]:
        """The chunk's outputs, and what the next one starts from. The backward runs it again: of each chunk only the
        state before it is kept."""
        initial = self.params.fast_weights
        gates = Gates(*(None if t is None else t.transpose(1, 2).flatten(0, 1) for t in (b.momentum, b.decay)))
        nothing = chunk_step(anchor, anchor, initial)
        o, step, momentum = super()._chunk(b, b.q, global_coefficients(gates), anchor, nothing, momentum)
        return o, end_chunk(step, anchor, initial), momentum

    def _chunk(
        self,
        b: Block,
        x: Tensor,
        c: Coefficients,
        anchor: FastWeights,
        current: FastWeights | None,
        momentum: FastWeights | None,
    ) -> tuple[Tensor, FastWeights | None, FastWeights | None]:
        """A part of a chunk, between plain sums."""
        initial = self.params.fast_weights
        so_far = chunk_step(anchor if current is None else current, anchor, initial)
        o, step, momentum = super()._chunk(b, x, c, anchor, so_far, momentum)
        return o, plain_sum(step, anchor, initial), momentum

    def _end_chunk(self, weights: FastWeights, anchor: FastWeights) -> FastWeights:
        initial = self.params.fast_weights
        return end_chunk(chunk_step(weights, anchor, initial), anchor, initial)


def _rows(weights: FastWeights | None, first: int, last: int) -> FastWeights | None:
    return None if weights is None else weights.map(lambda t: t[first:last])


def _cat(parts: tuple[FastWeights | None, ...]) -> FastWeights | None:
    return None if parts[0] is None else parts[0].zip_map(lambda *rows: torch.cat(rows), *parts[1:])
