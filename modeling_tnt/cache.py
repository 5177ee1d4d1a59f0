"""The cache of a TNT model: the states of its memories. Its size does not depend on the number of tokens read.

`TNTCacheLayer` registers itself with transformers under the layer type that `TNTConfig.layer_types` names, so that
`DynamicCache(config=config)`, and with it plain `generate()`, is made of these layers. transformers' own recurrent
layer (`LinearAttentionLayer`) holds one state tensor a slot, written in place, and no sequence length; a memory's
state is several tensors, of which some are shared at a chunk boundary, hence a layer of our own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .configuration import TNTConfig
from .kernels import MemoryState
from .kernels.memories.kinds import memory_kind, weight_shapes
from .kernels.stack import MemoryStack
from .packing import TokenStep

LAYER_TYPE = "tnt_memory"

# A state can be read on only by a model that agrees in these: they fix its shapes and what "mid-chunk" means.
_SIGNATURE_FIELDS = (
    "num_hidden_layers", "layer_types", "memory_as", "sliding_window", "num_key_value_heads", "num_heads", "head_dim",
    "memory_type", "memory_depth", "memory_expansion", "memory_bias", "global_chunk_size", "global_update",
    "local_chunk_sizes", "shard_lengths", "qk_projection", "use_momentum", "token_scale", "conv_kernel_size",
)  # fmt: skip


class TNTCacheLayer(CacheLayerMixin):
    """The state of one layer for a batch of rows: its memories and the last inputs of its convolution.

    memories   name of a memory ("global", "local0", …) → `MemoryState`, whose `position` counts each row's real tokens.
    window     keys and values of the last tokens, where the block attends within a window beside its memories, or None.
    segment    [4, rows, key-value heads, segment, head_dim], or None: of the tokens of the segment that has begun, keys
               and values of what the memory said to them, and their own (memory as a context).
    conv_tail  [rows, conv_kernel_size − 1, 3 · num_heads · head_dim], or None without a convolution.
    tokens_before  [rows] int64 or 0: what a row had read before column 0 of input_ids; None where that is not known.
    attended   [rows] int64 or int: tokens of each row that have gone through windows, of which these hold the last ones
               side by side. Zero where the model has none, or full attention, too: then windows hold columns.
    forgotten  [rows] int64 or 0: tokens of each row that the segment must not show, as `forget` was called behind them.

    A call of several tokens replaces these tensors and leaves the old ones alone. A single token (without gradients;
    not with the "reference" backend) writes them in place: the memories are then views of `stack`, whose buffers, and
    that of `conv_tail`, keep their addresses until rows are selected or moved. So a captured CUDA graph of such a call
    goes on reading and writing them; see kernels/README.md.
    """

    _layer_type = LAYER_TYPE
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack: MemoryStack | None = None
        self.window: DynamicSlidingWindowLayer | None = None
        self._tail_buffer: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call starts at the learned initial states. The buffers of `stack` are kept."""
        self.memories: dict[str, MemoryState] = {}
        self.conv_tail: Tensor | None = None
        self._forget_attention()
        self.signature: dict[str, Any] | None = None
        self.cumulative_length = 0
        self.tokens_before: Tensor | int | None = 0
        self.is_initialized = False

    def attend_within(self, sliding_window: int) -> None:
        """Keep keys and values of that window, too, from now on."""
        if self.window is None:
            self.window = DynamicSlidingWindowLayer(sliding_window=sliding_window)

    @property
    def tokens_read(self) -> Tensor:
        """[rows] int64, the real tokens behind each row's state; empty if nothing was read. After a reset of a part of
        the memories, those that the other part has read."""
        positions = [state.position for state in self.memories.values()]
        return torch.stack(positions).amax(0) if positions else torch.zeros(0, dtype=torch.int64)

    def start_prompt(self) -> None:
        """Count columns from zero: what was read stands before column 0 of the next input_ids."""
        self.cumulative_length = 0
        self.tokens_before = self.tokens_read if self.is_initialized else 0

    def forget(self, names: Sequence[str], recent: bool) -> None:
        """Reset these memories to their initial states; with `recent` also what holds the last tokens: the convolution,
        the window and the segment. A segment is a chunk of the global memory, so it goes with that, too. No memory
        left: `reset`.

        The columns that were read stay counted.
        """
        # Copies: a part of `stack` cannot be filled into all of it.
        self.memories = {name: state.clone() for name, state in self.memories.items() if name not in names}
        if recent:
            self.conv_tail = None
            self._forget_attention()
        if "global" in names:
            self.segment, self.forgotten = None, 0
        elif recent and "global" in self.memories:
            self.forgotten = self.memories["global"].position.clone()
        if not self.memories:
            columns = self.cumulative_length
            self.reset()
            self.advance(columns)
        self.tokens_before = None

    def _forget_attention(self) -> None:
        self.segment: Tensor | None = None
        self.window = None if self.window is None else empty_window(self.window)
        self.attended: Tensor | int = 0
        self.forgotten: Tensor | int = 0

    def map(self, fn: Callable[[Tensor], Tensor]) -> TNTCacheLayer:
        """A copy of this layer with `fn` applied to every state tensor."""
        mapped = self.__new__(type(self))
        mapped.__dict__.update(self.__dict__)
        mapped._map(fn)
        return mapped

    def detach(self) -> TNTCacheLayer:
        """A copy of this layer, detached from the autograd graph."""
        return self.map(Tensor.detach)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: states of their own. Views of one buffer would not be views of it afterwards, and
        in shared memory two processes would write the same one. (Without a token read, a state may be a parameter: a
        clone of it with a graph could not be copied.)"""
        return self.map(lambda t: t.detach().clone() if t.is_leaf else t.clone()).__dict__

    def store(self, memories: dict[str, MemoryState], conv_tail: Tensor | None, signature: dict[str, Any]) -> None:
        """Replace the state; see the class for the arguments."""
        self.memories, self.conv_tail, self.signature, self.is_initialized = memories, conv_tail, signature, True

    def is_stacked(self, names: Collection[str]) -> bool:
        """Whether the memories of these names are those in `stack`."""
        if self.stack is None or len(self.stack.states) != len(names):
            return False
        return all(self.memories.get(n) is s for n, s in zip(names, self.stack.states, strict=True))

    def stack_memories(
        self,
        names: Sequence[str],
        initial: Callable[[], dict[str, MemoryState]],
        tail: Tensor | None,
        signature: dict[str, Any],
    ) -> None:
        """Move the memories, or `initial()` ones, into `stack`: into its buffers if they fit, or else into new ones.

        Likewise `conv_tail` (zeros before the first token) into a buffer that is made like `tail`.

        Raises:
            RuntimeError: while a CUDA graph is captured, whose replays would all start from the states of now.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("read one token without a CUDA graph before capturing one: it makes the cache's buffers")
        # A part of the memories may have been forgotten alone.
        known = self.memories if all(name in self.memories for name in names) else initial() | self.memories
        states = [known[name] for name in names]
        if self.stack is not None and self.stack.fits(states):
            self.stack.fill(states)
        else:
            self.stack = MemoryStack(states)
        if tail is not None:
            buffer = self._tail_buffer
            if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != (tail.shape, tail.dtype, tail.device):
                with torch.inference_mode(False):  # what is made in inference mode could be written only there
                    buffer = self._tail_buffer = torch.empty(tail.shape, dtype=tail.dtype, device=tail.device)
            tail = buffer.zero_() if self.conv_tail is None else buffer.copy_(self.conv_tail)
        self.store(dict(zip(names, self.stack.states, strict=True)), tail, signature)

    def advance_tail(self, tail: Tensor | None, step: TokenStep) -> None:
        """Update the convolution's last inputs in place, in rows that have a token."""
        if tail is not None:
            self.conv_tail.copy_(step.keep(tail, self.conv_tail))

    def advance(self, columns: int) -> None:
        """Count columns of the batch that have been read, padding included (transformers slices its inputs by this)."""
        self.cumulative_length += columns

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first call."""
        return next(iter(self.memories.values())).position.shape[0] if self.is_initialized else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors."""
        others = sum(t.nbytes for t in (self.conv_tail, self.segment) if t is not None)
        others += 0 if self.window is None else attention_bytes(self.window)
        return others + sum(state.nbytes for state in self.memories.values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in that order; repeats are allowed."""
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        if self.is_initialized:
            self.device = next(iter(self.memories.values())).position.device
            self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless that removes nothing: a memory cannot unlearn a token.

        As in transformers, a negative number is that of tokens to remove, and a positive one the length to keep.
        """
        if tokens_to_remove == 0 or 0 < self.cumulative_length <= tokens_to_remove or not self.is_initialized:
            return
        raise ValueError(
            f"a TNT cache cannot be cropped, got {tokens_to_remove} behind {self.cumulative_length} tokens: memories "
            "keep no tokens. Copy it (copy.deepcopy, save_cache) before reading on, or reset() it and read the shorter "
            "prompt again"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a TNT cache layer holds memory states, not keys and values; use store()")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a TNT cache layer holds memory states, not keys and values; use store()")

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.stack = self._tail_buffer = None
        self.memories = {name: state.map(fn) for name, state in self.memories.items()}
        self.conv_tail = None if self.conv_tail is None else fn(self.conv_tail)
        self.window = None if self.window is None else map_layer(self.window, fn)
        # Rows come first wherever a function selects them.
        self.segment = None if self.segment is None else fn(self.segment.transpose(0, 1)).transpose(0, 1)
        for name in ("tokens_before", "attended", "forgotten"):
            if isinstance(getattr(self, name), Tensor):
                setattr(self, name, fn(getattr(self, name)))


# Of constant size anyhow, so that `cache_implementation="static"` needs nothing else. (Dynamic: by `_layer_type`.)
STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = TNTCacheLayer


def fast_weight_shapes(config: TNTConfig) -> dict[str, tuple[int, ...]]:
    """Of a memory's fast weights, by name and without rows: w1 [H, D, M], b1 [H, M], …"""
    return weight_shapes(
        config.memory_type, config.memory_depth, config.num_heads, config.head_dim,
        config.head_dim * config.memory_expansion, config.memory_bias,
    )  # fmt: skip


def cache_signature(config: TNTConfig) -> dict[str, Any]:
    """The fields of a config that a cache depends on."""
    return {name: getattr(config, name) for name in _SIGNATURE_FIELDS}


def is_memory_layer(layer: Any) -> bool:
    """Whether a layer of a cache holds memories. By name and not isinstance: a model loaded as remote code brings a
    class of its own, which replaces the registration of the installed one."""
    return getattr(layer, "_layer_type", None) == LAYER_TYPE


def memory_cache_layers(cache: Cache) -> list[TNTCacheLayer]:
    """Those layers of a cache that hold memories."""
    return [layer for layer in cache.layers if is_memory_layer(layer)]


def map_layer(layer: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a layer of a cache, of memories or of attention, with `fn` applied to every state tensor."""
    if is_memory_layer(layer):
        return layer.map(fn)
    mapped = copy.copy(layer)
    if layer.is_initialized:
        mapped.keys, mapped.values = fn(layer.keys), fn(layer.values)
    return mapped


def is_constant_size(config: TNTConfig) -> bool:
    """Whether the cache of a model of `config` stops growing: it has memories, and attention within windows at most."""
    return LAYER_TYPE in config.layer_types and "full_attention" not in config.layer_types


def attention_bytes(layer: DynamicLayer) -> int:
    """Bytes of the keys and values of a layer of transformers."""
    return layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0


def empty_window(layer: DynamicSlidingWindowLayer, columns: int = 0) -> DynamicSlidingWindowLayer:
    """A window of the same length that holds nothing, behind so many columns."""
    empty = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    empty.cumulative_length = columns
    return empty


def window_layers(cache: Cache) -> list[DynamicSlidingWindowLayer]:
    """The layers of keys and values in the cache of a model of constant size: beside memories, and alone."""
    layers = [layer.window if is_memory_layer(layer) else layer for layer in cache.layers]
    return [layer for layer in layers if layer is not None]


def check_cache(cache: Cache, config: TNTConfig, rows: int) -> None:
    """Raise ValueError unless a model of `config` can read on from `cache` with a batch of `rows`."""
    wanted = [kind == LAYER_TYPE for kind in config.layer_types]
    layers = cache.layers if isinstance(cache, Cache) else []
    found = [is_memory_layer(layer) for layer in layers]
    if any(here and getattr(x, "keys", None) is not None for here, x in zip(wanted, layers, strict=False)):
        raise ValueError(
            "cache (past_key_values) holds keys and values of attention, as prefix tuning makes them: a TNT model has "
            "none that could stand before its memories; use prompt tuning or LoRA, or a cache of a TNT model"
        )
    if found != wanted:
        kinds = f"{sum(wanted)} TNT cache layers" + (" among those of attention" if not all(wanted) else "")
        raise ValueError(
            f"cache (past_key_values) must hold {kinds}, got {cache!r:.200}; make it with "
            "DynamicCache(config=model.config)"
        )
    memories = memory_cache_layers(cache)
    # Compared number by number: a set of them would make torch.compile take every length for a constant.
    for layer in (layer for layer in layers if memories and isinstance(layer, DynamicLayer)):
        if layer.get_seq_length() != memories[0].cumulative_length:
            raise ValueError(
                f"cache (past_key_values) has read {layer.get_seq_length()} tokens in a layer of attention and "
                f"{memories[0].cumulative_length} in one of memories, as a call that was interrupted leaves them, or a "
                "crop, which memories refuse; start with an empty cache"
            )
    signature = cache_signature(config)
    for layer in memories:
        if not layer.is_initialized:
            continue
        check_signature("cache (past_key_values)", layer.signature, signature)
        if layer.batch_size != rows:
            raise ValueError(
                f"cache (past_key_values) holds {layer.batch_size} rows but the batch has {rows}; give as many, or "
                "repeat those of the cache (`repeat(n)` of a TNTState, `batch_repeat_interleave(n)` of any cache)"
            )


def check_mask(cache: Cache, attention_mask: Tensor | None, columns: int) -> None:
    """Raise ValueError if a mask over all columns shows more or fewer tokens of the past than the cache has read."""
    layer = next(iter(memory_cache_layers(cache)), None)
    if layer is None:
        return
    past = layer.cumulative_length
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] != past + columns or not past:
        return
    # A step of one token must not wait for a device.
    waits = columns == 1 and attention_mask.device.type != "cpu"
    if waits or torch.compiler.is_compiling() or layer.tokens_before is None or not layer.is_initialized:
        return
    shown = (attention_mask[:, :past] != 0).sum(1).cpu()
    read = (layer.tokens_read - layer.tokens_before).cpu()
    if not torch.equal(shown, read):
        row = int((shown != read).nonzero()[0, 0])
        raise ValueError(
            f"attention_mask shows {int(shown[row])} tokens among the {past} columns that the cache has read of row "
            f"{row}, and its memories have learned {int(read[row])}: what a memory has read cannot be hidden, nor what "
            "it has not be shown. Pass the mask that those columns were read with (generate hides what it fills a row "
            "with behind its eos_token_id), or all tokens without a cache"
        )


def _unsaid(filled: dict[str, Any]) -> dict[str, Any]:
    """What a state of a version in which there was no choice does not say of itself."""
    memory_type = filled.get("memory_type")
    depth = memory_kind(memory_type).depth if memory_type in ("mlp", "linear") else None
    layers = filled.get("num_hidden_layers")
    alone = {
        "layer_types": [LAYER_TYPE] * layers if isinstance(layers, int) else None,
        "num_key_value_heads": filled.get("num_heads"),
    }
    return {"memory_depth": depth, "global_update": "gradient"} | alone


def check_signature(what: str, filled: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ValueError, about the cache or file called `what`, unless the two signatures agree."""
    if filled == wanted:  # as at every token of a layer
        return
    filled = _unsaid(filled) | filled
    names = [name for name in wanted if filled.get(name) != wanted[name]]
    differences = [f"{name}={filled.get(name)!r} (now {wanted[name]!r})" for name in names]
    if differences:
        raise ValueError(
            f"{what} was filled by a model with {', '.join(differences)}; use that configuration, or start "
            "with an empty cache"
        )
