"""What becomes of messages that are on their way when context parallel ends."""

from __future__ import annotations

from types import SimpleNamespace

from modeling_tnt import TNTConfig, TNTForCausalLM


def test_what_was_sent_arrives_before_context_parallel_ends():
    """A rank may end it right after its backward pass, when the rank before it still waits for a gradient."""
    model = TNTForCausalLM(TNTConfig.from_preset("tiny", num_hidden_layers=1))
    finished = []
    neighbours = SimpleNamespace(finish=lambda: finished.append(model.context_parallel))
    context = model.base_model._context_parallel = SimpleNamespace(neighbours=neighbours)
    model.disable_context_parallel()
    assert finished == [context] and model.context_parallel is None
    model.disable_context_parallel()
    assert finished == [context]
