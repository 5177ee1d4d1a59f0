"""Which columns of a batch are tokens, and which tokens form a sequence.

Chunk and shard positions count the real tokens of each sequence, so padding must not reach the memories at all, and
packed sequences must not see each other. Both are the same operation: inside of each token mixer the real tokens are
gathered into one row [1, total] with the boundaries of its sequences, the memories read that row, and the result is
scattered back. Between blocks everything is [B, T, ...], as adapters and hooks expect. A batch without padding or
packing pays nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.transfer import to_device, to_host
from .kernels.types import MemoryOptions


class Packing(NamedTuple):
    """The real tokens of a batch [B, T] as one row of N sequences, some of which may be empty.

    cu_seqlens      [N + 1] int64, sequence n is tokens cu_seqlens[n] to cu_seqlens[n+1] of the row.
    sequence_index  [total] int64, the sequence of each token.
    token_index     [total] int64, the place of each token in the flattened batch [B·T]; None: every column is a token.
    batch_shape     (B, T).
    active          [B, T] bool, True at the tokens, or None with token_index.
    boundaries      cu_seqlens in the host's memory: every memory of every layer reads them there, and asking a GPU each
                    time would wait for it each time.
    """

    cu_seqlens: Tensor
    sequence_index: Tensor
    token_index: Tensor | None
    batch_shape: tuple[int, int]
    active: Tensor | None
    boundaries: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [1, total, ...]."""
        flat = x.flatten(0, 1)
        return (flat if self.token_index is None else flat.index_select(0, self.token_index)).unsqueeze(0)

    def scatter(self, x: Tensor) -> Tensor:
        """[1, total, ...] → [B, T, ...] with zeros where there is no token."""
        flat = x.squeeze(0)
        if self.token_index is not None:
            rows = self.batch_shape[0] * self.batch_shape[1]
            flat = flat.new_zeros(rows, *flat.shape[1:]).index_copy(0, self.token_index, flat)
        return flat.unflatten(0, self.batch_shape)

    def hide(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with zeros where there is no token."""
        return x if self.active is None else torch.where(self.active.unsqueeze(-1), x, 0)

    def to(self, device: torch.device) -> Packing:
        """Copy to a device without waiting; `boundaries` stay on the host."""
        names = ("cu_seqlens", "sequence_index", "token_index", "active")
        given = {name: t for name in names if (t := getattr(self, name)) is not None}
        return self._replace(**{name: to_device(t, device) for name, t in given.items()})

    @property
    def total(self) -> int:
        """Number of tokens."""
        return self.sequence_index.shape[0]

    @property
    def rows(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens.shape[0] - 1


class TokenStep(NamedTuple):
    """One column of a batch, read behind a cache: [B, 1].

    active   [B] bool, False at padding; None: every row has a token.
    backend  that steps the memories: "torch", "native" or "triton".
    options  how each of a layer's memories reads.
    """

    active: Tensor | None
    backend: str
    options: tuple[MemoryOptions, ...]

    def hide(self, x: Tensor) -> Tensor:
        """x [B, 1, ...] with zeros where there is no token."""
        return x if self.active is None else self.keep(x, x.new_zeros(()))

    def keep(self, x: Tensor, other: Tensor) -> Tensor:
        """x [B, ...] where there is a token, else `other`."""
        return x if self.active is None else torch.where(self.active.view(-1, *[1] * (x.dim() - 1)), x, other)


def plan_step(
    batch_shape: tuple[int, int],
    device: torch.device,
    backend: str,
    options: tuple[MemoryOptions, ...],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    past_length: int = 0,
) -> TokenStep:
    """`plan_packing` for a single column; raises the same errors.

    For the triton backend, which must not wait for the device, without a look at what the tensors hold; for the others,
    whose step looks at them anyway, a mask of ones is none.
    """
    _check_ids(batch_shape, position_ids, seq_idx)
    if attention_mask is None:
        return TokenStep(None, backend, options)
    _check_mask(attention_mask, batch_shape, past_length)
    active = (attention_mask[:, -1] != 0).to(device)
    if backend != "triton" and not torch.compiler.is_compiling() and active.all():
        active = None
    return TokenStep(active, backend, options)


def plan_packing(
    batch_shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    boundaries: Mapping[str, Tensor] | None = None,
    past_length: int = 0,
) -> Packing | None:
    """How to pack a batch; None when it has neither padding nor several sequences in a row.

    The host plans, so that a device is waited for once: for all of these that are there, and not at all if none is.

    Args:
        batch_shape: (B, T).
        attention_mask: [B, T] or [B, past_length + T], 0 at padding; its last T columns count.
        position_ids: [B, T] or [1, T]; a new sequence begins where they do not rise from one token to the next. Only
            that is read from them: a gap, as padding inside a row leaves one, is none.
        seq_idx: [B, T] or [1, T]; a new sequence begins where it changes. Replaces position_ids.
        boundaries: [N + 1] boundaries of the sequences in a single row (B = 1), under every name by which the caller
            got them; all must be the same. Replaces the two above.
        past_length: columns that a cache has already seen. Packed sequences cannot continue one.

    Raises:
        ValueError: wrong shapes, boundaries that do not rise from 0 to T, or packed sequences behind a filled cache;
            and, while a CUDA graph is captured, for what is on a device, padding, and packed sequences.
    """
    if attention_mask is not None:
        _check_mask(attention_mask, batch_shape, past_length)
    name, ids = (None, None) if boundaries else _check_ids(batch_shape, position_ids, seq_idx)
    attention_mask, ids, *ends = to_host(attention_mask, ids, *(boundaries or {}).values())
    mask = None if attention_mask is None else _real_columns(attention_mask, batch_shape)
    if boundaries:
        cu_seqlens = _same_boundaries(dict(zip(boundaries, ends, strict=True)))
        packing = _pack_boundaries(cu_seqlens, batch_shape, mask)
    else:
        packing = _pack_ids(name, ids, batch_shape, mask)
    if packing is None:
        return None if mask is None else _pack_padded(mask).to(device)
    if past_length:
        raise ValueError(
            "packed sequences (cu_seqlens, seq_idx, or position_ids that do not rise) cannot continue a filled "
            "cache; pass one sequence a row, or no cache"
        )
    return packing.to(device)


def _real_columns(attention_mask: Tensor, batch_shape: tuple[int, int]) -> Tensor | None:
    """[B, T] bool, True at real tokens, or None when all are. A single column may be padding, too: no shortcut."""
    mask = attention_mask[:, -batch_shape[1] :] != 0
    return None if mask.all() else mask


def _check_mask(attention_mask: Tensor, batch_shape: tuple[int, int], past_length: int) -> None:
    batch, length = batch_shape
    shape = attention_mask.shape
    # Compared number by number: a set or tuple of them would make torch.compile take every length for a constant.
    if len(shape) != 2 or shape[0] != batch or (shape[1] != length and shape[1] != past_length + length):
        allowed = " or ".join(str((batch, n)) for n in dict.fromkeys((length, past_length + length)))
        raise ValueError(
            f"attention_mask must have shape [batch, tokens] = {allowed} ({past_length} tokens are in the cache), "
            f"got {tuple(shape)}"
        )


def _check_ids(
    batch_shape: tuple[int, int], position_ids: Tensor | None, seq_idx: Tensor | None
) -> tuple[str, Tensor | None]:
    """The ids that say where a sequence begins, and their name."""
    name, ids = ("seq_idx", seq_idx) if seq_idx is not None else ("position_ids", position_ids)
    batch, length = batch_shape
    if ids is not None and tuple(ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(f"{name} must have shape {(batch, length)} or {(1, length)}, got {tuple(ids.shape)}")
    return name, ids


def _pack_padded(mask: Tensor) -> Packing:
    """One sequence a row."""
    return pack_lengths(mask.sum(1), mask.flatten().nonzero().squeeze(1), tuple(mask.shape), mask)


def _pack_ids(name: str, ids: Tensor | None, batch_shape: tuple[int, int], mask: Tensor | None) -> Packing | None:
    """By ids [B, T] or [1, T], see `plan_packing`; None when no row holds more than one sequence."""
    batch, length = batch_shape
    if ids is None or length == 1:
        return None
    token_index = None if mask is None else mask.flatten().nonzero().squeeze(1)
    token = torch.arange(batch * length, device=ids.device) if token_index is None else token_index
    row, ids = token.div(length, rounding_mode="floor"), ids.expand(batch, length).flatten()
    ids = ids if token_index is None else ids.index_select(0, token_index)
    breaks = ids[1:] != ids[:-1] if name == "seq_idx" else ids[1:] <= ids[:-1]
    new_row = row[1:] != row[:-1]
    if not (breaks & ~new_row).any():
        return None
    starts = torch.cat([breaks.new_ones(1), breaks | new_row]).nonzero().squeeze(1)
    return pack_lengths(starts.diff(append=starts.new_tensor([row.shape[0]])), token_index, batch_shape, mask)


def _same_boundaries(given: dict[str, Tensor]) -> Tensor:
    """The one value that they all have; ValueError if they differ."""
    (first, chosen), *others = given.items()
    for name, value in others:
        if not torch.equal(chosen, value):
            raise ValueError(f"{first} and {name} must be equal: both are the boundaries of the same sequences")
    return chosen


def _pack_boundaries(cu_seqlens: Tensor, batch_shape: tuple[int, int], mask: Tensor | None) -> Packing:
    batch, length = batch_shape
    if mask is not None:
        raise ValueError("attention_mask must be all ones, or None, when cu_seqlens is given; remove the padding")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs all sequences in one row, got a batch of {batch}; reshape to [1, tokens]")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be an integer tensor of shape [N + 1], got {tuple(cu_seqlens.shape)}")
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {length}, got {ends[:20]}")
    return pack_lengths(cu_seqlens.long().diff(), None, batch_shape)


def pack_lengths(
    lengths: Tensor, token_index: Tensor | None, batch_shape: tuple[int, int], mask: Tensor | None = None
) -> Packing:
    """Of sequences that follow each other, with the given numbers of tokens; the other arguments as in `Packing`."""
    total = batch_shape[0] * batch_shape[1] if token_index is None else token_index.shape[0]
    sequences = torch.arange(lengths.shape[0], device=lengths.device)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Packing(
        cu_seqlens=cu_seqlens,
        sequence_index=sequences.repeat_interleave(lengths, output_size=total),
        token_index=token_index,
        batch_shape=batch_shape,
        active=mask,
        boundaries=cu_seqlens,
    )
