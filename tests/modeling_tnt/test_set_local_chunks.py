"""`set_local_chunks`: the swap of stage 2 on a model that exists."""

import copy
import json

import pytest
import torch
from model_cases import make_model, make_tokens

from modeling_tnt import TNTForCausalLM, load_cache, save_cache

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64; the same sums in another order
TWO = "linear-plain-two-locals"  # chunks [2, 4], reset after [8, None] tokens


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize(
    "through_base_model, global_update", [(False, "gradient"), (True, "gradient"), (False, "muon")]
)
def test_equals_loading_with_the_new_chunks_and_is_saved(tmp_path, through_base_model, global_update):
    model, tokens = make_model(dtype=torch.float32, global_update=global_update), make_tokens(2, 13)
    model.save_pretrained(tmp_path / "before")
    before = logits(model, tokens)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    (model.model if through_base_model else model).set_local_chunks([1])
    after = logits(model, tokens)
    assert (after - before).abs().max() > 1e-3
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    loaded = TNTForCausalLM.from_pretrained(tmp_path / "before", local_chunk_sizes=[1])
    assert torch.equal(after, logits(loaded, tokens))
    model.save_pretrained(tmp_path / "after")
    saved = json.loads((tmp_path / "after" / "config.json").read_text())
    assert (saved["local_chunk_sizes"], saved["local_shard_lengths"]) == ([1], 8)
    assert torch.equal(after, logits(TNTForCausalLM.from_pretrained(tmp_path / "after"), tokens))


def test_all_parts_read_one_config():
    """Also in a copy: the swap of one model does not reach the other."""
    original = make_model()
    model = copy.deepcopy(original)
    assert model.model.config is model.config
    assert all(block.memory.config is model.config for block in model.model.layers)
    model.set_local_chunks([2])
    assert original.config.local_chunk_sizes == [4]


def test_shard_lengths_are_kept_unless_given():
    model = make_model(TWO)
    model.set_local_chunks([1, 2])
    assert (model.config.local_chunk_sizes, model.config.shard_lengths) == ([1, 2], [8, None])
    model.set_local_chunks((2, 2), 16)
    assert (model.config.local_chunk_sizes, model.config.shard_lengths) == ([2, 2], [16, 16])
    model.set_local_chunks([2, 3], (4, None))
    assert (model.config.local_chunk_sizes, model.config.shard_lengths) == ([2, 3], [4, None])
    single = make_model()
    single.set_local_chunks([4], [None])
    assert single.config.shard_lengths == [None], "a list with None: never reset"
    chunks = [8]
    single.set_local_chunks(chunks)
    chunks.append(1)
    assert single.config.local_chunk_sizes == [8]


def test_shard_lengths_reach_the_memories():
    model, tokens = make_model(), make_tokens(1, 16)
    before = logits(model, tokens)
    model.set_local_chunks([4], [None])
    after = logits(model, tokens)
    torch.testing.assert_close(after[:, :8], before[:, :8], **EXACT)  # no reset before token 8
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("variant", "arguments", "message"),
    [
        ("mlp", ([3],), r"local_chunk_sizes\[0\]=3 must divide local_shard_lengths=8; use 2 or 4"),
        ("mlp", ([2], [5]), r"local_chunk_sizes\[0\]=2 must divide local_shard_lengths\[0\]=5; use 1 or 5"),
        ("mlp", ([0],), r"local_chunk_sizes\[0\] must be an int of at least 1, got 0"),
        ("mlp", ([2], -8), r"local_shard_lengths must be an int of at least 1, or None, got -8"),
        ("mlp", ([2], [8, 8]), r"local_shard_lengths has 2 entries for the 1 of local_chunk_sizes; give one for each"),
        ("mlp", (2,), r"local_chunk_sizes must be a list with one int for each local memory, got 2; use \[2\]"),
        ("mlp", ([1, 2],), r"local_chunk_sizes=\[1, 2\] must have one entry for each of the model's 1 local memories"),
        ("mlp", ([],), r"local_chunk_sizes=\[\] must have one entry for each of the model's 1 local memories"),
        (TWO, ([1],), r"must have one entry for each of the model's 2 local memories: .*; give as many"),
        (TWO, ([3, 0], [8, 8]), r"2 problems:\n.*\[1\] must be an int of at least 1, got 0\n.*\[0\]=3 must divide"),
        ("global-only", ([4],), r"must have one entry for each of the model's 0 local memories"),
    ],
)
def test_what_cannot_work_is_refused_and_changes_nothing(variant, arguments, message):
    model = make_model(variant)
    before = model.config.to_dict()
    for method in (model.set_local_chunks, model.check_local_chunks):
        with pytest.raises(ValueError, match=message):
            method(*arguments)
        assert model.config.to_dict() == before


def test_a_check_changes_nothing():
    model = make_model()
    before = model.config.to_dict()
    model.check_local_chunks([2], [None])
    assert model.config.to_dict() == before


@torch.no_grad()
def test_a_cache_filled_before_the_swap_is_refused(tmp_path):
    model, tokens = make_model(), make_tokens(1, 10)
    cache = model(tokens, use_cache=True).cache
    save_cache(cache, tmp_path / "memory.safetensors")
    model.set_local_chunks([2])
    message = r"filled by a model with local_chunk_sizes=\[4\] \(now \[2\]\); use that configuration, or start"
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "memory.safetensors", model.config)
    model.set_local_chunks([4])
    model(tokens[:, :1], cache=cache)


@pytest.mark.slow
def test_a_compiled_model_follows():
    """A new graph for the new chunks, not the old one again."""
    model, tokens = make_model(), make_tokens(2, 11)
    compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled, tokens)
    model.set_local_chunks([2])
    after = logits(compiled, tokens)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, logits(model, tokens), **EXACT)


def test_chunks_must_divide_the_segment_of_a_memory_as_a_context():
    """16 divides the shard of 48 tokens, and segments of 24 tokens it does not."""
    model = make_model("titans-mac", local_chunk_sizes=[4], local_shard_lengths=48, global_chunk_size=24)
    with pytest.raises(ValueError, match=r"local_chunk_sizes\[0\]=16 must divide the segment .*use 12 or 24"):
        model.set_local_chunks([16])
    assert model.config.local_chunk_sizes == [4]
    model.set_local_chunks([12])
    assert model(make_tokens(1, 50)).logits.isfinite().all()
