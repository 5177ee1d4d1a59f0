"""Attention in blocks of its own, and beside the memories of a block: transformers' own, with its masks and caches.

A layer is that of transformers' Llama, to which learned tokens (Titans, arXiv 2501.00663, section 3.3) can be added
whose keys and values stand before all others. `plan_attention` makes positions and masks once for all layers of a call.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .cache import is_constant_size, is_memory_layer, map_layer, memory_cache_layers, window_layers
from .compat import named_cache
from .configuration import TNTConfig
from .packing import Packing, TokenStep

FULL, SLIDING = "full_attention", "sliding_attention"


class WindowPlan(NamedTuple):
    """Of a model of constant size: each row's tokens side by side, so that windows are of tokens, not of columns.

    The windows of a cache hold the last tokens of each row at their ends, and those of a call follow, its padding last.

    order     [B, T] int64, the columns of a call with those of tokens first; None: there is no padding among them.
    back      [B, T] int64, the inverse of `order`.
    held      [B, n] int64, which of the columns that were held and those of the call are held from then on; None: the
              last ones.
    attended  [B] int64 or int, tokens of each row up to the end of the call.
    """

    order: Tensor | None
    back: Tensor | None
    held: Tensor | None
    attended: Tensor | int

    def align(self, x: Tensor) -> Tensor:
        """[B, T, ...] with the tokens first."""
        return x if self.order is None else _take(x, self.order, 1)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `align`."""
        return x if self.back is None else _take(x, self.back, 1)

    def hold(self, layer: DynamicLayer, keys: Tensor, values: Tensor) -> None:
        """Let the layer, which has held and given out `keys` and `values`, hold the last tokens of each row."""
        if self.held is not None:
            layer.keys, layer.values = _take(keys, self.held, 2), _take(values, self.held, 2)


class AttentionPlan(NamedTuple):
    """What all attention layers of a call share.

    cache      that of the model, or None.
    positions  [B, T] or [1, T] int64, of each token in its sequence (with `windows`, in their order).
    rotary     cosines and sines of these, [B, T, head_dim] each.
    masks      by layer type, in the form that the attention's implementation takes.
    turn       the module that makes cosines and sines of other positions.
    windows    where windows are of tokens; None: they are of columns, as in transformers.
    """

    cache: Cache | None
    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    masks: dict[str, Any]
    turn: nn.Module
    windows: WindowPlan | None = None


class TNTAttention(LlamaAttention):
    """Attention to all earlier tokens ("full_attention") or to those within a window ("sliding_attention")."""

    def __init__(self, config: TNTConfig, layer_idx: int, projects_out: bool = True) -> None:
        """`projects_out`: whether it ends with a projection to hidden_size, or with the heads side by side."""
        super().__init__(config, layer_idx)
        self.window = None if config.layer_types[layer_idx] == FULL else config.sliding_window
        if not projects_out:
            self.o_proj = None  # no module, which adapters would look for weights in
        persistent = config.num_persistent_tokens
        self.persistent = nn.Embedding(persistent, config.hidden_size) if persistent else None

    def forward(self, x: Tensor, plan: AttentionPlan) -> Tensor:
        """[B, T, hidden_size] → the same shape, or [B, T, H D]. The plan's cache is written."""
        windows = plan.windows
        q, k, v = self.project(x if windows is None else windows.align(x), plan.rotary)
        if plan.cache is not None:
            layer = plan.cache.layers[self.layer_idx]
            layer = layer.window if is_memory_layer(layer) else layer
            k, v = layer.update(k, v)
            if windows is not None:
                windows.hold(layer, k, v)
        mask = plan.masks[FULL if self.window is None else SLIDING]
        o = self._attend(q, k, v, mask, sliding_window=self.window, position_ids=plan.positions)
        return o if windows is None else windows.restore(o)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden_size] → q [B, H, T, D] and k, v [B, key-value heads, T, D], q and k turned.

        With persistent tokens q is [B, H, T, 2 D]: the turned one, and the same as it is, which is for them.
        """
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        turned, k = apply_rotary_pos_emb(q, k, *rotary)
        return turned if self.persistent is None else torch.cat([turned, q], dim=-1), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> Tensor:
        """[B, T, hidden_size] of queries to those keys that a bool [B, 1, T, keys] shows, and the persistent tokens."""
        shown = _show_persistent(shown, 0 if self.persistent is None else len(self.persistent.weight))
        if self.config._attn_implementation == "eager":
            shown = torch.zeros_like(shown, dtype=q.dtype).masked_fill(~shown, torch.finfo(q.dtype).min)
        return self._attend(q, k, v, shown)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Tensor:
        rows, _, length, _ = q.shape
        if self.persistent is not None:
            # A score is q · k: tokens see the turned half of a query, persistent tokens, which are nowhere, the other.
            nowhere, turned = (self.head_dim, 0), (0, self.head_dim)
            k = torch.cat([F.pad(self._persist(self.k_proj, rows), nowhere), F.pad(k, turned)], dim=2)
            v = torch.cat([self._persist(self.v_proj, rows), v], dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        o = o.reshape(rows, length, -1)
        return o if self.o_proj is None else self.o_proj(o)

    def _persist(self, project: nn.Module, rows: int) -> Tensor:
        """Keys or values of the persistent tokens, [rows, heads, tokens, head_dim]."""
        tokens = self.persistent.weight
        return project(tokens).view(1, len(tokens), -1, self.head_dim).transpose(1, 2).expand(rows, -1, -1, -1)


class TNTRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, which asks a config also for a longest context: none of the allowed kinds depends on it."""

    def __init__(self, config: TNTConfig) -> None:
        super().__init__(
            LlamaConfig(
                hidden_size=config.hidden_size, num_attention_heads=config.num_attention_heads,
                head_dim=config.head_dim, rope_parameters=dict(config.rope_parameters),
            )
        )  # fmt: skip

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, head_dim] like x of positions [B, T], at any of them: a window is read on behind
        millions of tokens, where angles in float32 are off by a radian, and positions are no longer told apart."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64
        angles = position_ids[..., None].to(wide) * self.inv_freq.to(x.device, wide)
        angles = torch.cat([angles, angles], dim=-1)
        return tuple((turn * self.attention_scaling).to(x.dtype) for turn in (angles.cos(), angles.sin()))


