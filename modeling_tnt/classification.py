"""`TNTForSequenceClassification`: logits for each row of a batch."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import can_return_tuple

from .compat import SequenceClassifierOutputWithPast, cache_of, named_cache, one_cache
from .configuration import TNTConfig
from .modeling import TNTModel, TNTPreTrainedModel

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TNTForSequenceClassification(TNTPreTrainedModel):
    """`TNTModel` with a linear head, `score`, on each row's last token: `config.num_labels` logits.

    It loads from a checkpoint of `TNTForCausalLM`, too; `score` is newly initialised then.
    """

    def __init__(self, config: TNTConfig) -> None:
        super().__init__(config)
        if config.problem_type not in (None, *_PROBLEM_TYPES):
            raise ValueError(f"problem_type must be None or one of {_PROBLEM_TYPES}, got {config.problem_type!r}")
        self.num_labels = config.num_labels
        self.model = TNTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
    ) -> SequenceClassifierOutputWithPast:
        """Logits [B, num_labels] of each row's last token, and their loss if `labels` are given.

        The last token is the last one that `attention_mask` shows, with padding on either side. Without a mask,
        `config.pad_token_id` at the ends of a row is padding. A row of nothing but padding gets logits of zero. Behind
        a filled cache, the last token is one of this call's. For the other arguments see `TNTModel.forward`.

        Args:
            labels: by `config.problem_type`; one of None is set by the first labels.
                "single_label_classification" (None: integers, num_labels > 1): [B] integers below num_labels, −100 for
                a row that does not count; the loss is the cross-entropy.
                "multi_label_classification" (None: other numbers, num_labels > 1): [B, num_labels] numbers from 0 to 1;
                binary cross-entropy.
                "regression" (None: num_labels = 1): [B, num_labels] numbers, or [B] for one label; mean squared error.

        Raises:
            ValueError: labels that do not fit; several rows without an attention_mask where padding cannot be told from
                text (`config.pad_token_id` is None, or inputs_embeds); and what `TNTModel.forward` raises.
        """
        if attention_mask is None:
            attention_mask = self._find_padding(input_ids, inputs_embeds)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.score(_last_tokens(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            labels = self._check_labels(labels, logits)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **named_cache(cache_of(outputs)),
        )

    def enable_context_parallel(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError: the last token, which the logits are of, is in one rank only."""
        raise TypeError(
            "a TNTForSequenceClassification cannot be context parallel: its logits are those of the last token, which "
            "one rank has; train it with data parallelism, or use TNTForCausalLM"
        )

    def _find_padding(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
        """[B, T] bool, False at padding; None where there is none."""
        pad = self.config.pad_token_id
        if input_ids is not None and pad is not None:
            is_text = input_ids != pad
            # Inside of a text the same token is text: pad_token_id is often that of the end of a text.
            return (is_text.cumsum(-1) > 0) & (is_text.flip(-1).cumsum(-1).flip(-1) > 0)
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and given.shape[0] > 1:
            raise ValueError(
                f"a batch of {given.shape[0]} rows needs an attention_mask to tell padding from text, since "
                f"{'inputs_embeds do not show it' if input_ids is None else 'config.pad_token_id is None'}; pass the "
                "tokenizer's attention_mask, or input_ids and a model with config.pad_token_id"
            )
        return None

    def _check_labels(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The labels in the dtype that the loss wants."""
        rows, problem, integers = logits.shape[0], self.config.problem_type, labels.dtype in _INTEGERS
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "single_label_classification" if integers else "multi_label_classification"
        if problem == "single_label_classification":
            shapes, fits = [(rows,), (rows, 1)], integers
        else:
            shapes, fits = [(rows, self.num_labels)] + ([(rows,)] if self.num_labels == 1 else []), True
        if not fits or tuple(labels.shape) not in shapes:
            raise ValueError(
                f"labels of problem_type={problem!r} with num_labels={self.num_labels} must be "
                f"{'integers' if problem == 'single_label_classification' else 'numbers'} of shape "
                f"{' or '.join(map(str, shapes))}, got {labels.dtype} of shape {tuple(labels.shape)}; change "
                "the labels, or load the model with the num_labels and problem_type that they need"
            )
        if problem != "single_label_classification":
            return labels.to(logits.dtype)
        if ((labels >= self.num_labels) | ((labels < 0) & (labels != -100))).any():
            raise ValueError(
                f"labels must be from 0 to num_labels - 1 = {self.num_labels - 1}, or -100, got "
                f"{labels.flatten().tolist()}; load the model with num_labels=..."
            )
        return labels.long()


def _last_tokens(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T, hidden_size] → [B, hidden_size] of each row's last token."""
    if attention_mask is None:
        return hidden_states[:, -1]
    rows, columns = hidden_states.shape[:2]
    is_token = (attention_mask[:, -columns:] != 0).to(hidden_states.device)
    last = (torch.arange(columns, device=hidden_states.device) * is_token).argmax(-1)
    return hidden_states[torch.arange(rows, device=hidden_states.device), last]
