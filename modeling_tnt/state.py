"""`TNTState`: the memories of a model after reading, as an object to copy, save and continue from."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .cache import (
    TNTCacheLayer,
    attention_bytes,
    empty_window,
    is_constant_size,
    is_memory_layer,
    map_layer,
    memory_cache_layers,
    window_layers,
)
from .cache_file import fill_cache, save_cache, write_whole
from .configuration import TNTConfig

STATE_FILE = "memory.safetensors"
DESCRIPTION_FILE = "memory.json"


class TNTState(DynamicCache):
    """The memories of every layer for a batch of rows, of a size that does not depend on how much they have read.

    Attention within windows or segments is part of it: a state holds the keys and values of its last tokens. Full
    attention is not, as it keeps those of all.

    A transformers cache: pass it as `cache` to a model's call or to `generate`, which read on from it and
    advance it (give them `state.clone()` to keep it as it is). `model.memorize(document)` makes one that stands
    *before* input_ids: the document must not be in them, and `get_seq_length()`, the number of columns of input_ids
    that have been read, starts at 0. From there on it is used as every cache is: a conversation passes all of its
    input_ids each time, and those that have been read are skipped.

    In `generate`, a state of one row stands before every prompt of a batch. With num_beams or num_return_sequences, or
    one row for several prompts, `generate` reads on from a copy with as many rows, and the state itself stays as it is.

    origin: what filled it, {"model": name, "fingerprint": numbers of that model's initial fast weights, or
    None}, or None.
    """

    def __init__(self, config: TNTConfig) -> None:
        """A state that has read nothing, for a model of `config`. Raises ValueError for one with full attention, or
        without memories."""
        if not is_constant_size(config):
            grows = "full_attention" in config.layer_types
            raise ValueError(
                f"a TNTState is of constant size, and config.layer_types={config.layer_types} has "
                f"{'full_attention, whose keys grow with what is read' if grows else 'no memory'}; use the cache of "
                "model(..., use_cache=True), or a model of memories and sliding_attention"
            )
        super().__init__(config=config)
        self.origin: dict[str, Any] | None = None

    @classmethod
    def from_cache(cls, cache: Cache, config: TNTConfig) -> TNTState:
        """A copy of any cache of a TNT model of `config`, for instance the `cache` of an output."""
        state = cls(config)
        if [_kind(layer) for layer in getattr(cache, "layers", [])] != [_kind(layer) for layer in state.layers]:
            raise ValueError(f"cache must be that of a TNT model with {len(state.layers)} layers, got {cache!r:.200}")
        state.layers = [map_layer(layer, Tensor.clone) for layer in cache.layers]
        state.origin = getattr(cache, "origin", None)
        return state

    def start_prompt(self) -> None:
        """Count columns from zero: the next input_ids hold new tokens only."""
        for layer in self.layers:
            if is_memory_layer(layer):
                layer.start_prompt()
            else:
                layer.cumulative_length = 0

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return all(layer.is_initialized for layer in memory_cache_layers(self))

    @property
    def tokens_read(self) -> Tensor:
        """[rows] int64, the real tokens behind each row's state; empty if nothing was read. After a reset of a part of
        the memories, those that the other part has read."""
        return self._memories.tokens_read

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(layer.nbytes if is_memory_layer(layer) else attention_bytes(layer) for layer in self.layers)

    def clone(self) -> TNTState:
        """An independent copy: reading on from one leaves the other alone."""
        return _map_cache(self, Tensor.clone)

    def detach(self) -> TNTState:
        """A copy, detached from the autograd graph; see `detach_cache`."""
        return detach_cache(self)

    def repeat(self, repeats: int) -> TNTState:
        """A new state with every row `repeats` times, one after the other, as `torch.repeat_interleave` does.

        `batch_repeat_interleave` is the same in place; `batch_select_indices` and `reorder_cache` choose rows.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(
                f"repeats must be an int of at least 1, got {repeats!r}; it is the number of copies of a row"
            )
        return _map_cache(self, lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in that order; repeats are allowed."""
        self._map(lambda t: t[indices.to(t.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless that removes nothing: a memory cannot unlearn a token."""
        for layer in memory_cache_layers(self):
            layer.crop(tokens_to_remove)

    def reset_local(self) -> None:
        """Forget the recent past: local memories back to their learned initial states at position 0, and with them the
        last tokens that the convolution and attention see. The global memory stays. (`reset()` forgets everything.)

        A segment (memory as a context) ends where it would have; what was read of it is not seen any more."""
        self._forget(lambda name: name != "global", recent=True)

    def reset_global(self) -> None:
        """The global memory back to its learned initial state at position 0; all else stays, but for a segment (memory
        as a context), which is one of the global memory: the next token begins one."""
        self._forget(lambda name: name == "global", recent=False)

    def to(self, device: torch.device | str) -> TNTState:
        """Move every tensor, in place, and return the state."""
        self._map(lambda t: t.to(device))
        return self

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `memory.safetensors`, all that is needed to read on, and `memory.json`, which describes it to people.

        Each appears under its name when it is complete; those of an earlier save survive a failed one.

        Raises:
            ValueError: if the state has read nothing.
            OSError: if the folder or a file cannot be written.
        """
        if not self.is_initialized:
            raise ValueError("the state has read nothing that could be saved; fill it with model.memorize(document)")
        os.makedirs(save_directory, exist_ok=True)
        save_cache(self, os.path.join(save_directory, STATE_FILE))
        text = json.dumps(self._description(), indent=2) + "\n"

        def write(temporary: str) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)

        write_whole(os.path.join(save_directory, DESCRIPTION_FILE), write)

    @classmethod
    def from_pretrained(
        cls, save_directory: str | os.PathLike, model: Any, device: torch.device | str = "cpu"
    ) -> TNTState:
        """Read what `save_pretrained` wrote.

        Args:
            save_directory: the folder.
            model: the model that will read on, or its config. A model's weights are compared with those that filled the
                state, a few numbers of each memory; others give a warning, since the state of another model means
                nothing to it, but fine-tuning or another dtype may have changed them a little.
            device: where to.

        Raises:
            ValueError: a file that is damaged or of another kind, or a state of a model whose memories differ.
            OSError: if there is no such file, or it cannot be read.
        """
        path = os.path.join(save_directory, STATE_FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{os.fspath(save_directory)} holds no {STATE_FILE}; give a folder of TNTState.save_pretrained"
            )
        config = getattr(model, "config", model)
        state = cls(config)
        state.origin = fill_cache(state, path, config, device)
        if config is not model:
            state.check_origin(model.memory_origin(), path)
        return state

    def check_origin(self, origin: dict[str, Any], what: str = "the state") -> None:
        """Warn if the state was filled by other weights than those of `origin`, as far as that is known."""
        if self.origin is not None and not _same_weights(self.origin, origin):
            filler = self.origin["model"] or "an unnamed model"
            warnings.warn(
                f"{what} was filled by weights of {filler}, which are not this model's; "
                "unless one was fine-tuned from the other, read the document again with model.memorize",
                stacklevel=3,
            )

    def _description(self) -> dict[str, Any]:
        layer = self._memories
        return {
            "description": "Memories of a TNT model after reading; load with TNTState.from_pretrained or "
            "model.load_memory",
            "model": self.origin and self.origin["model"],
            "tokens_read": self.tokens_read.tolist(),
            "columns_of_input_ids": self.get_seq_length(),
            "memories": list(layer.memories),
            "window": self._window,
            "segment": 0 if layer.segment is None else layer.segment.shape[3],
            "bytes": self.nbytes,
            "made_for": layer.signature,
        }

    @property
    def _memories(self) -> TNTCacheLayer:
        """The first layer that holds some: all of them have read the same tokens."""
        return memory_cache_layers(self)[0]

    @property
    def _window(self) -> int:
        """Tokens that the windows hold."""
        return next((layer.keys.shape[2] for layer in window_layers(self) if layer.is_initialized), 0)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> None:
        # transformers moves the rows of a window by its columns of input_ids, of which there may be none.
        self.layers = [map_layer(layer, fn) for layer in self.layers]

    def _forget(self, which: Callable[[str], bool], recent: bool) -> None:
        columns = self.get_seq_length()
        for i, layer in enumerate(self.layers):
            if is_memory_layer(layer):
                layer.forget([name for name in layer.memories if which(name)], recent)
            elif recent:
                self.layers[i] = empty_window(layer, columns)

    def __repr__(self) -> str:
        layer = self._memories
        if not self.is_initialized:
            return f"TNTState(nothing read, {len(self.layers)} layers)"
        device = next(iter(layer.memories.values())).position.device
        held = [*layer.memories, *[f"a window of {self._window}"] * bool(self._window)]
        held += [] if layer.segment is None else [f"a segment of {layer.segment.shape[3]}"]
        return (
            f"TNTState(tokens_read={self.tokens_read.tolist()}, columns={self.get_seq_length()}, "
            f"{len(self.layers)} layers of {', '.join(held)}, {self.nbytes / 2**20:.1f} MiB on {device})"
        )


def _kind(layer: Any) -> type:
    return TNTCacheLayer if is_memory_layer(layer) else type(layer)


def detach_cache(cache: Cache) -> Cache:
    """A copy of a cache, detached from the autograd graph.

    For truncated back-propagation through time: `model(piece, cache=detach_cache(cache), use_cache=True)` reads on from
    what the pieces before have taught, and gradients end where the piece begins.
    """
    return _map_cache(cache, Tensor.detach)


def expand_rows(cache: Cache, prompts: int, copies: int) -> Cache:
    """The cache that `generate` reads on from with `prompts` · `copies` rows: a copy if it must have more of them."""
    known = {layer.batch_size if layer.is_initialized else -1 for layer in memory_cache_layers(cache)}
    rows = known.pop() if len(known) == 1 else -1
    repeats = {prompts: copies, 1: prompts * copies}.get(rows, 1)
    if repeats == 1 or rows == prompts * copies:
        return cache
    return _map_cache(cache, lambda t: t.repeat_interleave(repeats, dim=0))


def _map_cache(cache: Cache, fn: Callable[[Tensor], Tensor]) -> Cache:
    """A copy of a cache with `fn` applied to every state tensor."""
    mapped = copy.copy(cache)
    mapped.layers = [map_layer(layer, fn) for layer in cache.layers]
    return mapped


def _same_weights(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two fingerprints agree, but for rounding to bfloat16 (1 in 256) and a little fine-tuning, as far as they
    are known."""
    a, b = ours["fingerprint"], theirs["fingerprint"]
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return bool(((a - b).norm() <= 0.02 * b.norm()).item())
