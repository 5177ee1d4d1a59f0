"""What `generate` has to know of memories: a state is copied for several sequences a prompt, and never taken back."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from .state import expand_rows


class TNTGenerationMixin(GenerationMixin):
    """transformers' `generate` for a TNT model."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """transformers repeats the prompts of a batch for beams and several sequences a prompt: their states, too."""
        cache, embeds = model_kwargs.get("past_key_values"), model_kwargs.get("inputs_embeds")
        prompts = input_ids if embeds is None else embeds
        if isinstance(cache, Cache) and prompts is not None:
            model_kwargs["past_key_values"] = expand_rows(cache, prompts.shape[0], expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    # With the signature of transformers' own, which is looked into.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        # With stop_strings, transformers passes the tokenizer on to here, and from here to the model, which takes none.
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict
    ) -> None:
        """Also refuses assisted generation, in either part, before anything is read: it takes rejected tokens back."""
        if generation_config.is_assistant:
            raise ValueError(
                f"assistant_model must be a model whose cache can be cropped, got {type(self).__name__}: its memories "
                "cannot unlearn the tokens that the other model rejects; use an attention model as assistant, or none"
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"assisted generation is not supported by {type(self).__name__}: its memories cannot unlearn tokens "
                "that are rejected; leave out assistant_model, prompt_lookup_num_tokens and assistant_early_exit"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
