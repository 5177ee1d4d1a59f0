"""What the global memory's operators take, and where its tokens and states lie, on the host and in a kernel.

Tensors of the caller are [J, L, H, …]: J shards of at most L = n · C tokens. Shards are sorted by falling length, so
chunk i exists in the first active[i] of them. *Packed* tensors hold what belongs to each (chunk, shard, head) that
exists, in this order: states [P, H, F] with P = Σ active, rows [N, C, …] of the N memories of a span. Padding costs
nothing.

A state is one row of F numbers: W1, W2, b1, b2, those that are there, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WEIGHTS = ("w1", "b1", "w2", "b2")  # of the kinds that the kernels run: a linear map, or two with gelu between
MOMENTUM = tuple(f"momentum_{name}" for name in WEIGHTS)
STATE = WEIGHTS + MOMENTUM
COEFFICIENTS = ("end_decay", "end_momentum", "momentum_decay")
_PACKED_ORDER = ("w1", "w2", "b1", "b2")

# Tokens of one program and hidden units that it takes at a time, at most, by bytes of an operand: what fits into the
# registers (tests/benchmarks/AOT.md).
FORWARD_TILES = {2: (64, 64), 4: (32, 32)}
BACKWARD_TILES = {2: (32, 32), 4: (16, 32)}
MIN_ROWS = MIN_UNITS = 16  # tl.dot multiplies no fewer


class GlobalInputs(NamedTuple):
    """The tensors of a scan over J shards of at most L = n · C tokens, H heads; None where the memory does without.

    x, k, v        [J, L, H, D] read rows, keys, values, all of one dtype, in which products take their operands
    gain           [J, L, H] effect of each token's gradient on the weights after its chunk: lr γ
    momentum_gain  [J, L, H] its effect on the momentum after its chunk: lr σ
    w1 … b2        [J, H, …] weights at the start of each shard; momentum_* alike
    norm_*         [H, D]
    end_decay, end_momentum, momentum_decay   [J, n, H] as in `Coefficients`

    All but x, k, v are float32, and all are contiguous.
    """

    x: Tensor
    k: Tensor
    v: Tensor
    gain: Tensor
    w1: Tensor
    momentum_gain: Tensor | None = None
    b1: Tensor | None = None
    w2: Tensor | None = None
    b2: Tensor | None = None
    momentum_w1: Tensor | None = None
    momentum_b1: Tensor | None = None
    momentum_w2: Tensor | None = None
    momentum_b2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    end_decay: Tensor | None = None
    end_momentum: Tensor | None = None
    momentum_decay: Tensor | None = None

    @classmethod
    def unpack(cls, tensors: list[Tensor], names: str) -> GlobalInputs:
        return cls(**dict(zip(names.split(","), (t.contiguous() for t in tensors), strict=True)))

    @property
    def norm(self) -> tuple[Tensor | None, Tensor | None]:
        return self.norm_weight, self.norm_bias

    @property
    def gains(self) -> tuple[Tensor, Tensor | None]:
        return self.gain, self.momentum_gain

    @property
    def coefficients(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in COEFFICIENTS)

    @property
    def gain_count(self) -> int:
        """S: 2 with momentum, otherwise 1."""
        return 1 if self.momentum_gain is None else 2

    def state(self) -> dict[str, Tensor]:
        """Weights and momentum that are there, by name."""
        return {name: getattr(self, name) for name in STATE if getattr(self, name) is not None}

    def sizes(self) -> dict[str, int]:
        """The constants of the kernels that follow from the memory's kind.

        F: numbers of a state, of which FW are matrices; B1, B2: where the biases begin, -1 without them.
        """
        H, D, M = self.w1.shape[1:]
        matrices = D * M * (1 if self.w2 is None else 2)
        after_b1 = matrices + (0 if self.b1 is None else M)
        state = after_b1 + (0 if self.b2 is None else D)
        return {
            "H": H, "D": D, "M": M, "MLP": self.w2 is not None, "B1": -1 if self.b1 is None else matrices,
            "B2": -1 if self.b2 is None else after_b1, "F": state, "FW": matrices,
        }  # fmt: skip


def pack_state(named: dict[str, Tensor], prefix: str = "") -> Tensor | None:
    """[J, H, …] tensors, some under the names of a state, as its rows [J, H, F]; None if there are none."""
    parts = [named[prefix + name].flatten(2) for name in _PACKED_ORDER if prefix + name in named]
    return torch.cat(parts, dim=-1) if parts else None


def unpack_state(rows: Tensor, like: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The inverse of `pack_state`, as copies."""
    names = [prefix + name for name in _PACKED_ORDER if prefix + name in like]
    parts = rows.split([like[name][0, 0].numel() for name in names], dim=-1)
    return {name: part.reshape(like[name].shape).clone() for name, part in zip(names, parts, strict=True)}


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

    def spans(self) -> Iterator[Span]:
        """All chunks, together those that the same shards have."""
        chunk = 0
        while chunk < self.chunks:
            shards = self.active[chunk]
            chunks = self.active.count(shards)
            yield Span(self, chunk, chunks, 0, shards)
            chunk += chunks


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
        """Its part of packed states [P, H, F]."""
        first = self.layout.first_row[self.chunk] + self.shard
        return slice(first, first + self.chunks * self.shards)

    @property
    def next_rows(self) -> slice:
        """For a span of one chunk, the part of packed states that comes next; its first shards have one."""
        layout, chunk = self.layout, self.chunk + 1
        active = layout.active[chunk] if chunk < layout.chunks else 0
        first = layout.first_row[chunk] + self.shard
        return slice(first, first + min(max(0, active - self.shard), self.shards))

    @property
    def first_memory(self) -> int:
        """The first of its memories among those of [P, H]."""
        return self.rows.start * self.layout.heads

    @property
    def first_of_shards(self) -> int:
        """For a span of one chunk, the first of its memories among those of [J, H]."""
        return self.shard * self.layout.heads

    @property
    def places(self) -> tuple[int, int, int, int]:
        """The arguments FIRST, SHARDS, L, C with which a kernel finds the tokens; see `token_place`."""
        layout = self.layout
        L = layout.chunks * layout.chunk_size
        first = self.shard * L + self.chunk * layout.chunk_size
        return first, self.shards, L, layout.chunk_size

    @property
    def coefficient_places(self) -> tuple[int, int]:
        """For a span of one chunk, where its first coefficient lies in [J, n, H], and how far shards are apart."""
        layout = self.layout
        stride = layout.chunks * layout.heads
        return self.shard * stride + self.chunk * layout.heads, stride


