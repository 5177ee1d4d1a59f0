"""Cutting sequences into pieces that can run side by side.

Every sequence (a batch row or a packed one) with its own starting position falls into at most one *head*, the tokens
that finish a chunk begun in an earlier call, *jobs* of whole chunks that end at a reset, and at most one *tail*, the
tokens of an unfinished chunk. Pieces name the state they start from, so that those with no common past run together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import MemoryProblem
from ..transfer import on_device

INIT, STATE, HEAD, JOB, TAIL = "init", "state", "head", "job", "tail"


class Source(NamedTuple):
    """Where a state comes from: the initial parameters, the caller's state, or the end of a piece; and which row."""

    kind: str
    index: int


class Piece(NamedTuple):
    """Tokens `start … start + count − 1` of the flattened input; `offset` is the first one's position in its chunk."""

    start: int
    count: int
    offset: int
    source: Source
    sequence: int


class Plan(NamedTuple):
    """All pieces of a call (jobs by falling length), and which state each sequence ends in."""

    heads: list[Piece]
    jobs: list[Piece]
    tails: list[Piece]
    final: list[Source]


def plan_pieces(
    lengths: list[int], positions: list[int] | None, chunk_size: int, shard_length: int | None, spare_last: bool
) -> Plan:
    """Cut sequences, laid out one after the other, of these lengths.

    Args:
        positions: tokens each sequence has read before; None when there is no earlier state.
        spare_last: leave the last chunk to the tail even if it is full (for a memory whose final state nobody wants).
    """
    heads: list[Piece] = []
    jobs: list[Piece] = []
    tails: list[Piece] = []
    final: list[Source] = []
    start = 0
    for n, length in enumerate(lengths):
        position = 0 if positions is None else positions[n]
        source = Source(INIT, 0) if positions is None else Source(STATE, n)
        token, end = start, start + length
        if length and position % chunk_size:
            count = min(length, chunk_size - position % chunk_size)
            heads.append(Piece(token, count, position % chunk_size, source, n))
            source = Source(HEAD, len(heads) - 1)
            token, position = token + count, position + count
        stop = end - (end - token) % chunk_size
        if spare_last and stop == end and token < end:
            stop -= chunk_size
        while token < stop:
            count = stop - token
            if shard_length is not None:
                if position % shard_length == 0:
                    source = Source(INIT, 0)
                count = min(count, shard_length - position % shard_length)
            jobs.append(Piece(token, count, 0, source, n))
            source = Source(JOB, len(jobs) - 1)
            token, position = token + count, position + count
        if token < end:
            if shard_length is not None and position % shard_length == 0:
                source = Source(INIT, 0)
            tails.append(Piece(token, end - token, 0, source, n))
            source = Source(TAIL, len(tails) - 1)
        final.append(source)
        start = end
    return _sort_jobs(Plan(heads, jobs, tails, final))


def _sort_jobs(plan: Plan) -> Plan:
    """Order the jobs by falling length (stable), and follow them with the indices that name them."""
    order = sorted(range(len(plan.jobs)), key=lambda j: -plan.jobs[j].count)
    place = {old: new for new, old in enumerate(order)}

    def moved(source: Source) -> Source:
        return Source(JOB, place[source.index]) if source.kind == JOB else source

    return plan._replace(
        jobs=[plan.jobs[j] for j in order],
        tails=[t._replace(source=moved(t.source)) for t in plan.tails],
        final=[moved(s) for s in plan.final],
    )


class Segment(NamedTuple):
    """The part of a sequence between two resets, for a kernel that walks through it.

    start: first token in the flattened input; count: tokens; offset: the first one's position in its chunk; source: row
    of the state it starts from, 0 the learned one and 1 + n that of sequence n; end: n if sequence n ends with it and
    its final state is wanted, otherwise -1.
    """

    start: int
    count: int
    offset: int
    source: int
    end: int


def plan_segments(
    lengths: list[int],
    positions: list[int] | None,
    chunk_size: int,
    shard_length: int | None,
    output_final_state: bool,
) -> list[Segment]:
    """Cut sequences, laid out one after the other, of these lengths at their resets.

    positions: tokens each sequence has read before; None when there is no earlier state. An empty sequence is a segment
    without tokens if its final state is wanted.
    """
    segments = []
    token = 0
    for n, length in enumerate(lengths):
        position = 0 if positions is None else positions[n]
        source = 0 if positions is None else 1 + n
        end = token + length
        if length == 0 and output_final_state:
            segments.append(Segment(token, 0, position % chunk_size, source, n))
        while token < end:
            count = end - token
            if shard_length is not None:
                if position % shard_length == 0:
                    source = 0
                count = min(count, shard_length - position % shard_length)
            is_end = output_final_state and token + count == end
            segments.append(Segment(token, count, position % chunk_size, source, n if is_end else -1))
            token, position = token + count, position + count
    return segments


