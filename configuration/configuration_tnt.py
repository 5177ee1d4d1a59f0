"""`TNTConfig`: every choice of a TNT, Titans or TTT model, as a transformers configuration."""

from __future__ import annotations

import math
import os
from dataclasses import field, fields
from itertools import chain
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .validation import (
    MEMORY,
    describe_extra_keys,
    find_extra_keys,
    find_problems,
    find_unknown_fields,
    is_newer,
    raise_problems,
)
from .version import VERSION

logger = logging.get_logger(__name__)

CACHE_LAYER_TYPE = "tnt_memory"
"""Name under which the model's cache layer is registered with transformers; see `TNTConfig.layer_types`."""

ATTENTION_FIELDS = (
    "layer_types", "full_attention_interval", "num_attention_heads", "num_key_value_heads", "sliding_window",
    "rope_parameters", "memory_as", "num_persistent_tokens",
)  # fmt: skip


class TNTConfig(PreTrainedConfig):
    """Configuration of `TNTModel` and `TNTForCausalLM`.

    No weight's shape depends on a chunk size or a shard length, so both may be changed when a checkpoint is loaded:
    `from_pretrained(path, local_chunk_sizes=[1])`.

    Args:
        vocab_size: number of rows of the embedding, at least the tokenizer's.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_heads: number of heads; each has its own memories.
        head_dim: width D of a head's keys and values. None: hidden_size // num_heads. The projections map hidden_size
            to num_heads * head_dim, so the two need not be equal.
        intermediate_size: width of the SwiGLU. None: 8/3 of hidden_size, rounded up to a multiple of 64.
        layer_types: what mixes the tokens in each block, one entry for each: "memory", "full_attention" or
            "sliding_attention". None: memory in all of them, or by full_attention_interval.
        full_attention_interval: every so many blocks, the last one attends and the others are memories (4 is the three
            to one of Qwen3-Next); instead of layer_types, which it fills.
        num_attention_heads: heads of the attention layers, of width head_dim each. None: num_heads.
        num_key_value_heads: their heads of keys and values, a divisor. None: as many.
        sliding_window: tokens that a "sliding_attention" layer sees, the newest included.
        rope_parameters: rotary positions of the attention layers, as transformers has them: {"rope_type": "default",
            "rope_theta": 10000.0}. Memories count positions themselves.
        memory_as: how a block of memories attends, too (Titans, arXiv 2501.00663, section 4): "layer" (MAL): attention
            within `sliding_window` on what the memories say; "gate" (MAG): both read the block's input, and each gates
            the other; "context" (MAC): attention within segments, the chunks of the global memory, sees what that
            memory said before the segment, too, and the memories read and learn what it says. None: it does not.
        num_persistent_tokens: learned tokens that every attention layer sees before the first one, from any distance
            (Titans); they are no positions.
        hidden_act: activation of the SwiGLU gate, a name that transformers knows.
        rms_norm_eps: added to the mean square in every RMSNorm.
        initializer_range: standard deviation of the initial slow weights.
        tie_word_embeddings: use the embedding as the output head.
        use_cache: return the memories' state unless the call says otherwise.
        pad_token_id, bos_token_id, eos_token_id: token ids below vocab_size, or None; eos may be a list.
        memory_type: the kind of memory: "mlp" (gelu between its linear maps), "linear", "swiglu", or one that
            `register_memory` was given.
        memory_depth: linear maps of an MLP memory; 1 makes it linear. None: 2, and what other kinds have.
        memory_expansion: hidden width of a memory in units of head_dim. None: 2, or 1 without hidden units.
        memory_bias: fast-weight biases.
        memory_residual_norm: f(x) = x + LN(y) instead of f(x) = y (TTT, arXiv 2407.04620).
        memory_base_lr: eta_base of the local memories' step size `eta(x) = eta_base * sigmoid(theta.x + b)`.
            None: TTT's 1.0 for linear memories and 0.1 for MLPs, which other kinds have, too.
        global_memory_base_lr: the same for the global memory, which sums over a far larger chunk. None: a tenth of it.
        memory_initializer_range: standard deviation of the learned initial fast weights. None: 1/sqrt(fan_in).
        memory_norm_init: initial value of gamma, the learned weight of the residual norm `f(x) = x + gamma * LN(y) +
            beta`. LN(y) has the norm sqrt(D), far more than the v - k that it is to match, and the inner gradients grow
            with it. None: 1.7/sqrt(D), with which gamma * LN(y) is as long as v - k of a fresh model (0.3 at D = 32); 1
            is TTT's. Without the residual norm it stays None.
        global_chunk_size: tokens between two updates of the global memory (TNT eq. 5). None: no global memory.
        global_update: how a chunk changes the global memory: "gradient" (TNT), or "muon": the chunk's step is made
            orthogonal, and the weights keep the norms of the initial ones (LaCT, arXiv 2505.23884; by torch alone).
        local_chunk_sizes: one local memory for each; may be empty (TNT eq. 6, 14).
        local_shard_lengths: tokens after which a local memory is reset to its learned initial state, a multiple of its
            chunk size: one int for all, a list with one entry each, or None: never.
        qk_projection: local memories are read at `M_t q_t`: "shard" sums M over the keys since the last reset (TNT
            appendix C), "chunk" since the start of the chunk (eq. 7 as printed), "none" reads at q_t.
        normalize_projection: divide the projected query by its L2 norm.
        use_momentum: the inner optimiser's momentum, a gate of the input (Titans, arXiv 2501.00663).
        use_forget_gate: weight decay of the fast weights, a gate of the input (Titans).
        token_scale: TTT's learned scale of a chunk's summed gradient by position; excludes momentum and forget gate.
        conv_kernel_size: width of the causal depthwise convolution behind the q, k, v projections. 0: none.
        use_output_gate: multiply the mixer's output by a gate of the input.
        kernel_backend: "auto", "reference", "torch", "native" (C++ on a CPU) or "triton"; one that is named and cannot
            run raises.

    Raises:
        ValueError: one that lists every problem of the fields, unknown ones included, and says so if they were saved by
            a newer version of this package. Unknown keys of a file are kept instead, see `from_dict`.
    """

    model_type = "tnt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # What transformers' attention asks a config for, and is no choice here.
    attention_bias = False
    attention_dropout = 0.0

    vocab_size: int = 32128
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 12
    head_dim: int | None = None
    intermediate_size: int | None = None
    layer_types: list[str] | None = None
    full_attention_interval: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    sliding_window: int | None = None
    rope_parameters: dict | None = None
    memory_as: str | None = None
    num_persistent_tokens: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    memory_type: str = "mlp"
    memory_depth: int | None = None
    memory_expansion: int | None = None
    memory_bias: bool = True
    memory_residual_norm: bool = True
    memory_base_lr: float | None = None
    global_memory_base_lr: float | None = None
    memory_initializer_range: float | None = None
    memory_norm_init: float | None = None

    global_chunk_size: int | None = 2048
    global_update: str = "gradient"
    local_chunk_sizes: list[int] = field(default_factory=lambda: [8])
    local_shard_lengths: int | list[int | None] | None = 2048
    qk_projection: str = "shard"
    normalize_projection: bool = False
    use_momentum: bool = False
    use_forget_gate: bool = False
    token_scale: bool = False
    conv_kernel_size: int = 4
    use_output_gate: bool = True
    kernel_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        self.local_chunk_sizes = _as_list(self.local_chunk_sizes)
        self.local_shard_lengths = _as_list(self.local_shard_lengths)
        self.layer_types = _as_list(self.layer_types)
        saved_by = kwargs.pop("tnt_version", None)
        unknown, wrong = find_unknown_fields(type(self), kwargs), find_problems(self, kwargs.get("num_labels"))
        raise_problems(chain(unknown, wrong), saved_by)
        self._resolve_layers()
        super().__post_init__(**kwargs)
        self._resolve_defaults()

    def _resolve_layers(self) -> None:
        """Which block does what; memories under the name that transformers knows their cache layers by."""
        if self.layer_types is None:
            interval = self.full_attention_interval or self.num_hidden_layers + 1
            self.layer_types = [
                MEMORY if (i + 1) % interval else "full_attention" for i in range(self.num_hidden_layers)
            ]
        self.layer_types = [CACHE_LAYER_TYPE if kind == MEMORY else kind for kind in self.layer_types]
        self.full_attention_interval = None
        if self.num_attention_heads is None:
            self.num_attention_heads = self.num_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _resolve_defaults(self) -> None:
        """Replace None by the number it stands for, so that a saved config keeps it when a default changes."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_heads
        if self.intermediate_size is None:
            self.intermediate_size = 64 * -(-8 * self.hidden_size // (3 * 64))
        from ..kernels.memories.kinds import memory_kind  # imports torch: not before a configuration is made

        kind = memory_kind(self.memory_type)
        if self.memory_depth is None:
            self.memory_depth = kind.depth
        if self.memory_expansion is None:
            self.memory_expansion = 2 if kind.has_hidden(self.memory_depth) else 1
        if self.memory_base_lr is None:
            self.memory_base_lr = kind.base_lr
        if self.global_memory_base_lr is None:
            self.global_memory_base_lr = self.memory_base_lr / 10
        if self.memory_norm_init is None and self.memory_residual_norm:
            self.memory_norm_init = 1.7 / math.sqrt(self.head_dim)

    def validate(self) -> None:
        """Check all fields, e.g. after changing some. Raises one ValueError that lists every problem.

        Runs in the constructor, and when the config is saved.
        """
        raise_problems(find_problems(self))

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `tnt_version`, the version of this package. A model of memories alone has no field of
        attention, so that earlier versions read it, and another number of layers may be given when it is loaded."""
        saved = super().to_dict() | {"tnt_version": VERSION}
        for name in () if self.has_attention else ATTENTION_FIELDS:
            saved.pop(name, None)
        return saved

    @property
    def shard_lengths(self) -> list[int | None]:
        """`local_shard_lengths` with one entry for each local memory; None: never reset."""
        if isinstance(self.local_shard_lengths, list):
            return list(self.local_shard_lengths)
        return [self.local_shard_lengths] * len(self.local_chunk_sizes)

    @property
    def has_attention(self) -> bool:
        """Whether some blocks attend."""
        return bool(self.attention_types)

    @property
    def attention_types(self) -> list[str]:
        """The kinds of attention that some block has."""
        kinds = [kind for kind in self.layer_types if kind != CACHE_LAYER_TYPE]
        if self.memory_as is not None and CACHE_LAYER_TYPE in self.layer_types:
            kinds.append("segment_attention" if self.memory_as == "context" else "sliding_attention")
        return list(dict.fromkeys(kinds))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> TNTConfig:
        """The preset `name` (see `available_presets`) with some fields replaced.

        Raises:
            ValueError: for an unknown preset, saying which ones exist, and for fields that do not fit together.
        """
        from .presets import load_preset  # of the installed package

        return cls(**{**load_preset(name), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """A config from saved fields, `kwargs` replacing some; the result is checked as a whole.

        transformers would set the replacements one by one behind the checks and drop those that it does not know. With
        `return_unused_kwargs=True`, as the models' `from_pretrained` calls it, what is no field is returned to the
        caller, but for names that look like a misspelt field.

        Keys of `config_dict` that are no fields, such as a tool's or a note, become attributes with one warning. Where
        a newer version of this package has saved them they are errors: they may be choices that change the model.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        extra = [] if is_newer(config_dict.get("tnt_version")) else find_extra_keys(cls, config_dict)
        own = {*(f.name for f in fields(cls)), *extra} - _TRANSFORMERS_FIELDS
        overrides = {k: v for k, v in kwargs.items() if k in own}
        others = {k: v for k, v in kwargs.items() if k not in own}
        raise_problems(find_unknown_fields(cls, others, only_misspelt=return_unused))
        given = {**config_dict, **overrides}
        kept = {key: given.pop(key) for key in extra}
        config, unused = super().from_dict(given, return_unused_kwargs=True, **others)
        for key, value in kept.items():
            setattr(config, key, value)
        if kept:
            logger.warning_once(describe_extra_keys(cls, extra))
        return (config, unused) if return_unused else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike):
        """As `from_dict`: transformers would take the keys of a file for a caller's."""
        return cls.from_dict(cls._dict_from_json_file(json_file))


_TRANSFORMERS_FIELDS = {f.name for f in fields(PreTrainedConfig)}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