def reading_copy(cache: Cache) -> Cache:
    """The same states in layers of their own: attention writes into its cache also where nobody wants it to."""
    read = DynamicCache()
    read.layers = [map_layer(layer, lambda t: t) for layer in cache.layers]
    return read


def plan_attention(
    config: TNTConfig,
    rotary: nn.Module,
    embeds: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    packing: Packing | None,
    cache: Cache | None,
    step: TokenStep | None = None,
) -> AttentionPlan:
    """Masks and positions of a call on embeds [B, T, hidden_size]; the other arguments as `TNTModel.forward` has them.

    A model of constant size counts its positions itself, as its memories do: padding and gaps in position_ids are none.

    Raises:
        ValueError: a mask of new tokens alone behind a cache; packed sequences that are padded, or in several rows,
            or persistent tokens, with an implementation that takes no mask.
    """
    batch, length, _ = embeds.shape
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and past and attention_mask.shape[1] == length:
        raise ValueError(
            f"attention_mask has {length} columns and {past} tokens are in the cache, whose keys the attention layers "
            f"see, too: pass the mask of all {past + length} columns"
        )
    together = packing is not None and packing.rows != batch
    if not together and _counts_tokens(config, cache):
        _check_implementation(config, 1, padded=False)
        return _plan_windows(config, rotary, embeds, (step or packing), cache)
    given: dict[str, Any] = {"config": config, "inputs_embeds": embeds}
    if together:
        positions, sequences = _packed_positions(packing)
        if packing.active is None:  # transformers tells packed sequences by their positions
            attention_mask = None
        else:
            given["and_mask_function"] = _in_one_sequence(sequences)
    elif position_ids is not None:
        positions = position_ids
    elif attention_mask is not None:
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    else:
        positions = torch.arange(past, past + length, device=embeds.device).unsqueeze(0)
    _check_implementation(config, batch if together else 1, padded="and_mask_function" in given)
    positions = positions.to(embeds.device)
    given |= {"attention_mask": attention_mask, "position_ids": positions}
    if config.num_persistent_tokens:
        given["allow_is_causal_skip"] = False
    masks = {}
    for kind in (kind for kind in config.attention_types if kind in (FULL, SLIDING)):
        make = create_causal_mask if kind == FULL else create_sliding_window_causal_mask
        mask = make(**given, **named_cache(_layers_of(kind, config, cache)))
        masks[kind] = _show_persistent(mask, config.num_persistent_tokens)
    return AttentionPlan(cache, positions, rotary(embeds, position_ids=positions), masks, rotary)


def _layers_of(kind: str, config: TNTConfig, cache: Cache | None) -> Cache | None:
    """A cache with the layers that a mask of this kind is for: transformers asks the first one for its size."""
    if cache is None:
        return None
    chosen = copy.copy(cache)
    chosen.layers = [layer for layer, its in zip(cache.layers, config.layer_types, strict=True) if its == kind]
    if kind == SLIDING:
        chosen.layers += [layer.window for layer in memory_cache_layers(cache) if layer.window is not None]
    return chosen


