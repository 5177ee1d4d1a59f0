"""The cache: what the memories of a model know, of a size that does not depend on how much they have read.

`TNTCacheLayer` registers itself with transformers under the layer type that `TNTConfig.layer_types` names, so that
`DynamicCache(config=config)`, and with it plain `generate()`, is made of these layers. transformers' own recurrent
layer (`LinearAttentionLayer`) holds one state tensor a slot, written in place, and no sequence length; a memory's
state is several tensors, of which some are shared at a chunk boundary, hence a layer of our own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .configuration import TNTConfig
from .kernels import MemoryState
from .kernels.stack import MemoryStack
from .packing import TokenStep

_LAYER_TYPE = "tnt_memory"
_FILE_FORMAT = "tnt-cache-1"

# A state can be read on only by a model that agrees in these: they fix its shapes and what "mid-chunk" means.
_SIGNATURE_FIELDS = (
    "num_hidden_layers", "num_heads", "head_dim", "memory_type", "memory_expansion", "memory_bias", "global_chunk_size",
    "local_chunk_sizes", "shard_lengths", "qk_projection", "use_momentum", "token_scale", "conv_kernel_size",
)  # fmt: skip


class TNTCacheLayer(CacheLayerMixin):
    """The state of one layer for a batch of rows: its memories and the last inputs of its convolution.

    memories   name of a memory ("global", "local0", …) → `MemoryState`, whose `position` counts each row's real tokens.
    conv_tail  [rows, conv_kernel_size − 1, 3 · num_heads · head_dim], or None without a convolution.

    A call of several tokens replaces these tensors and leaves the old ones alone. Where a single token is read by one
    launch (the "triton" backend, without gradients) they are written in place: the memories are then views of `stack`,
    whose buffers, and that of `conv_tail`, keep their addresses until rows are selected or moved. So a captured CUDA
    graph of such a call goes on reading and writing them; see `TNTModel.forward`.
    """

    _layer_type = _LAYER_TYPE
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stack: MemoryStack | None = None
        self._tail_buffer: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call starts at the learned initial states. The buffers of `stack` are kept."""
        self.memories: dict[str, MemoryState] = {}
        self.conv_tail: Tensor | None = None
        self.signature: dict[str, Any] | None = None
        self.cumulative_length = 0
        self.is_initialized = False

    def store(self, memories: dict[str, MemoryState], conv_tail: Tensor | None, signature: dict[str, Any]) -> None:
        """Replace the state; see the class for the arguments."""
        self.memories, self.conv_tail, self.signature, self.is_initialized = memories, conv_tail, signature, True

    def is_stacked(self, names: Sequence[str]) -> bool:
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
        known = self.memories or initial()
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
        """Take over the convolution's inputs of rows that have a token, in place."""
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
        tail = 0 if self.conv_tail is None else self.conv_tail.numel() * self.conv_tail.element_size()
        return tail + sum(state.nbytes for state in self.memories.values())

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
        """Always raises: what a memory has learned from a token cannot be taken out of it again."""
        raise ValueError(
            "a TNT cache cannot be cropped: its memories keep no tokens. Copy it (copy.deepcopy, save_cache) before "
            "reading on, or reset() it and read the shorter prompt again"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a TNT cache layer holds memory states, not keys and values; use store()")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a TNT cache layer holds memory states, not keys and values; use store()")

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.stack = self._tail_buffer = None
        self.memories = {name: state.map(fn) for name, state in self.memories.items()}
        self.conv_tail = None if self.conv_tail is None else fn(self.conv_tail)


# Of constant size anyhow, so that `cache_implementation="static"` needs nothing else. (Dynamic: by `_layer_type`.)
STATIC_LAYER_TYPE_MAPPING[_LAYER_TYPE] = TNTCacheLayer


def cache_signature(config: TNTConfig) -> dict[str, Any]:
    """The fields of a config that a cache depends on."""
    return {name: getattr(config, name) for name in _SIGNATURE_FIELDS}


def check_cache(cache: Cache, config: TNTConfig, rows: int) -> None:
    """Raise ValueError unless a model of `config` can read on from `cache` with a batch of `rows`."""
    # By name and not isinstance: a model loaded as remote code brings a class of its own, which replaces the
    # registration of the installed one.
    if not isinstance(cache, Cache) or [getattr(layer, "_layer_type", None) for layer in cache.layers] != (
        [_LAYER_TYPE] * config.num_hidden_layers
    ):
        raise ValueError(
            f"past_key_values must hold {config.num_hidden_layers} TNT cache layers, got {cache!r:.200}; make it with "
            "DynamicCache(config=model.config)"
        )
    signature = cache_signature(config)
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        _check_signature(layer.signature, signature)
        if layer.batch_size != rows:
            raise ValueError(f"past_key_values holds {layer.batch_size} rows but the batch has {rows}")


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Write the memories of `cache` (the `past_key_values` of a TNT model) to a safetensors file.

    The file appears under its name only when it is complete; an existing one survives a failed write.

    Raises:
        ValueError: if the cache is not a TNT model's or has not read anything yet.
        OSError: if the file cannot be written.
    """
    layers = cache.layers
    if not layers or not all(getattr(c, "_layer_type", None) == _LAYER_TYPE and c.is_initialized for c in layers):
        raise ValueError("save_cache needs the filled past_key_values of a TNT model; call it with use_cache=True")
    tensors = {}
    for i, layer in enumerate(layers):
        flat = {f"{m}.{name}": t for m, state in layer.memories.items() for name, t in state.tensors().items()}
        flat |= {} if layer.conv_tail is None else {"conv_tail": layer.conv_tail}
        # Cloned, as the file format does not allow two names for the same memory.
        tensors |= {f"layers.{i}.{name}": t.detach().contiguous().clone() for name, t in flat.items()}
    metadata = {
        "format": _FILE_FORMAT,
        "signature": json.dumps(layers[0].signature),
        "cumulative_length": str(layers[0].cumulative_length),
    }
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_cache(path: str | os.PathLike, config: TNTConfig, device: torch.device | str = "cpu") -> DynamicCache:
    """Read a file of `save_cache`: a cache from which a model of `config` continues where the saved one stood.

    Raises:
        ValueError: if the file is no TNT cache, or was filled by a model whose memories differ.
        OSError: if the file cannot be read.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FILE_FORMAT:
            raise ValueError(f"{os.fspath(path)} is no TNT cache: its format is {metadata.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    signature = json.loads(metadata["signature"])
    _check_signature(signature, cache_signature(config))
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        own = {n.removeprefix(f"layers.{i}."): t for n, t in tensors.items() if n.startswith(f"layers.{i}.")}
        conv_tail = own.pop("conv_tail", None)
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in own.items():
            memory, _, field = name.partition(".")
            groups.setdefault(memory, {})[field] = tensor
        memories = {memory: MemoryState.from_tensors(flat) for memory, flat in groups.items()}
        layer.store(memories, conv_tail, signature)
        layer.advance(int(metadata["cumulative_length"]))
    return cache


def _check_signature(filled: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [name for name in wanted if filled.get(name) != wanted[name]]
    differences = [f"{name}={filled.get(name)!r} (now {wanted[name]!r})" for name in names]
    if differences:
        raise ValueError(
            f"past_key_values was filled by a model with {', '.join(differences)}; use that configuration, or start "
            "with an empty cache"
        )
