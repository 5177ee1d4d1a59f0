"""The cache as an object: constant size, rows that can be moved, saved and loaded, and clear refusals."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from model_cases import VARIANTS, assert_same_states, make_model, make_tokens, state_tensors
from safetensors.torch import save_file
from transformers import DynamicCache

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTState, detach_cache, load_cache, save_cache
from modeling_tnt.cache import TNTCacheLayer

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64; the same operations on the same numbers in another batch


@pytest.fixture
def filled():
    """A model and its cache after 10 tokens of 3 rows: mid-chunk everywhere."""
    model = make_model("mlp-momentum-forget")
    with torch.no_grad():
        return model, model(make_tokens(3, 10), use_cache=True).cache


@torch.no_grad()
def test_bytes_do_not_depend_on_the_number_of_tokens():
    """100,000 tokens through one small layer, compared with 1,000."""
    config = TNTConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_heads=1, head_dim=8, intermediate_size=8,
        memory_expansion=1, global_chunk_size=1000, local_chunk_sizes=[500], local_shard_lengths=1000,
    )  # fmt: skip
    model = TNTForCausalLM(config).eval()
    tokens = torch.randint(0, 8, (1, 100_000))
    cache = model(tokens[:, :1000], use_cache=True, logits_to_keep=1).cache
    before, size = cache.layers[0].nbytes, sum(t.nbytes for t in state_tensors(cache).values())
    model(tokens[:, 1000:], cache=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 100_000
    assert cache.layers[0].memories["local0"].position.tolist() == [100_000]
    assert cache.layers[0].nbytes == before == size == sum(t.nbytes for t in state_tensors(cache).values())
    assert all(t.untyped_storage().nbytes() <= 2 * t.nbytes for t in state_tensors(cache).values()), "views keep more"


def test_dynamic_cache_is_built_of_our_layers():
    cache = DynamicCache(config=make_model().config)
    assert [type(layer) for layer in cache.layers] == [TNTCacheLayer] * 2
    assert (cache.get_seq_length(), cache.batch_size, cache.get_max_length()) == (0, -1, -1)
    assert not cache.is_croppable and not cache.is_compileable


@torch.no_grad()
def test_rows_can_be_selected_repeated_and_reordered(filled):
    model, cache = filled
    expected = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.reorder_cache(torch.tensor([4, 1, 1, 5, 0, 2]))
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    rows = [2, 0, 0]
    for name, tensor in state_tensors(cache).items():
        assert torch.equal(tensor, state_tensors(expected)[name][rows])
    cache.batch_select_indices(torch.tensor([True, False, False]))
    more = make_tokens(3, 5, seed=2)
    out = model(more[2:], cache=cache)
    torch.testing.assert_close(out.logits, model(more, cache=expected).logits[2:], **EXACT)


@torch.no_grad()
def test_reset_starts_anew(filled):
    model, cache = filled
    cache.reset()
    assert cache.get_seq_length() == 0
    tokens = make_tokens(2, 7)  # another batch size than before
    out = model(tokens, cache=cache)
    fresh = model(tokens, use_cache=True)
    assert torch.equal(out.logits, fresh.logits)
    assert_same_states(cache, fresh.cache, rtol=0, atol=0)


@torch.no_grad()
def test_a_call_neither_changes_the_states_it_started_from_nor_reads_only_when_told(filled):
    model, cache = filled
    kept = {name: t.clone() for name, t in state_tensors(cache).items()}
    states = state_tensors(cache)
    more = make_tokens(3, 5, seed=2)
    read_only = model(more, cache=cache, use_cache=False)
    assert read_only.cache is None and cache.get_seq_length() == 10
    assert all(torch.equal(state_tensors(cache)[name], t) for name, t in kept.items())
    out = model(more, cache=cache)
    assert torch.equal(out.logits, read_only.logits) and cache.get_seq_length() == 15
    assert all(torch.equal(states[name], t) for name, t in kept.items()), "a state was written in place"


def test_offload_and_prefetch_keep_the_states(filled):
    _, cache = filled
    expected = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same_states(cache, expected, rtol=0, atol=0)


def test_cropping_and_keys_are_refused(filled):
    _, cache = filled
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="memory states"):
        cache.update(torch.zeros(3, 2, 1, 16), torch.zeros(3, 2, 1, 16), 0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_saved_cache_continues_to_the_same_tokens(variant, tmp_path):
    model, prompt = make_model(variant), make_tokens(2, 10)
    path = tmp_path / "memory.safetensors"
    cache = model(prompt, use_cache=True).cache
    save_cache(cache, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = load_cache(path, model.config)
    assert_same_states(loaded, cache, rtol=0, atol=0)
    longer = torch.cat([prompt, make_tokens(2, 1, seed=3)], dim=1)
    expected = model.generate(longer, cache=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(longer, cache=loaded, max_new_tokens=6, do_sample=False), expected)
    assert torch.equal(model.generate(longer, max_new_tokens=6, do_sample=False), expected)


def test_files_that_do_not_fit_are_refused(filled, tmp_path):
    model, cache = filled
    path = tmp_path / "memory.safetensors"
    save_cache(cache, path)
    other = TNTConfig(**{**model.config.to_dict(), "local_chunk_sizes": [2]})
    with pytest.raises(ValueError, match=r"local_chunk_sizes=\[4\] \(now \[2\]\)"):
        load_cache(path, other)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no TNT cache"):
        load_cache(tmp_path / "other.safetensors", model.config)
    with pytest.raises(OSError):
        load_cache(tmp_path / "missing.safetensors", model.config)
    with pytest.raises(ValueError, match="filled cache"):
        save_cache(DynamicCache(config=model.config), path)


def test_an_interrupted_save_keeps_the_previous_file(filled, tmp_path, monkeypatch):
    model, cache = filled
    path = tmp_path / "memory.safetensors"
    save_cache(cache, path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modeling_tnt.cache_file.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_cache(cache, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused(filled):
    model, cache = filled
    tokens = make_tokens(3, 2)
    with pytest.raises(ValueError, match="holds 3 rows but the batch has 2"):
        model(tokens[:2], cache=cache)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(tokens, cache=DynamicCache())
    with pytest.raises(ValueError, match=r"cache \(past_key_values\) must hold 2 TNT cache layers"):
        model(tokens, cache=((torch.zeros(1),),))
    with pytest.raises(ValueError, match="must hold 3 TNT cache layers"):
        make_model(num_hidden_layers=3)(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"use_momentum=True \(now False\)"):
        make_model("mlp")(tokens, cache=cache)
    with pytest.raises(ValueError, match="cannot continue a filled cache"):
        model(tokens, cache=cache, position_ids=torch.tensor([[0, 0]]))


@pytest.mark.parametrize("several", [False, True], ids=["in place", "several tokens"])
@torch.no_grad()
def test_copies_of_every_kind_go_on_alone(several):
    """pickle, as stores do; ForkingPickler, as queues between processes do: its receivers must not share a state."""
    model, tokens = make_model("mlp-momentum-forget"), make_tokens(2, 24)
    state = TNTState.from_cache(model(tokens[:, :10], use_cache=True).cache, model.config)
    for t in range(10, 13):
        model(tokens[:, t : t + 1], cache=state)  # now the memories are views of one buffer
    expected = model(tokens).logits[:, 13:]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(state)), copy.deepcopy(state), copy.copy(state.clone()), state]
    copies += [pickle.loads(ForkingPickler.dumps(state)) for _ in range(2)]
    copies.append(torch.load(buffer, weights_only=False))
    for one in copies:
        assert one.get_seq_length() == 13 and type(one) is TNTState
        pieces = [tokens[:, 13:]] if several else tokens[:, 13:].split(1, dim=1)
        logits = torch.cat([model(piece, cache=one).logits for piece in pieces], dim=1)
        torch.testing.assert_close(logits, expected, **EXACT)


@torch.no_grad()
def test_a_crop_of_nothing_changes_nothing(filled):
    _, cache = filled
    expected = copy.deepcopy(cache)
    cache.crop(0)
    assert_same_states(cache, expected, rtol=0, atol=0)
    DynamicCache(config=make_model().config).crop(-3)  # nothing was read


def test_a_detached_cache_ends_the_gradient():
    """Truncated back-propagation: the gradient of a piece is that of a state that was read without gradients."""
    model, tokens = make_model("mlp-momentum-forget").train(), make_tokens(2, 20)

    def gradients(cache):
        model.zero_grad()
        model(tokens[:, 10:], labels=tokens[:, 10:], cache=cache, use_cache=True).loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    with torch.no_grad():
        read_without = model(tokens[:, :10], use_cache=True).cache
    expected = gradients(read_without)
    first = model(tokens[:, :10], labels=tokens[:, :10], use_cache=True)
    state = TNTState.from_cache(first.cache, model.config)
    first.loss.backward()
    for cut in (detach_cache(first.cache), state.detach()):
        assert all(not t.requires_grad for t in state_tensors(cut).values())
        for ours, theirs in zip(gradients(cut), expected, strict=True):
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    assert any(t.requires_grad for t in state_tensors(first.cache).values()), "the cache itself is left as it was"


@torch.no_grad()
def test_a_mask_that_contradicts_what_was_read_is_refused():
    model, tokens = make_model(), make_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache = model(tokens[:, :8], attention_mask=mask[:, :8], use_cache=True).cache
    for wrong, message in ((torch.ones_like(mask), "shows 8 tokens among the 8 columns"), (mask * 0, "shows 0 tokens")):
        with pytest.raises(ValueError, match=message):
            model(tokens[:, 8:], attention_mask=wrong, cache=cache)
    expected = model(tokens, attention_mask=mask).logits
    state = TNTState.from_cache(cache, model.config)
    torch.testing.assert_close(model(tokens[:, 8:], attention_mask=mask, cache=cache).logits, expected[:, 8:], **EXACT)
    # Behind a start of the prompt columns count anew, also in a file, and after a reset nothing is known.
    state.start_prompt()
    model(tokens[:, 8:10], attention_mask=mask[:, 8:10], cache=state)
    with pytest.raises(ValueError, match="shows 0 tokens among the 2 columns that the cache has read of row 0"):
        model(tokens[:, 10:], attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), cache=state)
    state.reset_local()
    model(tokens[:, 10:], attention_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), cache=state)


def test_keys_and_values_are_told_from_memories():
    model, cache = make_model(), DynamicCache()
    for i in range(2):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), i)
    with pytest.raises(ValueError, match="as prefix tuning makes them"):
        model(make_tokens(1, 4), cache=cache)
