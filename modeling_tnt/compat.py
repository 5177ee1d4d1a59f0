"""Differences between the supported releases of transformers. No other module checks a version.

transformers 5.24 calls `cache` what was `past_key_values`, in every forward, in `generate` and in outputs. The models
take and give both names under any release; inside of this package it is `cache`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import transformers.generation.utils as generation
from packaging.version import Version
from transformers import Cache, PreTrainedModel, modeling_outputs
from transformers.utils import ModelOutput

OTHER_NAME = "past_key_values"
CACHE_NAME = "cache" if any(f.name == "cache" for f in fields(modeling_outputs.BaseModelOutputWithPast)) else OTHER_NAME
"""The name under which this release's `generate` passes the cache to a model, and outputs have it as a field."""

LEANS_ON = (
    # Cache layers: registration by `_layer_type`, and what `cache_implementation="static"` is made of.
    "transformers.cache_utils:CacheLayerMixin.__init_subclass__",
    "transformers.cache_utils:STATIC_LAYER_TYPE_MAPPING",
    # `generate`: the rows of a state are repeated with the prompts; what cannot go is refused before anything is read.
    "transformers:GenerationMixin._expand_inputs_for_generation",
    "transformers:GenerationMixin._validate_generation_mode",
    "transformers:GenerationMixin.prepare_inputs_for_generation",
    "transformers.generation.configuration_utils:GenerationMode.ASSISTED_GENERATION",
    "transformers.generation.utils:GenerateDecoderOnlyOutput",
    "transformers.generation.utils:GenerateBeamDecoderOnlyOutput",
    # What a model class tells transformers.
    "transformers:PreTrainedModel._no_split_modules",
    "transformers:PreTrainedModel._skip_keys_device_placement",
    "transformers:PreTrainedModel._is_stateful",
    "transformers:PreTrainedModel._tied_weights_keys",
    "transformers:PreTrainedModel._init_weights",
    "transformers.initialization:constant_",
    "transformers.modeling_layers:GradientCheckpointingLayer",
    "transformers.utils:can_return_tuple",
    "torch.nn.modules.linear:NonDynamicallyQuantizableLinear",
    # What is looked up by the name of a class or model type, and which weights decay.
    "transformers.models.auto.modeling_auto:MODEL_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto:MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "transformers.trainer:Trainer.get_decay_parameter_names",
    "peft.utils.constants:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    # The code of checkpoints, pushes and the trainer.
    "transformers.dynamic_module_utils:get_relative_imports",
    "transformers.utils:cached_file",
    "transformers.trainer_callback:ExportableState",
    "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR",
    "accelerate.utils:extract_model_from_parallel",
    "accelerate.state:AcceleratorState._shared_state",
    # Attention: Llama's layer, masks, the implementations by name, and which of them a model class says that it has.
    "transformers.models.llama.modeling_llama:LlamaAttention",
    "transformers.models.llama.modeling_llama:LlamaRotaryEmbedding",
    "transformers.models.llama.modeling_llama:apply_rotary_pos_emb",
    "transformers.models.llama.modeling_llama:eager_attention_forward",
    "transformers.masking_utils:create_causal_mask",
    "transformers.masking_utils:create_sliding_window_causal_mask",
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.get_interface",
    "transformers.cache_utils:DynamicSlidingWindowLayer",
    "transformers:PreTrainedModel._supports_sdpa",
    "transformers:PreTrainedModel._supports_flash_attn",
    "transformers:PreTrainedModel._supports_flex_attn",
    "transformers:PreTrainedModel._supports_attention_backend",
    "torch.distributed.fsdp:fully_shard",
    "torch.distributed.tensor:distribute_tensor",
)
"""Names of other libraries that are private or have moved before, as module:attribute; a test looks for each."""


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The one that is given. Raises ValueError if both are."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument and both are given; leave one out")
    return past_key_values if cache is None else cache


def rename_cache(arguments: dict[str, Any]) -> None:
    """Let keyword arguments hold a cache, if any, under this release's name. Raises ValueError if both are given."""
    given = one_cache(arguments.pop("cache", None), arguments.pop(OTHER_NAME, None))
    if given is not None:
        arguments[CACHE_NAME] = given


def rename_for_peft(inputs: dict[str, Any]) -> dict[str, Any]:
    """What `prepare_inputs_for_generation` returns, with the cache under the name that PEFT looks for.

    PEFT before 0.22 looks for `past_key_values` under every release of transformers, and without it puts a learned
    prompt before every token.
    """
    peft = sys.modules.get("peft")
    if CACHE_NAME == OTHER_NAME or peft is None or CACHE_NAME not in inputs or not _is_before(peft.__version__, "0.22"):
        return inputs
    inputs[OTHER_NAME] = inputs.pop(CACHE_NAME)
    return inputs


@functools.cache
def _is_before(version: str, limit: str) -> bool:
    return Version(version) < Version(limit)


def named_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as this release's keyword argument, for any model of transformers."""
    return {CACHE_NAME: cache}


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in the output of any model of transformers."""
    return output.get(CACHE_NAME)


class _BothNames:
    """Before 5.24: the field `past_key_values` under its later name, too. (5.24 sees to the earlier name itself.)"""

    @property
    def cache(self) -> Cache | None:
        return self.past_key_values

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(OTHER_NAME if key == "cache" else key)


def _with_both_names(output: type[ModelOutput]) -> type[ModelOutput]:
    if CACHE_NAME == "cache":
        return output
    return type(output.__name__, (_BothNames, output), {"__module__": __name__, "__doc__": output.__doc__})


BaseModelOutputWithPast = _with_both_names(modeling_outputs.BaseModelOutputWithPast)
CausalLMOutputWithPast = _with_both_names(modeling_outputs.CausalLMOutputWithPast)
SequenceClassifierOutputWithPast = _with_both_names(modeling_outputs.SequenceClassifierOutputWithPast)
GenerateDecoderOnlyOutput = _with_both_names(generation.GenerateDecoderOnlyOutput)
GenerateBeamDecoderOnlyOutput = _with_both_names(generation.GenerateBeamDecoderOnlyOutput)

_GENERATED: dict[type, Callable[..., ModelOutput]] = {
    generation.GenerateDecoderOnlyOutput: GenerateDecoderOnlyOutput,
    generation.GenerateBeamDecoderOnlyOutput: GenerateBeamDecoderOnlyOutput,
}


def give_both_names(generated: Any) -> Any:
    """What `generate` returns, with the cache under both names where it is an output with one."""
    kind = _GENERATED.get(type(generated), type(generated))
    return generated if kind is type(generated) else kind(**generated)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """`gradient_checkpointing_enable`, which later releases call `activation_checkpointing_enable`."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
