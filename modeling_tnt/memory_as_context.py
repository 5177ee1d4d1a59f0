"""Titans' memory as a context (MAC, arXiv 2501.00663, section 4.1), segment by segment.

    h_t = M_before(q_t)                 what the memory, as it was before the segment, says to each of its tokens
    y = Attention([p ‖ h ‖ x])          causal, within the segment: token t sees p, h_s and x_s with s ≤ t
    o = y ⊗ M(y)                        the memory reads y, and learns from it

A segment is a chunk of the global memory, whose weights at its start are M_before. M(y) is the whole memory layer,
local memories included. Where the paper leaves room: h passes the layer's output norm and projection and stands at the
position of its token; ⊗ is a norm of each side with learned weights and a sigmoid of the memory's; a projection
follows, as behind any mixer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import TNTAttention
from .cache import TNTCacheLayer
from .kernels import MemoryState, initial_memory_state
from .kernels.api import read
from .kernels.checks import MemoryProblem
from .memory_layer import MemoryInputs, TNTMemoryLayer, l2_normalize
from .packing import Packing, TokenStep, pack_lengths


class Piece(NamedTuple):
    """The tokens of a call that lie in one segment of their sequence: n of them at most.

    index    [sequences, n] int64, places in the flattened batch; anything at padding.
    slots    [sequences, n] int64, places in the segment; behind its end at padding.
    packing  which of them are tokens; None: all.
    is_whole whether every sequence has its whole segment here.
    """

    index: Tensor
    slots: Tensor
    packing: Packing | None
    is_whole: bool


class MemoryAsContext(nn.Module):
    """What joins the memories and the attention of a block. Both are handed in: they belong to the block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.memory_norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(
        self,
        x: Tensor,
        memory: TNTMemoryLayer,
        attention: TNTAttention,
        rotary: nn.Module,
        packing: Packing | None,
        cache_layer: TNTCacheLayer | None,
        update_cache: bool,
        step: TokenStep | None,
    ) -> Tensor:
        """[B, T, hidden_size] → the same shape; arguments as of `TNTMemoryLayer.forward`."""
        if packing is not None and packing.total == 0:
            return torch.zeros_like(x)
        if cache_layer is None:
            cache_layer = TNTCacheLayer()
        elif not update_cache:
            cache_layer = cache_layer.map(lambda t: t)
        segment = memory.config.global_chunk_size
        if step is not None:
            slots = _positions(cache_layer, x.shape[0], x.device) % segment
            return self._read(x, slots[:, None], False, memory, attention, rotary, cache_layer, None, step)
        pieces = _plan_pieces(x, packing, cache_layer, segment)
        flat, outputs = x.flatten(0, 1), []
        for piece in pieces:
            tokens = flat[piece.index]
            outputs.append(
                self._read(
                    tokens, piece.slots, piece.is_whole, memory, attention, rotary, cache_layer, piece.packing, None
                )
            )
        o = torch.zeros_like(flat, dtype=outputs[0].dtype)
        for piece, out in zip(pieces, outputs, strict=True):
            index, values = piece.index.flatten(), out.flatten(0, 1)
            if piece.packing is not None:
                kept = piece.packing.token_index
                index, values = index[kept], values[kept]
            o = o.index_copy(0, index, values)
        return o.unflatten(0, x.shape[:2])

    def _read(
        self,
        x: Tensor,
        slots: Tensor,
        is_whole: bool,
        memory: TNTMemoryLayer,
        attention: TNTAttention,
        rotary: nn.Module,
        cache_layer: TNTCacheLayer,
        packing: Packing | None,
        step: TokenStep | None,
    ) -> Tensor:
        """One piece, x [sequences, n, hidden_size]."""
        h = self._recall(x, memory, cache_layer, "auto" if step is not None else memory.config.kernel_backend)
        turns = rotary(x, position_ids=slots)
        q, *keys_and_values = attention.project(x, turns)
        _, *recalled = attention.project(h, turns)
        held = torch.stack([*recalled, *keys_and_values])  # [4, sequences, heads, n, D]
        seen = slots
        if not is_whole:
            held = self._keep(held, slots, memory.config.global_chunk_size, cache_layer, in_place=step is not None)
            seen = torch.arange(held.shape[3], device=x.device).expand(x.shape[0], -1)
        shown = (seen.unsqueeze(1) <= slots.unsqueeze(2)).unsqueeze(1)
        if isinstance(cache_layer.forgotten, Tensor):
            start = _positions(cache_layer, x.shape[0], x.device) - slots[:, 0]
            shown = shown & (seen >= (cache_layer.forgotten - start).unsqueeze(1))[:, None, None]
        keys, values = (torch.cat([held[i], held[i + 2]], dim=2) for i in range(2))
        y = attention.attend(q, keys, values, torch.cat([shown, shown], dim=-1))
        m = memory(y, packing, cache_layer, True, step)
        cache_layer.segment = None if is_whole else held
        return self.o_proj(self.attention_norm(y) * torch.sigmoid(self.memory_norm(m)))

    def _recall(self, x: Tensor, memory: TNTMemoryLayer, cache_layer: TNTCacheLayer, backend: str) -> Tensor:
        """h, shaped like x: the global memory, as it was before the segment, read at the tokens' own queries. (A
        backend that is named may know the step of a token and not this operation.)"""
        q = l2_normalize(F.silu(memory.q_proj(x)).unflatten(-1, memory.head_shape))
        options = next(options for name, _, options in memory.operations() if name == "global")
        options = options._replace(chunk_size=x.shape[1])

        def use(inputs: MemoryInputs) -> Tensor:
            state = _state_before(inputs, cache_layer.memories.get("global"), x.shape[0], q.dtype)
            problem = MemoryProblem(q, q, q, inputs.gates(), inputs.params, options, None, None, state)
            return read(problem, False, backend)[0]

        h = memory.global_memory(x, options.chunk_size, use)
        return memory.o_proj(memory.norm(h.to(memory.norm.weight.dtype)).flatten(-2))

    def _keep(self, new: Tensor, slots: Tensor, segment: int, cache_layer: TNTCacheLayer, in_place: bool) -> Tensor:
        """[4, sequences, heads, segment, D]: what of the segment was held before, and `new` at its slots."""
        held = cache_layer.segment
        if held is None or held.shape[3] != segment:
            held = new.new_zeros(*new.shape[:3], segment, new.shape[4])
        index = slots[None, :, None, :, None].expand_as(new)
        if in_place:  # one token; at padding the place of the next one, which will overwrite it
            return held.scatter_(3, index, new)
        return F.pad(held, (0, 0, 0, 1)).scatter(3, index, new)[:, :, :, :segment]  # with a place for padding


