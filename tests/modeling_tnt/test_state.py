"""`TNTState` as an object: copies, rows, parts that are reset, and what `generate` does with it."""

import copy

import pytest
import torch
from model_cases import assert_same_states, make_model, make_tokens, state_tensors
from transformers import DynamicCache

from modeling_tnt import TNTState
from modeling_tnt.cache import memory_cache_layers

CLOSE = {"rtol": 1e-7, "atol": 1e-8}  # float64: the same sums in another order
EQUAL = {"rtol": 0, "atol": 0}
GREEDY = {"do_sample": False, "max_new_tokens": 8}
NEVER_RESET = {"local_shard_lengths": None}  # so that a reset of ours is not that of a shard
BESIDE = {  # a layer of memories, alone and with attention
    "alone": {"num_hidden_layers": 1},
    "layer": {"num_hidden_layers": 1, "memory_as": "layer", "sliding_window": 5, "num_persistent_tokens": 1},
    "gate": {"num_hidden_layers": 1, "memory_as": "gate", "sliding_window": 5},
    "context": {"num_hidden_layers": 1, "memory_as": "context"},
    "before": {"layer_types": ["sliding_attention", "memory"], "sliding_window": 5},
}


@pytest.fixture(params=["mlp-momentum-forget", "hybrid-windows", "titans-mal", "titans-mag", "titans-mac"])
def read_each(request):
    """As `read`, of several variants, attention among them: beyond every window, and in mid-segment."""
    model = make_model(request.param)
    return model, model.memorize(make_tokens(1, 13), progress=False)


def whole(prompts: torch.Tensor) -> torch.Tensor:
    """The document of `read` in front of each prompt."""
    return torch.cat([make_tokens(1, 13).expand(len(prompts), -1), prompts], dim=1)


@torch.no_grad()
def test_a_clone_is_independent(read_each):
    """Of one that reads several tokens, and of one that decodes in place."""
    model, state = read_each
    kept = copy.deepcopy(state)
    for prompt in (make_tokens(1, 4), make_tokens(1, 1)):
        cloned = state.clone()
        model.generate(prompt, cache=cloned, **GREEDY)
        assert cloned.tokens_read.item() > 13 and cloned.get_seq_length() > 0 and state.get_seq_length() == 0
        assert_same_states(state, kept, **EQUAL)
    after_decoding = cloned.clone()
    assert_same_states(after_decoding, cloned, **EQUAL)
    model(make_tokens(1, 1), cache=cloned)
    model(make_tokens(1, 1), cache=after_decoding)
    assert_same_states(after_decoding, cloned, **CLOSE)


