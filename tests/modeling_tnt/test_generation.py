"""Plain `generate()`, in every mode it has for models of this kind."""

import copy

import pytest
import torch
from model_cases import VARIANTS, make_model, make_tokens
from transformers import DynamicCache

from modeling_tnt.compat import enable_checkpointing

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
    assert out.cache.get_seq_length() == length + 11
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
    second = model.generate(longer, cache=first.cache, **GREEDY)
    assert torch.equal(second, continue_greedily(model, longer))


def test_the_prompt_may_be_read_in_pieces_or_as_embeddings():
    model, prompt = make_model(), make_tokens(2, 11)
    expected = continue_greedily(model, prompt)
    pieces = model.generate(prompt, prefill_chunk_size=3, cache=DynamicCache(config=model.config), **GREEDY)
    assert torch.equal(pieces, expected)
    embeds = model.get_input_embeddings()(prompt).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, 11:])


@pytest.mark.parametrize("kind", ["dynamic", "static", "offloaded"])
def test_every_cache_implementation_is_ours(kind):
    model, prompt = make_model(), make_tokens(2, 5)
    out = model.generate(prompt, cache_implementation=kind, **GREEDY)
    assert torch.equal(out, model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("pad", [0, "eos"])
@pytest.mark.parametrize("left", [0, 4])
def test_the_next_turn_of_a_chat_does_not_remember_padding(pad, left):
    """Row 0 ends early and is filled with padding while row 1 goes on; then both go on behind the cache."""
    model, prompt = make_model("mlp-momentum-forget"), make_tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :left] = 0
    free = model.generate(prompt, attention_mask=mask, **GREEDY)[:, 9:]
    eos = next(t for t in free[0, :6].tolist() if t not in free[1].tolist())
    options = GREEDY | {"pad_token_id": eos if pad == "eos" else pad}
    first = model.generate(prompt, attention_mask=mask, eos_token_id=eos, return_dict_in_generate=True, **options)
    end = 10 + (first.sequences[0, 9:] == eos).nonzero()[0, 0].item()
    length = first.sequences.shape[1]
    assert length - end > 3, "row 0 was to end early"
    assert first.cache.layers[0].tokens_read.tolist() == [end, length - 1 - left]
    turn = torch.cat([first.sequences, make_tokens(2, 5, seed=7)], dim=1)
    mask = torch.cat([mask, torch.ones(2, length + 5 - 9, dtype=torch.long)], dim=1)
    contradiction = mask.clone()
    mask[0, end:length] = 0
    expected = model.generate(turn, attention_mask=mask, **options)
    if left:  # all ones say nothing: transformers leaves such a mask out
        with pytest.raises(ValueError, match=rf"mask shows {length - 1} tokens among the {length - 1} columns"):
            model.generate(turn, attention_mask=contradiction, cache=copy.deepcopy(first.cache), **options)
    assert torch.equal(model.generate(turn, attention_mask=mask, cache=first.cache, **options), expected)


def test_a_prompt_that_was_read_whole_is_refused():
    """Nothing is left to generate from; the prompt must not be read a second time behind itself."""
    model, prompt = make_model(), make_tokens(1, 8)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).cache
    for columns in (8, 3):
        with pytest.raises(ValueError, match=rf"has read 8 tokens and the prompt has {columns}: pass all"):
            model.generate(prompt[:, :columns], cache=cache, **GREEDY)
    embeds = model.get_input_embeddings()(prompt).detach()
    with pytest.raises(ValueError, match="has read 8 tokens and the prompt has 8"):
        model.generate(inputs_embeds=embeds, cache=cache, **GREEDY)
    # What was read and one token more, or new tokens alone behind a mask of all.
    longer = torch.cat([prompt, make_tokens(1, 1, seed=5)], dim=1)
    expected = continue_greedily(model, longer)
    kept = copy.deepcopy(cache)
    assert torch.equal(model.generate(longer, cache=cache, **GREEDY), expected)
    new_only = model.generate(longer[:, 8:], attention_mask=torch.ones(1, 9), cache=kept, **GREEDY)
    assert torch.equal(new_only[:, 1:], expected[:, 9:])


def test_samples_can_be_drawn_while_training_under_checkpointing():
    model, prompt = make_model(), make_tokens(2, 6)
    expected = model.generate(prompt, **GREEDY)
    enable_checkpointing(model.train())
    assert torch.equal(model.generate(prompt, **GREEDY), expected)
    out = model(prompt, labels=prompt, use_cache=True)
    out.loss.backward()
    assert out.cache is None


def test_what_generation_cannot_do_is_refused():
    model, prompt = make_model(), make_tokens(1, 5)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(prompt, assistant_model=model, max_new_tokens=3)
    with pytest.raises(ValueError, match="temprature"):
        model.generate(prompt, temprature=0.5, max_new_tokens=3)
