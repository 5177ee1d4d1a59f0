"""Every rule of a `TNTConfig`, in one place. A finder yields texts: the parameter, the rule, the value, the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import islice
from typing import Any

from packaging.version import InvalidVersion, Version
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .version import VERSION

QK_PROJECTIONS = ("shard", "chunk", "none")
GLOBAL_UPDATES = ("gradient", "muon")
MEMORY = "memory"
MEMORY_AS = ("context", "gate", "layer")
ATTENTION_TYPES = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear")  # others need to know a longest context, and a memory has none
KERNEL_BACKENDS = ("auto", "reference", "torch", "native", "triton")

# A file of somebody else's must not keep its reader busy: numbers are bounded, and so is what is said of them.
LARGEST = {"num_hidden_layers": 10_000, "num_labels": 1_000_000}
LARGEST_INT = 2**31 - 1
SHOWN_PROBLEMS, SHOWN_LENGTH = 20, 1_000

# What transformers, and what builds on it, passes to a constructor or to AutoConfig.from_pretrained, or stores in a
# config.json, without declaring it on its base class.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "gguf_file",
    "quantization_config",
    "tie_last_hidden_states",
    "transformers_weights",
}


def raise_problems(problems: Iterable[str], saved_by: str | None = None) -> None:
    """Raise one ValueError with a numbered list of the problems, if there is any.

    Args:
        saved_by: the version of this package that wrote the fields; a newer one is a likely cause.
    """
    problems = list(islice(problems, SHOWN_PROBLEMS))
    if problems:
        lines = [f"  {i}. {_cut(problem)}" for i, problem in enumerate(problems, start=1)]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        count += " or more" if len(problems) == SHOWN_PROBLEMS else ""
        if is_newer(saved_by):
            lines.append(
                f"It was saved by modeling-tnt {saved_by}, and this is {VERSION}: update modeling-tnt, or load "
                "the checkpoint with trust_remote_code=True where modeling-tnt is not imported"
            )
        raise ValueError("\n".join([f"TNTConfig has {count}:", *lines]))


def is_newer(version: str | None) -> bool:
    """Whether a version of this package is newer than this one."""
    try:
        return version is not None and Version(str(version)) > Version(VERSION)
    except InvalidVersion:
        return False


def find_unknown_fields(cls: type, kwargs: dict[str, Any], only_misspelt: bool = False) -> Iterator[str]:
    """Keywords that are neither a field of the config class `cls` nor known to transformers' base class.

    With `only_misspelt`, only those that look like a field. A `model_type` of another model counts as unknown too.
    """
    if kwargs.get("model_type", cls.model_type) != cls.model_type:
        yield (
            f"model_type must be {cls.model_type!r}, got {kwargs['model_type']!r}; load this checkpoint with AutoConfig"
        )
    for key in kwargs:
        if _is_known(cls, key):
            continue
        near = _nearest_field(cls, key)
        if near is not None:
            yield f"{key} is not a field of {cls.__name__}; did you mean {near}?"
        elif not only_misspelt:
            yield f"{key} is not a field of {cls.__name__}; remove it, or see help({cls.__name__})"


def find_extra_keys(cls: type, config_dict: dict[str, Any]) -> list[str]:
    """What a file holds besides fields, and a config can hold: what tools and users have set on a config, which
    `save_pretrained` writes. Other names of fields and those of properties and methods are no such keys."""
    taken = {"tnt_version", *cls.attribute_map}
    return [key for key in config_dict if not (_is_known(cls, key) or hasattr(cls, key) or key in taken)]


def describe_extra_keys(cls: type, keys: list[str]) -> str:
    """A warning of the keys that `find_extra_keys` has found."""
    named = []
    for key in keys[:SHOWN_PROBLEMS]:
        near = _nearest_field(cls, key)
        named.append(_cut(key) + (f" (did you mean {near}?)" if near else ""))
    more = f" and {len(keys) - len(named)} more" if len(keys) > len(named) else ""
    return (
        f"The model's config file has keys that are no fields of {cls.__name__}: {', '.join(named)}{more}. They are "
        "kept, and saved again, and have no effect."
    )


def _is_known(cls: type, key: str) -> bool:
    is_field = any(key == f.name for f in fields(cls))
    return is_field or key in _TRANSFORMERS_KEYS or key.startswith("_") or hasattr(PreTrainedConfig, key)


def _nearest_field(cls: type, key: str) -> str | None:
    near = difflib.get_close_matches(key, [f.name for f in fields(cls)], n=1, cutoff=0.8)
    return cls.attribute_map.get(key, near[0] if near else None)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]} ..."


def find_problems(config: Any, num_labels: Any = None) -> Iterator[str]:
    """All problems of a config's fields; fields whose default is derived may still be None.

    `num_labels`: of a classifier, which transformers makes a table of.
    """
    too_large = list(_find_too_large(config, num_labels))
    yield from too_large
    if too_large:
        return  # the other rules compute with the numbers
    yield from _find_wrong_scalars(config)
    yield from _find_wrong_token_ids(config)
    yield from _find_wrong_chunks(config)
    yield from _find_contradictions(config)
    yield from _find_wrong_attention(config)


def divisors(number: int) -> list[int]:
    """All divisors, in rising order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d < number]


