"""Sampling a continuation of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .scores import evaluation_mode


@torch.no_grad()
def generate_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, *, new_tokens: int, seed: int
) -> tuple[str, str]:
    """Continue the tokens `prompt` [T] by sampling (temperature 0.8, top-k 40). Returns the prompt and what follows.

    The sample is a function of the seed; the model's mode and torch's random numbers are afterwards as they were.
    """
    device = next(model.parameters()).device
    input_ids = prompt.long()[None].to(device)
    with evaluation_mode(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=min(new_tokens, 16),
            do_sample=True,
            temperature=0.8,
            top_k=40,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    continuation = output[0, input_ids.shape[1] :]
    return tokenizer.decode(prompt, skip_special_tokens=True), tokenizer.decode(continuation, skip_special_tokens=True)
