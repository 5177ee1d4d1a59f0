"""Choices of the training recipe that act where the model is made: what each one starts with."""

import pytest
import torch
from model_cases import make_model, make_tokens

from modeling_tnt import TNTForCausalLM


def norm_weights(model: TNTForCausalLM) -> list[torch.Tensor]:
    return [
        memory.norm_weight.detach()
        for layer in model.model.layers
        for memory in layer.memory.memories().values()
        if memory.norm_weight is not None
    ]


@pytest.mark.parametrize("given, expected", [(None, 1.7 / 16**0.5), (1.0, 1.0), (0.05, 0.05)])
def test_the_norm_of_every_memory_starts_at_memory_norm_init(given, expected):
    weights = norm_weights(make_model(memory_norm_init=given))
    assert len(weights) == 4
    for weight in weights:
        torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=1e-6, atol=0)


def test_a_checkpoint_keeps_its_norm_whatever_its_config_says(tmp_path):
    """Old checkpoints have no such field: what they read does not depend on it."""
    model = make_model(memory_norm_init=1.0)
    model.save_pretrained(tmp_path)
    loaded = TNTForCausalLM.from_pretrained(tmp_path, memory_norm_init=0.1, dtype=torch.float64).eval()
    tokens = make_tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
