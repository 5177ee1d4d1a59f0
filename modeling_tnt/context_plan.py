"""Context parallel: which columns of a batch each rank reads, and which sequences go on from one rank to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.types import MemoryOptions
from .packing import Packing, pack_lengths

# Whole shards and chunks need fewer messages and no odd pieces, but the longest part decides how long a step takes.
_MAX_IMBALANCE = 1.25


class Cut(NamedTuple):
    """The border between the parts of two ranks.

    sequences  [n] int64, indices of the sequences that go on across it, rising.
    tokens     how many tokens of each of them lie before it in this batch.
    ended      of each, whether none lies behind it: it is there for a cache.
    """

    sequences: Tensor
    tokens: list[int]
    ended: list[bool]


class Part(NamedTuple):
    """What one rank reads of a batch [B, T].

    columns    of every row; may be empty.
    packing    of these columns, as `Packing` of a batch of their own; None: every one of the B rows is one sequence
               without padding. A part without a token has a *ghost*: its first column, which counts as a sequence of
               its own that nobody looks at, so that every parameter takes part in the backward pass of every rank.
    sequences  [n] int64, indices of the sequences of this part among those of the batch, without the ghost.
    has_ghost  whether there is one, behind the others.
    incoming   the cut before this part; None for the first rank.
    outgoing   the cut behind it; None for the last rank.
    """

    columns: range
    packing: Packing | None
    sequences: Tensor
    has_ghost: bool
    incoming: Cut | None
    outgoing: Cut | None

    @property
    def rows(self) -> int:
        """Sequences that the memories read, the ghost included."""
        return self.sequences.shape[0] + self.has_ghost

    def rows_of(self, cut: Cut) -> Tensor:
        """[n] int64, where the sequences of a cut are among this part's."""
        return torch.searchsorted(self.sequences, cut.sequences)

    def take(self, x: Tensor) -> Tensor:
        """Its columns of x [B, T, ...], or a single one that is not looked at in an empty part."""
        begin, end = self.columns.start, self.columns.stop
        return x[:, begin:end] if begin < end else x[:, :1]

    def to(self, device: torch.device) -> Part:
        """With its packing on a device."""
        return self._replace(packing=None if self.packing is None else self.packing.to(device))


def part_length(length: int, ranks: int, options: Sequence[MemoryOptions], multiple: int | None) -> int:
    """Columns of the longest part of `length` columns over `ranks`: a multiple of `multiple`.

    None: of all shards and the global chunk, if every rank then gets a part and the longest is at most 1.25 times the
    mean; or else of all chunks; or else of the local chunks; or else of nothing.
    """
    if multiple is not None:
        return _round_up(length, ranks, multiple)
    chunks = [o.chunk_size for o in options]
    shards = [o.chunk_size if o.shard_length is None else o.shard_length for o in options]
    local = [o.chunk_size for o in options if not o.is_global]
    for unit in (math.lcm(*shards), math.lcm(*chunks), math.lcm(*local)):
        part = _round_up(length, ranks, unit)
        if (ranks - 1) * part < length and part * ranks <= _MAX_IMBALANCE * length:
            return part
    return _round_up(length, ranks, 1)


def part_columns(length: int, part: int, rank: int) -> range:
    """The columns of a rank where the longest part has `part` of them."""
    return range(min(length, rank * part), min(length, (rank + 1) * part))


def _round_up(length: int, ranks: int, unit: int) -> int:
    return math.ceil(math.ceil(length / ranks) / unit) * unit


def plan_part(
    whole: Packing | None, batch_shape: tuple[int, int], part: int, rank: int, ranks: int, keep_all: bool
) -> Part:
    """What `rank` of `ranks` reads of a batch whose packing, in the host's memory, is `whole`.

    Args:
        part: columns of the longest part, see `part_length`.
        keep_all: every sequence goes on across every cut, also before its first and behind its last token: as where
            a cache comes in or is to go out.
    """
    batch, length = batch_shape
    columns = part_columns(length, part, rank)
    tokens = _Tokens(whole, batch_shape)
    incoming = tokens.cut(columns.start, keep_all) if rank > 0 else None
    outgoing = tokens.cut(columns.stop, keep_all) if rank < ranks - 1 else None
    counts = tokens.before(columns.stop) - tokens.before(columns.start)
    live = torch.ones_like(counts, dtype=torch.bool) if keep_all else counts > 0
    for cut in (incoming, outgoing):
        if cut is not None:
            live[cut.sequences] = True
    sequences = live.nonzero().squeeze(1)
    counts = counts[sequences]
    if counts.sum() == 0:
        return Part(columns, _ghost(batch, len(columns), len(sequences)), sequences, True, incoming, outgoing)
    packing = None
    if len(sequences) != batch or (counts != len(columns)).any():
        packing = tokens.pack(columns, counts)
    return Part(columns, packing, sequences, False, incoming, outgoing)


class _Tokens:
    """Row, column and sequence of each token of a batch, in the order of its packing."""

    def __init__(self, whole: Packing | None, batch_shape: tuple[int, int]):
        self.whole, (self.batch, self.length) = whole, batch_shape
        if whole is not None:
            index = whole.token_index
            index = torch.arange(self.batch * self.length) if index is None else index
            self.row, self.column = index.div(self.length, rounding_mode="floor"), index % self.length

    def before(self, column: int) -> Tensor:
        """[sequences] int64, how many tokens of each lie before a column."""
        if self.whole is None:
            return torch.full((self.batch,), column)
        return torch.bincount(self.whole.sequence_index[self.column < column], minlength=self.whole.rows)

    def cut(self, column: int, keep_all: bool) -> Cut:
        before = self.before(column)
        ended = before == self.before(self.length)
        goes_on = torch.ones_like(ended) if keep_all else (before > 0) & ~ended
        sequences = goes_on.nonzero().squeeze(1)
        return Cut(sequences, before[sequences].tolist(), ended[sequences].tolist())

    def pack(self, columns: range, counts: Tensor) -> Packing:
        """The tokens in these columns; `counts` of each of the part's sequences."""
        inside = (self.column >= columns.start) & (self.column < columns.stop)
        token_index = self.row[inside] * len(columns) + self.column[inside] - columns.start
        active = None if self.whole.active is None else self.whole.active[:, columns.start : columns.stop]
        if active is None or active.all():
            active = token_index = None
        return pack_lengths(counts, token_index, (self.batch, len(columns)), active)


def _ghost(batch: int, columns: int, sequences: int) -> Packing:
    shape = (batch, max(columns, 1))
    counts = torch.cat([torch.zeros(sequences, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    return pack_lengths(counts, torch.zeros(1, dtype=torch.int64), shape, torch.zeros(shape, dtype=torch.bool))
