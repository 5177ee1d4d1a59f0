"""Caches on disk: one safetensors file, with the signature of the model that filled it and a checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache

from .cache import (
    LAYER_TYPE,
    TNTCacheLayer,
    cache_signature,
    check_signature,
    fast_weight_shapes,
    is_memory_layer,
    memory_cache_layers,
)
from .configuration import TNTConfig
from .kernels import MemoryState

# Counts of tokens that all layers of memories share, and what files say that have none.
_COUNTS = {"tokens_before": None, "attended": 0, "forgotten": 0}
_FORMAT, _VERSION = "tnt-cache-", 1


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Write `cache` (the `cache` of a TNT model's output, or a `TNTState`) to a safetensors file.

    The file appears under its name only when it is complete; an existing one survives a failed write.

    Raises:
        ValueError: if the cache is not a TNT model's or has not read anything yet.
        OSError: if the file cannot be written.
    """
    layers, memories = cache.layers, memory_cache_layers(cache)
    if not memories or not all(c.is_initialized for c in memories):
        raise ValueError("save_cache needs the filled cache of a TNT model; call it with use_cache=True")
    tensors = {}
    for i, layer in enumerate(layers):
        flat = _tensors_of_memories(layer) if is_memory_layer(layer) else _tensors_of_attention(layer)
        # Cloned, as the file format does not allow two names for the same memory; and to strides of a new tensor.
        copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in flat.items()}
        tensors |= {f"layers.{i}.{name}": t for name, t in copies.items()}
    metadata = {
        "format": f"{_FORMAT}{_VERSION}",
        "signature": json.dumps(memories[0].signature),
        "cumulative_length": str(memories[0].cumulative_length),
        **{name: json.dumps(_as_number(getattr(memories[0], name))) for name in _COUNTS},
        "checksum": _checksum(tensors),
        "origin": json.dumps(getattr(cache, "origin", None)),
    }
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_cache(path: str | os.PathLike, config: TNTConfig, device: torch.device | str = "cpu") -> DynamicCache:
    """Read a file of `save_cache`. A model of `config` continues from the cache where the saved one stood.

    Raises:
        ValueError: if the file is no TNT cache or damaged, or was filled by a model whose memories differ.
        OSError: if the file cannot be read.
    """
    cache = DynamicCache(config=config)
    fill_cache(cache, path, config, device)
    return cache


def fill_cache(cache: Cache, path: str | os.PathLike, config: TNTConfig, device: torch.device | str) -> Any:
    """Put what a file of `save_cache` holds into a new, empty `cache`; raises as `load_cache`. Returns its origin."""
    path = os.fspath(path)
    metadata, tensors = _read(path, str(device))
    try:
        signature, origin = json.loads(metadata["signature"]), json.loads(metadata.get("origin", "null"))
        signature, columns = dict(signature), int(metadata["cumulative_length"])
        counts = {name: _read_count(metadata.get(name), default, device) for name, default in _COUNTS.items()}
        if origin is not None:
            torch.tensor(origin["fingerprint"] or [], dtype=torch.float64)  # which is what `TNTState` makes of it
            origin = {"model": origin["model"], "fingerprint": origin["fingerprint"]}
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _damaged(path, error) from error
    check_signature(path, signature, cache_signature(config))
    layers = [_split(tensors, f"layers.{i}.") for i in range(config.num_hidden_layers)]
    whole = sum(map(len, layers)) == len(tensors) and metadata.get("checksum") in (None, _checksum(tensors))
    try:
        checks = {LAYER_TYPE: _check_layer}
        kinds = zip(layers, config.layer_types, strict=True)
        rows = {checks.get(kind, _check_attention)(flat, config) for flat, kind in kinds} - {None}
        rows |= {len(count) for count in counts.values() if isinstance(count, Tensor)}
        _check_lengths(layers, config, columns, counts["attended"])
    except ValueError as error:
        raise _damaged(path, error) from error
    if not whole or len(rows) != 1:
        raise _damaged(path, "its tensors are not those that were saved")
    for layer, flat in zip(cache.layers, layers, strict=True):
        if not is_memory_layer(layer):
            _fill_attention(layer, flat, columns)
            continue
        for name, count in counts.items():
            setattr(layer, name, count)
        window = _split(flat, "window.")
        if window:
            layer.attend_within(config.sliding_window)
            _fill_attention(layer.window, window, columns)
            flat = {name: t for name, t in flat.items() if not name.startswith("window.")}
        segment, conv_tail = flat.pop("segment", None), flat.pop("conv_tail", None)
        layer.segment = None if segment is None else segment.transpose(0, 1)
        memories = {name: MemoryState.from_tensors(_split(flat, f"{name}.")) for name in _memory_names(flat)}
        layer.store(memories, conv_tail, signature)
        layer.advance(columns)
    return origin


def _tensors_of_memories(layer: TNTCacheLayer) -> dict[str, Tensor]:
    flat = {f"{m}.{name}": t for m, state in layer.memories.items() for name, t in state.tensors().items()}
    flat |= {} if layer.conv_tail is None else {"conv_tail": layer.conv_tail}
    if layer.window is not None:
        flat |= {f"window.{name}": t for name, t in _tensors_of_attention(layer.window).items()}
    return flat | ({} if layer.segment is None else {"segment": layer.segment.transpose(0, 1)})


def _tensors_of_attention(layer: Any) -> dict[str, Tensor]:
    """None after a reset."""
    return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}