class Tiles(NamedTuple):
    """Tokens of one program, hidden units that it takes at a time, and programs of one memory's chunk."""

    rows: int
    units: int
    blocks: int

    @classmethod
    def choose(cls, choices: dict[int, tuple[int, int]], dtype: torch.dtype, chunk_size: int, hidden: int) -> Tiles:
        """From `FORWARD_TILES` or `BACKWARD_TILES`, for operands of `dtype`."""
        most_rows, most_units = choices[dtype.itemsize]
        rows = min(most_rows, max(MIN_ROWS, triton.next_power_of_2(chunk_size)))
        # Not all of them at once: what the compiler then need not compute again it keeps, past all registers.
        units = min(most_units, max(MIN_UNITS, hidden // 2))
        return cls(rows, units, triton.cdiv(chunk_size, rows))


@triton.jit
def program_rows(C, R: tl.constexpr):
    """This program's memory n and the first of its R places in the chunk, both int64, and which places exist [R]."""
    blocks = tl.cdiv(C, R)
    program = tl.program_id(0)
    first = program % blocks * R
    return (program // blocks).to(tl.int64), first.to(tl.int64), first + tl.arange(0, R) < C


@triton.jit
def token_place(n, first, FIRST, SHARDS, L, C, H: tl.constexpr):
    """Index into [J · L, H] of the token at a place in the chunk of memory n of a span; the next one is H further."""
    r = n // H
    return (FIRST + r % SHARDS * L + r // SHARDS * C + first) * H + n % H


# Rows begin at a 64-bit pointer and lie 32-bit numbers apart: half the registers of 64-bit places.


@triton.jit
def load_rows(pointer, valid, STRIDE: tl.constexpr, F: tl.constexpr):
    """The first F entries of rows that lie STRIDE apart, [R, F]; zero where not valid."""
    where = tl.arange(0, valid.shape[0])[:, None] * STRIDE + tl.arange(0, F)[None, :]
    return tl.load(pointer + where, mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(pointer, tile, valid, STRIDE: tl.constexpr, F: tl.constexpr):
    """The inverse of `load_rows`."""
    where = tl.arange(0, valid.shape[0])[:, None] * STRIDE + tl.arange(0, F)[None, :]
    tl.store(pointer + where, tile.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_column(pointer, valid, STRIDE: tl.constexpr):
    """Scalars of tokens, STRIDE apart, as [R, 1]; zero where not valid."""
    return tl.load(pointer + tl.arange(0, valid.shape[0]) * STRIDE, mask=valid, other=0.0)[:, None]


@triton.jit
def store_column(pointer, column, valid, STRIDE: tl.constexpr):
    """The inverse of `load_column`."""
    tl.store(pointer + tl.arange(0, valid.shape[0])[:, None] * STRIDE, column, mask=valid[:, None])


@triton.jit
def load_vector(pointer, F: tl.constexpr):
    """F numbers as [1, F]."""
    return tl.load(pointer + tl.arange(0, F)[None, :])


@triton.jit
def load_norm(norm_weight, norm_bias, n, H: tl.constexpr, D: tl.constexpr):
    """The norm's two vectors for memory n, [1, D] each; 0.0 without a norm."""
    weight, bias = 0.0, 0.0
    if norm_weight is not None:
        weight, bias = load_vector(norm_weight + n % H * D, D), load_vector(norm_bias + n % H * D, D)
    return weight, bias


@triton.jit
def load_bias(state, OFFSET: tl.constexpr, F: tl.constexpr):
    """A bias, F numbers at OFFSET of a state, as [1, F]; 0.0 without one, which is a negative offset."""
    if OFFSET >= 0:
        return load_vector(state + OFFSET, F)
    else:
        return 0.0


@triton.jit
def store_row_sum(pointer, tile, F: tl.constexpr):
    """The sum over the rows of a tile, [R, F] -> [F]."""
    tl.store(pointer + tl.arange(0, F), tl.sum(tile, axis=0))


@triton.jit
def load_w1(w, m, D: tl.constexpr, M: tl.constexpr, U: tl.constexpr):
    """The columns of hidden units m … of W1: [D, U]."""
    return tl.load(w + m + tl.arange(0, D)[:, None] * M + tl.arange(0, U)[None, :])


@triton.jit
def load_w2(w, m, D: tl.constexpr, M: tl.constexpr, U: tl.constexpr):
    """The rows of hidden units m … of W2: [U, D]."""
    return tl.load(w + D * M + (m + tl.arange(0, U)[:, None]) * D + tl.arange(0, D)[None, :])