def _counts_tokens(config: TNTConfig, cache: Cache | None) -> bool:
    """Whether all attention of a call is within windows of tokens. (Those of a static cache are of columns.)"""
    if not is_constant_size(config) or SLIDING not in config.attention_types:
        return False
    return cache is None or all(isinstance(layer, DynamicSlidingWindowLayer) for layer in window_layers(cache))


def _plan_windows(
    config: TNTConfig, rotary: nn.Module, embeds: Tensor, tokens: Packing | TokenStep | None, cache: Cache | None
) -> AttentionPlan:
    batch, length, _ = embeds.shape
    layers = [] if cache is None else [layer for layer in window_layers(cache) if layer.is_initialized]
    held = layers[0].keys.shape[2] if layers else 0
    attended = 0 if cache is None else memory_cache_layers(cache)[0].attended
    active = None if tokens is None or tokens.active is None else tokens.active.view(batch, length)
    columns = torch.arange(length, device=embeds.device)
    if active is None and isinstance(attended, int) and attended >= held:  # all that is held is of tokens
        shown, positions, windows = None, attended + columns[None], WindowPlan(None, None, None, attended + length)
    else:
        before = torch.as_tensor(attended, device=embeds.device).expand(batch)
        new = torch.as_tensor(length, device=embeds.device).expand(batch) if active is None else active.sum(1)
        positions, windows = before[:, None] + columns, _align_tokens(active, held, config.sliding_window, before + new)
        place = torch.arange(held + length, device=embeds.device)
        shown = (place >= held - before[:, None]) & (place < held + new[:, None])
    mask = create_sliding_window_causal_mask(
        config, embeds, shown, position_ids=positions, allow_is_causal_skip=not config.num_persistent_tokens,
        **named_cache(_window_of(held, config.sliding_window)),
    )  # fmt: skip
    masks = {SLIDING: _show_persistent(mask, config.num_persistent_tokens)}
    return AttentionPlan(cache, positions, rotary(embeds, position_ids=positions), masks, rotary, windows)


def _align_tokens(active: Tensor | None, held: int, window: int, attended: Tensor) -> WindowPlan:
    """`active` [B, T] bool, the tokens among the columns of a call behind `held` ones; None: all are."""
    if active is None:
        return WindowPlan(None, None, None, attended)
    order = (~active).long().argsort(dim=1, stable=True)
    holds = min(held + active.shape[1], window - 1)
    last = held + active.sum(1, keepdim=True) - holds + torch.arange(holds, device=active.device)
    return WindowPlan(order, order.argsort(dim=1), last.clamp(min=0), attended)


def _window_of(held: int, window: int) -> Cache:
    """A cache that says of itself that it holds so many columns of a window: what a mask is made for."""
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=window)]
    cache.layers[0].cumulative_length = held
    return cache


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Of each row of x [B, ..., n, ...] other places along `dim`: index [B, m]."""
    shape = [len(x)] + [1] * (x.dim() - 1)
    shape[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def _check_implementation(config: TNTConfig, packed_rows: int, padded: bool) -> None:
    name = config._attn_implementation or "eager"
    if config.memory_as == "context" and name not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation={name!r} takes no mask of a segment and what the memory says to it; use "
            "attn_implementation='sdpa' with memory_as='context'"
        )
    if config.num_persistent_tokens and name not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation={name!r} cannot show num_persistent_tokens={config.num_persistent_tokens} beside a "
            "window or mask; use attn_implementation='sdpa'"
        )
    if "flash" in name and (packed_rows > 1 or padded):
        raise ValueError(
            f"attn_implementation={name!r} keeps packed sequences apart in a single row without padding only, got "
            f"{packed_rows} rows; pack into one row, or use attn_implementation='sdpa'"
        )


def _show_persistent(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A mask [B, 1, T, keys] with columns in front that every query sees."""
    if not tokens:
        return mask
    return F.pad(mask, (tokens, 0), value=True if mask.dtype == torch.bool else 0.0)


def _packed_positions(packing: Packing) -> tuple[Tensor, Tensor]:
    """[B, T] each: the position of each token in its sequence, and the sequence's index; at padding 0 and −1."""
    index = torch.arange(packing.total, device=packing.sequence_index.device)
    positions = index - packing.cu_seqlens[:-1][packing.sequence_index]
    return packing.scatter(positions[None]), packing.scatter(packing.sequence_index[None] + 1) - 1


def _in_one_sequence(sequences: Tensor) -> Any:
    """A mask function of transformers: queries and keys of the same sequence."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sequences[batch, query] == sequences[batch, key]

    return mask