def _find_too_large(c: Any, num_labels: Any) -> Iterator[str]:
    values = {f.name: getattr(c, f.name) for f in fields(c)} | {"num_labels": num_labels}
    for name, value in values.items():
        limit = LARGEST.get(name, LARGEST_INT)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > limit:
                yield f"{name} must be at most {limit}, got {number}"


def _is_int(x: Any, at_least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= at_least


def _is_real(x: Any, at_least: float) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= at_least


def _find_wrong_scalars(c: Any) -> Iterator[str]:
    """Types and ranges of single fields."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads"):
        if not _is_int(getattr(c, name), 1):
            yield f"{name} must be an int of at least 1, got {getattr(c, name)!r}"
    for name in ("head_dim", "intermediate_size", "memory_depth", "memory_expansion"):
        if getattr(c, name) is not None and not _is_int(getattr(c, name), 1):
            yield f"{name} must be an int of at least 1, or None for the default, got {getattr(c, name)!r}"
    if not _is_int(c.conv_kernel_size, 0):
        yield f"conv_kernel_size must be an int of at least 0 (0: no convolution), got {c.conv_kernel_size!r}"
    for name in ("rms_norm_eps", "initializer_range"):
        if not _is_real(getattr(c, name), 0):
            yield f"{name} must be a finite number of at least 0, got {getattr(c, name)!r}"
    for name in ("memory_base_lr", "global_memory_base_lr", "memory_initializer_range", "memory_norm_init"):
        if getattr(c, name) is not None and not _is_real(getattr(c, name), 0):
            yield f"{name} must be a finite number of at least 0, or None for the default, got {getattr(c, name)!r}"
    for name in (
        "tie_word_embeddings", "use_cache", "memory_bias", "memory_residual_norm", "normalize_projection",
        "use_momentum", "use_forget_gate", "token_scale", "use_output_gate",
    ):  # fmt: skip
        if not isinstance(getattr(c, name), bool):
            yield f"{name} must be True or False, got {getattr(c, name)!r}"
    from ..kernels.memories.kinds import memory_types  # imports torch: not before a configuration is made

    choices = {
        "memory_type": memory_types(), "global_update": GLOBAL_UPDATES, "qk_projection": QK_PROJECTIONS,
        "kernel_backend": KERNEL_BACKENDS,
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            yield f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(c, name)!r}"
    if not isinstance(c.hidden_act, str) or c.hidden_act not in ACT2FN:
        near = difflib.get_close_matches(str(c.hidden_act), ACT2FN, n=3) or ["silu", "gelu", "relu"]
        yield f"hidden_act={c.hidden_act!r} is not an activation of transformers; use {' or '.join(map(repr, near))}"


def _find_wrong_attention(c: Any) -> Iterator[str]:
    """Layer types, and the heads, windows and positions of those that attend."""
    for name in ("num_attention_heads", "num_key_value_heads", "sliding_window", "full_attention_interval"):
        if getattr(c, name) is not None and not _is_int(getattr(c, name), 1):
            yield f"{name} must be an int of at least 1, or None, got {getattr(c, name)!r}"
            return
    kinds = c.layer_types
    if kinds is not None:
        allowed = (MEMORY, *ATTENTION_TYPES)
        if not isinstance(kinds, list):
            yield f"layer_types must be a list with one entry for each block, got {kinds!r}; use e.g. {[MEMORY]!r}"
            return
        for i, kind in enumerate(kinds):
            if kind not in (*allowed, "tnt_memory"):
                near = difflib.get_close_matches(str(kind), allowed, n=1) or [" or ".join(map(repr, allowed))]
                yield f"layer_types[{i}] must be one of {', '.join(map(repr, allowed))}, got {kind!r}; use {near[0]}"
        if _is_int(c.num_hidden_layers, 1) and len(kinds) != c.num_hidden_layers:
            yield (
                f"layer_types has {len(kinds)} entries for num_hidden_layers={c.num_hidden_layers}; give one for each "
                "block, or full_attention_interval=4 for three memories to one full attention"
            )
    if _is_int(c.full_attention_interval, 1) and _is_int(c.num_hidden_layers, 1):
        if c.full_attention_interval > c.num_hidden_layers:
            yield (
                f"full_attention_interval={c.full_attention_interval} must be at most "
                f"num_hidden_layers={c.num_hidden_layers}, or no block attends; use a smaller one, or None"
            )
    if kinds is not None and c.full_attention_interval is not None:
        yield "layer_types and full_attention_interval both say which blocks attend; leave one out"
    if c.memory_as not in (None, *MEMORY_AS):
        yield f"memory_as must be None or one of {', '.join(map(repr, MEMORY_AS))}, got {c.memory_as!r}"
    if not _is_int(c.num_persistent_tokens, 0):
        yield f"num_persistent_tokens must be an int of at least 0, got {c.num_persistent_tokens!r}"
    windows = {'layer_types with "sliding_attention" need': "sliding_attention" in (kinds or [])}
    windows |= {f"memory_as={c.memory_as!r} needs": c.memory_as in ("gate", "layer")}
    for what in (what for what, wanted in windows.items() if wanted and not _is_int(c.sliding_window, 2)):
        yield f"{what} a sliding_window of at least 2, got {c.sliding_window}; set it, e.g. to 512 tokens"
    among = any(kind in ATTENTION_TYPES for kind in kinds or [])
    attends = c.full_attention_interval is not None or c.memory_as is not None or among
    yield from _find_wrong_heads(c) if attends else _find_idle_attention(c)


def _find_idle_attention(c: Any) -> Iterator[str]:
    """Choices for attention layers where there are none. (Derived ones are there, for tools that read them.)"""
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(c, name) not in (None, c.num_heads):
            yield (
                f"{name}={getattr(c, name)} is for attention layers, and no block attends; did you mean num_heads? Or "
                "set layer_types"
            )
    for name in ("sliding_window", "num_persistent_tokens"):
        if getattr(c, name):
            yield f"{name}={getattr(c, name)} is for attention layers, and no block attends; set layer_types"


def _find_wrong_heads(c: Any) -> Iterator[str]:
    heads = c.num_heads if c.num_attention_heads is None else c.num_attention_heads
    pairs = heads if c.num_key_value_heads is None else c.num_key_value_heads
    if _is_int(heads, 1) and heads % pairs:
        remedy = _nearest_divisors(heads, pairs)
        yield f"num_key_value_heads={pairs} must divide num_attention_heads={heads}; use {remedy}"
    if _is_int(c.hidden_size, 1) and _is_int(c.num_heads, 1):
        dim = c.hidden_size // c.num_heads if c.head_dim is None else c.head_dim
        if _is_int(dim, 1) and dim % 2:
            yield f"head_dim={dim} must be even for rotary positions, which turn pairs; use {dim + 1}"
    if c.memory_as == "gate" and heads != c.num_heads:
        yield (
            f'memory_as="gate" multiplies attention and memories: num_attention_heads={heads} must equal '
            f"num_heads={c.num_heads}; leave it out"
        )
    if c.memory_as == "context":
        yield from _find_wrong_segment(c)
    rope = c.rope_parameters
    if rope is not None and not isinstance(rope, dict):
        yield f'rope_parameters must be a dict or None, got {rope!r}; use e.g. {{"rope_theta": 1e4}}'
    elif rope is not None and rope.get("rope_type", "default") not in ROPE_TYPES:
        yield (
            f"rope_parameters has rope_type={rope['rope_type']!r}, which depends on a longest context; use one of "
            f"{', '.join(map(repr, ROPE_TYPES))}"
        )


def _find_wrong_segment(c: Any) -> Iterator[str]:
    """Segments of a memory as a context: the chunks of the global memory."""
    segment = c.global_chunk_size
    if not _is_int(segment, 1):
        yield (
            'memory_as="context" reads in segments, the chunks of the global memory, got global_chunk_size='
            f"{segment}; set it, e.g. to 512"
        )
        return
    for i, chunk in enumerate(c.local_chunk_sizes if isinstance(c.local_chunk_sizes, list) else []):
        if _is_int(chunk, 1) and segment % chunk:
            yield (
                f'local_chunk_sizes[{i}]={chunk} must divide the segment of memory_as="context", '
                f"global_chunk_size={segment}; use {_nearest_divisors(segment, chunk)}"
            )


def _find_wrong_token_ids(c: Any) -> Iterator[str]:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(c, name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if any(i is not None and not _is_int(i, 0) for i in ids):
            yield f"{name} must be a token id (an int of at least 0) or None, got {value!r}"
        elif _is_int(c.vocab_size, 1) and any(i is not None and i >= c.vocab_size for i in ids):
            yield f"{name}={value!r} must be below vocab_size={c.vocab_size}; use a larger vocab_size"


def _find_wrong_chunks(c: Any) -> Iterator[str]:
    """Chunk sizes and shard lengths, each and together."""
    if c.global_chunk_size is not None and not _is_int(c.global_chunk_size, 1):
        yield f"global_chunk_size must be an int of at least 1, or None, got {c.global_chunk_size!r}"
    chunks, lengths = c.local_chunk_sizes, c.local_shard_lengths
    if not isinstance(chunks, list):
        yield f"local_chunk_sizes must be a list with one int for each local memory, got {chunks!r}; use [{chunks!r}]"
        return
    if not chunks and c.global_chunk_size is None:
        yield "there is no memory: give local_chunk_sizes an entry, e.g. [8], or set global_chunk_size, e.g. 2048"
    for i, chunk in enumerate(chunks):
        if not _is_int(chunk, 1):
            yield f"local_chunk_sizes[{i}] must be an int of at least 1, got {chunk!r}"
    if isinstance(lengths, list) and len(lengths) != len(chunks):
        yield (
            f"local_shard_lengths has {len(lengths)} entries for the {len(chunks)} of local_chunk_sizes; give one for "
            "each, or one number for all"
        )
        return
    per_memory = lengths if isinstance(lengths, list) else [lengths] * max(1, len(chunks))
    for i, length in enumerate(per_memory):
        name = f"local_shard_lengths[{i}]" if isinstance(lengths, list) else "local_shard_lengths"
        if length is not None and not _is_int(length, 1):
            yield f"{name} must be an int of at least 1, or None, got {length!r}"
            if not isinstance(lengths, list):
                return
        elif length is not None and i < len(chunks) and _is_int(chunks[i], 1) and length % chunks[i]:
            yield (
                f"local_chunk_sizes[{i}]={chunks[i]} must divide {name}={length}; "
                f"use {_nearest_divisors(length, chunks[i])}"
            )


def _nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted` on either side, as words."""
    known = divisors(number)
    below, above = [d for d in known if d < wanted], [d for d in known if d > wanted]
    return " or ".join(str(d) for d in below[-1:] + above[:1])


def _find_contradictions(c: Any) -> Iterator[str]:
    """Fields that are fine alone and do not fit together."""
    if c.head_dim is None and _is_int(c.hidden_size, 1) and _is_int(c.num_heads, 1) and c.hidden_size % c.num_heads:
        yield (
            f"num_heads={c.num_heads} must divide hidden_size={c.hidden_size} when head_dim is None; "
            f"use {_nearest_divisors(c.hidden_size, c.num_heads)}, or set head_dim"
        )
    yield from _find_no_memory(c)
    if c.normalize_projection is True and c.qk_projection == "none":
        yield 'normalize_projection=True needs a projection; use qk_projection="shard" or "chunk", or False'
    if c.memory_norm_init is not None and c.memory_residual_norm is False:
        yield (
            f"memory_norm_init={c.memory_norm_init!r} needs the residual norm; use memory_residual_norm=True, or "
            "memory_norm_init=None"
        )
    if c.global_update == "muon" and c.global_chunk_size is None:
        yield (
            'global_update="muon" is for the global memory, got global_chunk_size=None; set global_chunk_size, e.g. '
            '2048, or use global_update="gradient"'
        )
    if c.global_update == "muon" and c.memory_initializer_range == 0:
        yield (
            'global_update="muon" keeps the norms of the initial weights, which memory_initializer_range=0 makes zero; '
            'use None or a number above 0, or global_update="gradient"'
        )
    if c.token_scale is True and (c.use_momentum is True or c.use_forget_gate is True):
        given = " and ".join(f"{n}=True" for n in ("use_momentum", "use_forget_gate") if getattr(c, n) is True)
        yield f"token_scale=True excludes {given}; use one or the other"


def _find_no_memory(c: Any) -> Iterator[str]:
    """A kind of memory that has no such depth or width."""
    from ..kernels.memories.kinds import memory_kind, memory_types

    if c.memory_type not in memory_types():
        return
    kind = memory_kind(c.memory_type)
    depth = kind.depth if c.memory_depth is None else c.memory_depth
    if not _is_int(depth, 1):
        return
    try:
        kind.maps(depth)
    except ValueError as error:
        yield str(error)
        return
    if not kind.has_hidden(depth) and _is_int(c.memory_expansion, 2):
        of_depth = "" if depth == kind.depth else f" of depth {depth}"
        yield (
            f"a {kind.name} memory{of_depth} has no hidden layer, got memory_expansion={c.memory_expansion}; use 1 or "
            "None"
        )