def _state_before(inputs: MemoryInputs, state: MemoryState | None, rows: int, dtype: torch.dtype) -> MemoryState:
    """The global memory at the start of a segment, where nothing of it has been learned."""
    if state is None:
        state = initial_memory_state(
            inputs.params, rows, with_momentum=inputs.gate_logits.momentum is not None, with_projection=False,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )  # fmt: skip
    return state._replace(weights=state.anchor, position=torch.zeros(rows, dtype=torch.int64))


def _positions(cache_layer: TNTCacheLayer, rows: int, device: torch.device) -> Tensor:
    """[rows] int64, tokens that were read before."""
    state = cache_layer.memories.get("global")
    return torch.zeros(rows, dtype=torch.int64, device=device) if state is None else state.position


def _plan_pieces(x: Tensor, packing: Packing | None, cache_layer: TNTCacheLayer, segment: int) -> list[Piece]:
    """Cut the tokens of each sequence where its segments end."""
    batch, length = x.shape[:2]
    if packing is None:
        lengths = torch.full((batch,), length)
        token_index = torch.arange(batch * length)
    else:
        lengths = packing.boundaries.diff()
        index = packing.token_index
        token_index = torch.arange(batch * length) if index is None else index.cpu()
    begins = lengths.cumsum(0) - lengths
    offsets = _positions(cache_layer, len(lengths), x.device).cpu() % segment
    pieces = []
    for s in range(int(((offsets + lengths + segment - 1) // segment).max())):
        low = (s * segment - offsets).clamp(min=0)
        counts = (torch.minimum(lengths, (s + 1) * segment - offsets) - low).clamp(min=0)
        n = int(counts.max())
        if n == 0:
            continue
        place = torch.arange(n)
        mask = place < counts[:, None]
        flat = torch.where(mask, begins[:, None] + low[:, None] + place, 0)
        slots = torch.where(mask, (offsets + low)[:, None] % segment + place, segment)
        part = None
        if not mask.all():
            part = pack_lengths(counts, mask.flatten().nonzero().squeeze(1), tuple(mask.shape), mask).to(x.device)
        pieces.append(Piece(token_index[flat].to(x.device), slots.to(x.device), part, part is None and n == segment))
    return pieces
