"""Where the tokens of the global memory's chunks lie, on the host (`Layout`, `Span`) and in a kernel.

Tensors of the caller are [J, L, H, …]: J shards of at most L = n · C tokens. Shards are sorted by falling length, so
chunk i exists in the first active[i] of them. *Packed* tensors hold what belongs to each (chunk, shard, head) that
exists, in this order: weights [P, H, …] with P = Σ active, rows [N, C, F] of N memories. Padding costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a tile of rows: 8 per thread in 4 warps. Twice that takes the largest kernel to all 255 registers.
TILE = 1024


class Layout:
    """The shape of a scan: `lengths` are the chunks of each shard, falling, at least 1 each."""

    def __init__(self, lengths: list[int], chunk_size: int, heads: int):
        self.shards, self.chunks, self.chunk_size, self.heads = len(lengths), lengths[0], chunk_size, heads
        self.active = [sum(length > chunk for length in lengths) for chunk in range(self.chunks)]
        self.first_row = [0, *accumulate(self.active)]
        self.ragged = lengths[-1] < lengths[0]

    @property
    def rows(self) -> int:
        """P, the number of chunks of all shards."""
        return self.first_row[-1]

    def chunk_spans(self, chunk: int, limit: int) -> Iterator[Span]:
        """One chunk of all shards that have it, at most `limit` at a time."""
        for shard in range(0, self.active[chunk], limit):
            shards = min(limit, self.active[chunk] - shard)
            yield Span(self, chunk, 1, shard, shards)

    def spans(self, limit: int) -> Iterator[Span]:
        """All chunks, at most `limit` of them at a time; several at once only where the same shards have them."""
        chunk = 0
        while chunk < self.chunks:
            shards, stop = self.active[chunk], chunk + 1
            while stop < self.chunks and self.active[stop] == shards and (stop + 1 - chunk) * shards <= limit:
                stop += 1
            if stop == chunk + 1:
                yield from self.chunk_spans(chunk, limit)
            else:
                yield Span(self, chunk, stop - chunk, 0, shards)
            chunk = stop


class Span(NamedTuple):
    """Chunks of shards that lie next to each other in packed order."""

    layout: Layout
    chunk: int
    chunks: int
    shard: int
    shards: int

    @property
    def memories(self) -> int:
        """N: chunks times shards times heads."""
        return self.chunks * self.shards * self.layout.heads

    @property
    def rows(self) -> slice:
        """Its part of packed weights [P, H, …]."""
        first = self.layout.first_row[self.chunk] + self.shard
        return slice(first, first + self.chunks * self.shards)

    @property
    def next_rows(self) -> slice:
        """For a span of one chunk, the part of packed weights that comes next; its first shards have one."""
        layout, chunk = self.layout, self.chunk + 1
        active = layout.active[chunk] if chunk < layout.chunks else 0
        first = layout.first_row[chunk] + self.shard
        return slice(first, first + min(max(0, active - self.shard), self.shards))

    @property
    def of_shards(self) -> slice:
        """Its part of what there is per shard, [J, …]."""
        return slice(self.shard, self.shard + self.shards)

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """The arguments FIRST, SHARDS, L, C, H with which a kernel finds the tokens; see `token_place`."""
        layout = self.layout
        L = layout.chunks * layout.chunk_size
        first = self.shard * L + self.chunk * layout.chunk_size
        return first, self.shards, L, layout.chunk_size, layout.heads

    def view(self, t: Tensor) -> Tensor:
        """Its part of [J, L, H, …] in packed order, [chunks, shards, H, C, …], without a copy."""
        t = t.unflatten(1, (self.layout.chunks, self.layout.chunk_size))
        return t[self.of_shards, self.chunk : self.chunk + self.chunks].transpose(0, 1).transpose(2, 3)

    def pack(self, t: Tensor) -> Tensor:
        """Its rows of [J, L, H, F] as [N, C, F], contiguous."""
        return self.view(t).reshape(-1, self.layout.chunk_size, t.shape[-1]).contiguous()


def tile_rows(features: int, chunk_size: int) -> int:
    """Rows of one program."""
    return min(max(1, TILE // features), triton.next_power_of_2(chunk_size))


def row_grid(rows: Tensor) -> tuple[tuple[int], int]:
    """The grid of a kernel that goes over packed rows [N, C, F], and the rows of one program."""
    memories, chunk_size, features = rows.shape
    R = tile_rows(features, chunk_size)
    return (memories * triton.cdiv(chunk_size, R),), R


def empty_rows(like: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """Packed rows of `features` entries for the memories and tokens of `like` [N, C, F]."""
    return like.new_empty((*like.shape[:2], features), dtype=dtype)


def by_head(sums: Tensor | None, span: Span) -> Tensor | None:
    """Sums of the programs of a span, [programs, D], over all but the heads: [H, D]."""
    if sums is None:
        return None
    return sums.view(span.chunks * span.shards, span.layout.heads, -1, sums.shape[-1]).sum((0, 2))


@triton.jit
def program_rows(C, R: tl.constexpr):
    """This program's memory n (int64), places in its chunk [R], and which of them exist."""
    blocks = tl.cdiv(C, R)
    program = tl.program_id(0)
    n = (program // blocks).to(tl.int64)
    c = program % blocks * R + tl.arange(0, R)
    return n, c, c < C


@triton.jit
def token_place(n, c, FIRST, SHARDS, L, C, H: tl.constexpr):
    """Indices into [J · L, H] of the tokens at places c in the chunk of memory n of a span."""
    r = n // H
    return (FIRST + r % SHARDS * L + r // SHARDS * C + c) * H + n % H


@triton.jit
def load_tile(pointer, row, valid, WIDTH: tl.constexpr, F: tl.constexpr):
    """The first F entries of rows of WIDTH, in float32; zero where not valid."""
    where = row[:, None] * WIDTH + tl.arange(0, F)[None, :]
    return tl.load(pointer + where, mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, tile, row, valid, WIDTH: tl.constexpr, F: tl.constexpr):
    """The inverse of `load_tile`."""
    where = row[:, None] * WIDTH + tl.arange(0, F)[None, :]
    tl.store(pointer + where, tile.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_vector(pointer, n, WIDTH: tl.constexpr, F: tl.constexpr):
    """The first F entries of row n of [N, WIDTH], as [1, F] in float32."""
    return tl.load(pointer + n * WIDTH + tl.arange(0, F)[None, :]).to(tl.float32)


@triton.jit
def load_column(pointer, place, valid):
    """Per-token scalars as [R, 1]; zero where not valid."""
    return tl.load(pointer + place, mask=valid, other=0.0)[:, None]


@triton.jit
def store_column(pointer, column, place, valid):
    """The inverse of `load_column`."""
    tl.store(pointer + place[:, None], column, mask=valid[:, None])


@triton.jit
def store_row_sum(pointer, tile, F: tl.constexpr):
    """The program's sum over its rows [R, F], in its row of [programs, F]."""
    where = tl.program_id(0).to(tl.int64) * F + tl.arange(0, F)
    tl.store(pointer + where, tl.sum(tile, axis=0))