def segment_table(segments: list[Segment], p: MemoryProblem, output_final_state: bool) -> Tensor:
    """The segments of a call as [S, 5] int64 on its device, in the order of `Segment`. Do not write into it."""

    def make() -> Tensor:
        return _regular_table(*p.q.shape[:2], p.options.shard_length, output_final_state, p.q.device)

    is_regular = p.cu_seqlens is None and p.initial_state is None
    numbers = [number for segment in segments for number in segment]
    return on_device(numbers, p.q, make if is_regular else None).view(-1, 5)


def _regular_table(
    rows: int, length: int, shard_length: int | None, output_final_state: bool, device: torch.device
) -> Tensor:
    """`plan_segments` of rows of one length without an earlier state, made on the device; flat."""
    shard = length if shard_length is None else min(shard_length, length)
    place = torch.arange(0, length, shard, device=device)
    row = torch.arange(rows, device=device)[:, None]
    start = row * length + place
    count = (length - place).clamp(max=shard).expand_as(start)
    zero = torch.zeros_like(start)
    end = torch.where(place + shard >= length, row, -1) if output_final_state else zero - 1
    return torch.stack([start, count, zero, zero, end], dim=-1).flatten()


def sequence_lengths(p: MemoryProblem) -> list[int]:
    """Tokens of each batch row, or of each packed sequence."""
    if p.cu_seqlens is None:
        return [p.q.shape[1]] * p.q.shape[0]
    ends = p.cu_seqlens.tolist()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def final_positions(p: MemoryProblem) -> Tensor:
    """[rows] int64, the tokens that each sequence has read after the call."""
    if p.cu_seqlens is None:
        read = torch.full((p.rows,), p.q.shape[1], dtype=torch.int64, device=p.q.device)
    else:
        read = on_device(sequence_lengths(p), p.q).clone()  # the caller may write into it
    return read if p.initial_state is None else start_positions(p) + read


def start_positions(p: MemoryProblem) -> Tensor:
    """[rows] int64 on the device, the tokens that each sequence has read before the call, behind an initial state."""
    position = p.initial_state.position
    return position if position.device == p.q.device else on_device(position.tolist(), p.q)


class Tokens:
    """The tokens of some pieces as a [pieces, longest] block, padded at the end."""

    def __init__(self, pieces: list[Piece], like: Tensor):
        counts = [p.count for p in pieces]
        self.rows, self.length = len(pieces), max(counts)
        self.padded = min(counts) < self.length
        first = pieces[0].start
        self.contiguous = not self.padded and all(p.start == first + i * self.length for i, p in enumerate(pieces))
        self.first = first
        self._starts = [p.start for p in pieces]
        self._counts = counts
        self._like, self._device = like, like.device

    def valid(self) -> Tensor | None:
        """[pieces, longest] bool, or None when nothing is padded."""
        if not self.padded:
            return None
        counts = on_device(self._counts, self._like)
        return torch.arange(self.length, device=self._device) < counts[:, None]

    def index(self) -> Tensor:
        """[pieces, longest] positions in the flattened input; arbitrary at padding."""
        index = self._first_tokens()[:, None] + torch.arange(self.length, device=self._device)
        valid = self.valid()
        return index if valid is None else index.masked_fill(~valid, self.first)

    def _first_tokens(self) -> Tensor:
        """[pieces] int64 on the device."""
        steps = {b - a for a, b in zip(self._starts, self._starts[1:], strict=False)}
        step = max(steps, default=1)

        def make() -> Tensor:
            return torch.arange(self.first, self.first + self.rows * step, step, device=self._device)

        evenly = len(steps) < 2 and step > 0  # as pieces of rows of one length are
        return on_device(self._starts, self._like, make if evenly else None)

    def gather(self, flat: Tensor) -> Tensor:
        """[tokens, …] -> [pieces, longest, …], zero at padding; a view where the pieces lie side by side."""
        shape = (self.rows, self.length, *flat.shape[1:])
        if self.contiguous:
            return flat[self.first : self.first + self.rows * self.length].reshape(shape)
        block = flat.index_select(0, self.index().flatten()).reshape(shape)
        valid = self.valid()
        return block if valid is None else block * valid.reshape(*valid.shape, *[1] * (flat.dim() - 1)).to(flat.dtype)


def scatter(blocks: list[tuple[Tokens, Tensor]], total: int) -> Tensor:
    """The inverse of `gather`: outputs [pieces, longest, …] of all pieces -> [total, …]."""
    if len(blocks) == 1 and blocks[0][0].contiguous and blocks[0][0].rows * blocks[0][0].length == total:
        return blocks[0][1].reshape(total, *blocks[0][1].shape[2:])
    where = torch.empty(total + 1, dtype=torch.int64, device=blocks[0][1].device)
    base = 0
    for tokens, _ in blocks:
        size = tokens.rows * tokens.length
        place = torch.arange(base, base + size, device=where.device)
        index, valid = tokens.index(), tokens.valid()
        if valid is not None:
            index = index.masked_fill(~valid, total)  # an entry too many takes what is padding
        where[index.flatten()] = place
        base += size
    return torch.cat([block.flatten(0, 1) for _, block in blocks]).index_select(0, where[:total])