def _fill_attention(layer: Any, flat: dict[str, Tensor], columns: int) -> None:
    """Put keys and values, if there are any, into an empty attention layer of transformers."""
    if flat:
        layer.lazy_initialization(flat["keys"], flat["values"])
        layer.keys, layer.values = flat["keys"], flat["values"]
    if layer.is_sliding:
        layer.cumulative_length = columns


def _check_attention(flat: dict[str, Tensor], config: TNTConfig) -> int | None:
    """The rows of an attention layer's tensors; ValueError unless their names and shapes are those of `config`."""
    if not flat:
        return None
    shapes = {(*t.shape[:2], *t.shape[3:]) for t in flat.values() if t.dim() == 4}
    rows = flat["keys"].shape[0] if flat.keys() == {"keys", "values"} else 0
    if shapes != {(rows, config.num_key_value_heads, config.head_dim)}:
        raise ValueError("its keys and values of attention are missing or of another shape")
    return rows


def _check_lengths(layers: list[dict[str, Tensor]], config: TNTConfig, columns: int, attended: Tensor | int) -> None:
    """ValueError unless full attention holds all columns, and windows as many of their tokens as each other."""
    full, windows = set(), set()
    for flat, kind in zip(layers, config.layer_types, strict=True):
        lengths = {t.shape[2] for name, t in flat.items() if name.split(".")[-1] in ("keys", "values")} or {0}
        if kind == "full_attention":
            full |= lengths
        elif kind == "sliding_attention" or config.memory_as in ("gate", "layer"):
            windows |= lengths
    if full - {columns} or len(windows) > 1 or any(held >= config.sliding_window for held in windows):
        raise ValueError(
            f"behind {columns} columns it holds keys of {sorted(full)} and of {sorted(windows)} in windows"
        )
    if windows == {0} and bool((torch.as_tensor(attended) > 0).any()):
        raise ValueError("its windows hold nothing")


def _read_count(text: str | None, default: int | None, device: torch.device | str) -> Tensor | int | None:
    """Tokens of each row, or of all, as `_as_number` writes them; raises ValueError or TypeError for anything else."""
    count = default if text is None else json.loads(text)
    if isinstance(count, list):
        return torch.tensor(count, dtype=torch.int64, device=device).reshape(len(count))
    if count is not default and (not isinstance(count, int) or count < 0):
        raise ValueError(f"it counts {count!r:.50} tokens")
    return count


def _as_number(tokens_before: Tensor | int | None) -> list[int] | int | None:
    return tokens_before.tolist() if isinstance(tokens_before, Tensor) else tokens_before


def write_whole(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Write a file atomically: `write(temporary)`, then rename. If writing fails the old file stays."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _read(path: str, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of ours."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "")
            if not found.startswith(_FORMAT):
                raise ValueError(
                    f"{path} is no TNT cache: its format is {metadata.get('format')!r}; give a file of save_cache or "
                    "a folder of TNTState.save_pretrained"
                )
            if found != f"{_FORMAT}{_VERSION}":
                raise ValueError(
                    f"{path} has the format {found!r}, which this version does not know; upgrade modeling-tnt, or read "
                    "the document again"
                )
            missing = sorted({"signature", "cumulative_length"} - metadata.keys())
            if missing:
                raise _damaged(path, f"its header lacks {', '.join(missing)}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: str, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged or no safetensors file ({reason}); copy it again from where it was saved, or read the "
        "document again"
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over the bytes of all tensors, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].cpu().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def _split(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _memory_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names if name != "conv_tail"))


def _check_layer(flat: dict[str, Tensor], config: TNTConfig) -> int:
    """The rows of one layer's tensors; ValueError unless their names and shapes are those of `config`."""
    windows = [] if config.memory_as not in ("gate", "layer") else [_check_attention(_split(flat, "window."), config)]
    flat = {name: t for name, t in flat.items() if not (windows and name.startswith("window."))}
    expected = _layer_shapes(config)
    names = _memory_names(name for name in flat if name != "segment")
    if not names or not set(names) <= expected.keys():
        raise ValueError(f"it holds the memories {names}, not those of {sorted(expected)}")
    shapes = {f"{name}.{field}": shape for name in names for field, shape in expected[name].items()}
    if config.conv_kernel_size:
        shapes["conv_tail"] = (config.conv_kernel_size - 1, 3 * config.num_heads * config.head_dim)
    if config.memory_as == "context":
        shapes["segment"] = (4, config.num_key_value_heads, config.global_chunk_size, config.head_dim)
    # Missing where the local memories were reset, where the model has no convolution, and between two segments.
    odd = (shapes.keys() ^ flat.keys()) - {"conv_tail", "segment"} | (flat.keys() - shapes.keys())
    odd |= {name for name in shapes.keys() & flat.keys() if flat[name].shape[1:] != shapes[name]}
    if odd:
        raise ValueError(f"{', '.join(sorted(odd)[:3])} are missing, unknown or of another shape")
    rows = {t.shape[0] for t in flat.values()} | set(windows) - {None}
    if len(rows) != 1:
        raise ValueError(f"its tensors have {sorted(rows)} rows")
    return rows.pop()


def _layer_shapes(config: TNTConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each memory of a layer the tensors of its state and their shapes, without the rows."""
    heads, dim, weights = config.num_heads, config.head_dim, fast_weight_shapes(config)
    groups = ("weights", "anchor", "momentum") if config.use_momentum else ("weights", "anchor")
    shapes = {f"{group}.{name}": shape for group in groups for name, shape in weights.items()} | {"position": ()}
    local = shapes | ({"projection": (heads, dim, dim)} if config.qk_projection != "none" else {})
    named = {} if config.global_chunk_size is None else {"global": shapes}
    return named | {f"local{i}": local for i in range(len(config.local_chunk_sizes))}
