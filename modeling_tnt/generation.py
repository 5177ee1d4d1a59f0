"""`generate` for models with memories: states are repeated with their rows, and cannot be rolled back."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .compat import CACHE_NAME, give_both_names, rename_cache, rename_for_peft
from .state import expand_rows

logger = logging.get_logger(__name__)


@dataclass
class _Answers:
    """What ends the rows of a call of `generate`.

    eos_token_ids  behind which `generate` fills a row with padding until the last row has ended, too.
    pad_token_id   that padding.
    begin          the column of the first generated token, or None before it is known.
    """

    eos_token_ids: list[int]
    pad_token_id: int | None
    begin: int | None = None

    @classmethod
    def of(cls, settings: list[Any]) -> _Answers:
        """Each value from the first of several mappings or configs that sets it, as in `generate`."""

        def find(name: str) -> list[int]:
            given = (s.get(name) if isinstance(s, dict) else getattr(s, name) for s in settings)
            return next((torch.as_tensor(ids).flatten().tolist() for ids in given if ids is not None), [])

        eos = find("eos_token_id")
        return cls(eos, next(iter(find("pad_token_id") or eos), None))

    def hide_padding(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask of all columns with zeros behind each row's end; unchanged while no row has ended."""
        if self.begin is None or not self.eos_token_ids or input_ids.shape[1] - self.begin < 2:
            return attention_mask
        answer = input_ids[:, self.begin :]
        ends = torch.isin(answer, torch.tensor(self.eos_token_ids, device=answer.device))
        is_padding = (ends.cumsum(1) - ends.long() > 0) & (answer == self.pad_token_id)
        if not is_padding.any():
            return attention_mask
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        mask[:, -answer.shape[1] :].masked_fill_(is_padding, 0)
        return mask


# Of the call that runs now: `generate` has no other way to tell its loop, and a model may serve several threads.
_ANSWERS: ContextVar[_Answers | None] = ContextVar("answers", default=None)


def warn_no_cache_when_checkpointing() -> None:
    """Warn once a process."""
    logger.warning_once(
        "use_cache=True is incompatible with gradient checkpointing in training: this goes on without a cache. Call "
        "model.eval() to generate with one, or use use_cache=False to do without this warning."
    )


class TNTGenerationMixin(GenerationMixin):
    """transformers' `generate` for a TNT model."""

    # With the signature of transformers' own, which is looked into.
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        rename_cache(kwargs)
        if self.context_parallel is not None:
            raise ValueError(
                "generate reads with whole rows in one process, and this model is context parallel: read a document "
                "with model.memorize, then generate inside of `with model.pause_context_parallel():`"
            )
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or self.generation_config
        if (
            self.training
            and self.base_model.gradient_checkpointing
            and kwargs.get("use_cache", config.use_cache) is not False
        ):
            warn_no_cache_when_checkpointing()
            kwargs["use_cache"] = False
        prompt = next((kwargs[n] for n in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(n) is not None), None)
        _check_something_is_left_to_read(
            kwargs.get(CACHE_NAME), args[0] if args and prompt is None else prompt, kwargs.get("attention_mask")
        )
        token = _ANSWERS.set(_Answers.of([kwargs, config, self.generation_config]))
        try:
            return give_both_names(super().generate(*args, **kwargs))
        finally:
            _ANSWERS.reset(token)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat the states along with the prompts, for beams and for several sequences a prompt."""
        cache, embeds = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        prompts = input_ids if embeds is None else embeds
        if isinstance(cache, Cache) and prompts is not None:
            model_kwargs[CACHE_NAME] = expand_rows(cache, prompts.shape[0], expand_size)
        answers = _ANSWERS.get()
        if answers is not None:
            answers.begin = 0 if input_ids is None else input_ids.shape[1]
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    # With the signature of transformers' own, which is looked into.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        # With stop_strings, transformers passes the tokenizer on to here, and from here to the model, which takes none.
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        answers, read, cache = _ANSWERS.get(), inputs.get("input_ids"), inputs.get(CACHE_NAME)
        if answers is not None and cache is not None and read is not None and read.shape[1] == 1:
            # What a row is filled with behind its end must not reach its memories: the next turn reads on from them.
            mask = answers.hide_padding(input_ids, inputs.get("attention_mask"))
            if mask is not None:
                # Of new ids alone behind a cache the last column is enough. (PEFT puts a learned prompt's mask before.)
                is_whole = mask.shape[1] == cache.get_seq_length() + 1 or "prepare_inputs_for_generation" in vars(self)
                inputs["attention_mask"] = mask if is_whole else mask[:, -1:]
        return rename_for_peft(inputs)

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict
    ) -> None:
        """Also refuse assisted generation, in either role, before anything is read: it rolls rejected tokens back."""
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


def _check_something_is_left_to_read(cache: Any, prompt: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise ValueError if the cache has read the whole prompt: no token is left to generate from."""
    columns = 1 if prompt is None else prompt.shape[1]
    # With a longer mask the prompt holds new tokens only.
    new_only = attention_mask is not None and attention_mask.shape[-1] != columns
    read = cache.get_seq_length() if isinstance(cache, Cache) else 0
    if read and read >= columns and not new_only:
        raise ValueError(
            f"cache (past_key_values) has read {read} tokens and the prompt has {columns}: pass all of the tokens that "
            "were read and at least one more. To answer a prompt again, copy the cache (copy.deepcopy, clone() of a "
            "TNTState) before the prompt's last token is read, or generate without one"
        )
