"""Plain `generate()`, in every mode it has for models of this kind."""

import pytest
import torch
from model_cases import VARIANTS, make_model, make_tokens
from transformers import DynamicCache

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@torch.no_grad()
def continue_greedily(model, tokens, steps=12):
    """Argmax of full forwards, without a cache."""
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_greedy_decoding_is_the_argmax_of_full_forwards(variant, length):
    model, prompt = make_model(variant), make_tokens(2, length)
    out = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, continue_greedily(model, prompt))
    assert out.past_key_values.get_seq_length() == length + 11
    assert torch.equal(model.generate(prompt, use_cache=False, **GREEDY), out.sequences)


@pytest.mark.parametrize("variant", ["mlp", "linear-plain-two-locals"])
def test_a_left_padded_batch_generates_what_each_row_does_alone(variant):
    model = make_model(variant)
    rows = [make_tokens(1, n, seed=n) for n in (9, 4, 1)]
    ids = torch.cat([torch.cat([torch.zeros(1, 9 - r.shape[1], dtype=torch.long), r], dim=1) for r in rows])
    out = model.generate(ids, attention_mask=(ids > 0).long(), **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(out[i : i + 1, 9:], continue_greedily(model, row)[:, row.shape[1] :])


def test_beam_search_reorders_the_memories():
    """Beams with the cache = beams that read everything again."""
    model, prompt = make_model(), make_tokens(2, 5)
    beams = {"num_beams": 4, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 10}
    cached = model.generate(prompt, **beams)
    assert cached.shape == (6, 15)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **beams))


def test_sampling_with_several_sequences_a_prompt():
    model, prompt = make_model(), make_tokens(2, 5)
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        outs.append(
            model.generate(prompt, do_sample=True, num_return_sequences=3, max_new_tokens=10, use_cache=use_cache)
        )
    assert outs[0].shape == (6, 15) and len(outs[0].unique(dim=0)) > 2
    assert torch.equal(*outs)


def test_generation_continues_a_filled_cache_in_mid_chunk():
    model, prompt = make_model(), make_tokens(2, 6)
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, make_tokens(2, 3, seed=5)], dim=1)
    second = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, continue_greedily(model, longer))


def test_the_prompt_may_be_read_in_pieces_or_as_embeddings():
    model, prompt = make_model(), make_tokens(2, 11)
    expected = continue_greedily(model, prompt)
    pieces = model.generate(prompt, prefill_chunk_size=3, past_key_values=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(pieces, expected)
    embeds = model.get_input_embeddings()(prompt).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, 11:])


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_cache_implementation_is_ours(kind):
    model, prompt = make_model(), make_tokens(2, 5)
    out = model.generate(prompt, cache_implementation=kind, **GREEDY)
    assert torch.equal(out, model.generate(prompt, **GREEDY))


def test_what_generation_cannot_do_is_refused():
    model, prompt = make_model(), make_tokens(1, 5)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(prompt, assistant_model=model, max_new_tokens=3)
    with pytest.raises(ValueError, match="temprature"):
        model.generate(prompt, temprature=0.5, max_new_tokens=3)