@torch.no_grad()
def test_repeat_makes_rows_that_go_their_own_way(read_each):
    model, state = read_each
    prompts = make_tokens(3, 4, seed=2)
    repeated = state.repeat(3)
    assert (state.batch_size, repeated.batch_size, repeated.tokens_read.tolist()) == (1, 3, [13] * 3)
    out = model(prompts, cache=repeated)
    torch.testing.assert_close(out.logits, model(whole(prompts)).logits[:, 13:], **CLOSE)
    rows = model.memorize([[1, 2], [3]], progress=False).repeat(2)
    assert rows.tokens_read.tolist() == [2, 2, 1, 1]
    rows.batch_select_indices(torch.tensor([2, 0]))
    assert rows.tokens_read.tolist() == [1, 2]
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="repeats must be an int of at least 1"):
            state.repeat(wrong)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("options", [{"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2}, {}], ids=str)
def test_generate_spreads_a_state_of_one_row(read_each, options, prompts):
    model, state = read_each
    ids, kept = make_tokens(prompts, 4, seed=2), state.clone()
    out = model.generate(ids, cache=state, **GREEDY, **options)
    expected = model.generate(whole(ids), use_cache=False, **GREEDY, **options)
    assert torch.equal(out, expected[:, 13:])
    if prompts > 1 or options:
        assert_same_states(state, kept, **EQUAL)
        assert state.get_seq_length() == 0
    else:
        assert state.get_seq_length() == 11


def test_generate_samples_several_sequences_behind_a_state(read_each):
    model, state = read_each
    ids, outs = make_tokens(2, 4, seed=2), []
    several = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    for prompt, cache in ((ids, state), (ids, state.repeat(2)), (ids, state.repeat(6)), (whole(ids), None)):
        torch.manual_seed(3)
        given = {} if cache is None else {"cache": cache}
        outs.append(model.generate(prompt, use_cache=cache is not None, **given, **several)[:, -6:])
    assert len(outs[0].unique(dim=0)) > 2
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_generate_refuses_rows_that_fit_no_prompt(read_each):
    model, state = read_each
    with pytest.raises(ValueError, match=r"holds 2 rows but the batch has 3; .*repeat\(n\)"):
        model.generate(make_tokens(3, 2), cache=state.repeat(2), **GREEDY)


@pytest.mark.parametrize("attention", BESIDE)
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_a_local_reset_is_a_fresh_local_memory_beside_the_old_global_one(tokens, attention):
    """The reference: a model whose global memory starts at what it had learned, which reads only the new tokens."""
    config = {"global_chunk_size": 4, **NEVER_RESET, **BESIDE[attention]}
    model, more = make_model(**config), make_tokens(1, tokens, seed=2)
    state = model.memorize(make_tokens(1, 8), progress=False)  # whole chunks: the global memory stands at a boundary
    learned = memory_cache_layers(state)[0].memories["global"].weights
    state.reset_local()
    layer = memory_cache_layers(state)[0]
    assert state.tokens_read.tolist() == [8] and list(layer.memories) == ["global"]
    assert layer.conv_tail is None and state.nbytes == layer.memories["global"].nbytes
    reference = make_model(**config)
    start = next(iter(reference.memory_layers().values())).global_memory
    for name in start.weight_names:
        getattr(start, name).copy_(getattr(learned, name)[0])
    logits = [model(more, cache=state).logits]  # several tokens, or one in place
    logits += [model(make_tokens(1, 1, seed=3), cache=state).logits]
    expected = reference(torch.cat([more, make_tokens(1, 1, seed=3)], dim=1)).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, **CLOSE)
    assert (expected[:, :tokens] - model(more).logits).abs().max() > 1e-3, "the global memory made no difference"
    positions = {name: s.position.item() for name, s in layer.memories.items()}
    assert positions == {"global": 9 + tokens, "local0": 1 + tokens}


@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_a_local_reset_hides_what_was_read_of_a_segment(tokens):
    """Whatever stands in its first places, until the next segment begins; and these places are not shown as zeros."""
    model, more = make_model("titans-mac", **NEVER_RESET), make_tokens(2, tokens, seed=2)
    state = model.memorize([make_tokens(13).tolist(), make_tokens(6).tolist()], progress=False)
    state.reset_local()
    other = state.clone()
    for layer in other.layers:
        layer.segment = torch.randn(4, 2, 2, 8, 16, dtype=torch.float64)
    shown = other.clone()
    for layer in shown.layers:
        layer.forgotten = 0
    logits, same, moved = (model(more, cache=one).logits for one in (state, other, shown))
    torch.testing.assert_close(same, logits, **CLOSE)
    assert (moved - logits).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("attention", BESIDE)
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_a_global_reset_keeps_the_local_memories(tokens, attention):
    model, more = make_model(**NEVER_RESET, **BESIDE[attention]), make_tokens(1, tokens, seed=2)
    state = model.memorize(make_tokens(1, 13), progress=False)
    kept = {name: t for name, t in state_tensors(state).items() if "global" not in name}
    state.reset_global()
    assert state.tokens_read.tolist() == [13]
    assert state_tensors(state).keys() == kept.keys()
    assert all(torch.equal(t, kept[name]) for name, t in state_tensors(state).items())
    # The reference: the states by hand, with the global memory's as in an empty cache.
    by_hand = state.clone()
    fresh = model.memorize([1], progress=False)
    layers = zip(memory_cache_layers(by_hand), model.memory_layers().values(), memory_cache_layers(fresh), strict=True)
    for layer, memory, started in layers:
        weights = memory.global_memory.params.fast_weights.map(lambda t: t.detach()[None].clone())
        initial = started.memories["global"]._replace(
            weights=weights, anchor=weights, position=torch.zeros(1, dtype=torch.int64)
        )
        layer.memories = {"global": initial} | layer.memories
    out = model(more, cache=state)
    torch.testing.assert_close(out.logits, model(more, cache=by_hand).logits, **CLOSE)
    assert_same_states(state, by_hand, **CLOSE)


@pytest.mark.parametrize("variant", ["mlp-token-scale", "global-only"])
@torch.no_grad()
def test_resetting_all_there_is_forgets_everything(variant):
    model, tokens = make_model(variant), make_tokens(2, 5)
    state = model.memorize(make_tokens(1, 9), progress=False)
    state.reset_local() if variant == "mlp-token-scale" else state.reset_global()
    assert not state.is_initialized and state.tokens_read.tolist() == [] and state.nbytes == 0
    assert torch.equal(model(tokens, cache=state).logits, model(tokens).logits)
    state.reset()
    assert repr(state) == "TNTState(nothing read, 2 layers)" and state.get_seq_length() == 0


def test_a_reset_in_a_conversation_keeps_its_columns(read):
    model, state = read
    said = model.generate(make_tokens(1, 4), cache=state, **GREEDY)
    state.reset_local()
    assert state.get_seq_length() == 11
    model.generate(said, cache=state, **GREEDY)  # one new column, read behind the global memory alone
    assert state.layers[0].memories["local0"].position.item() == 8


@torch.no_grad()
def test_a_reset_of_memories_that_are_written_in_place(read, tmp_path):
    """Those of one token: what is left must be filled into the buffers of all."""
    model, state = read
    layer, memory = state.layers[0], model.model.layers[0].memory
    names, x = list(memory.memories()), torch.zeros(1, 1, 32, dtype=torch.float64)
    params = [one.params for one in memory.memories().values()]
    for _ in range(2):
        layer.stack_memories(names, lambda: memory._initial_states(x, params), layer.conv_tail, layer.signature)
        layer.forget(["local0"], recent=False)
    assert layer.memories["global"].position.tolist() == [13]
    layer.stack_memories(names, lambda: memory._initial_states(x, params), layer.conv_tail, layer.signature)
    state.layers[1] = layer
    state.save_pretrained(tmp_path)  # views of buffers, with strides of their own
    assert_same_states(model.load_memory(tmp_path), state, **EQUAL)
    assert [state.position.tolist() for state in layer.memories.values()] == [[13], [0]]


@torch.no_grad()
def test_any_cache_becomes_a_state(read):
    model, _ = read
    cache = model(make_tokens(2, 7), use_cache=True).cache
    state = TNTState.from_cache(cache, model.config)
    assert_same_states(state, cache, **EQUAL)
    assert state.get_seq_length() == 7
    model(make_tokens(2, 3), cache=state)
    assert cache.get_seq_length() == 7 and cache.layers[0].memories["local0"].position.tolist() == [7, 7]
    with pytest.raises(ValueError, match="cache must be that of a TNT model with 2 layers"):
        TNTState.from_cache(DynamicCache(), model.config)


def test_bytes_device_and_representation(read):
    _, state = read
    assert state.nbytes == sum(t.nbytes for t in state_tensors(state).values())
    assert "tokens_read=[13], columns=0, 2 layers of global, local0" in repr(state) and "on cpu" in repr(state)
    assert state.to("meta") is state
    assert {t.device.type for t in state_tensors(state).values()} == {"meta"}
