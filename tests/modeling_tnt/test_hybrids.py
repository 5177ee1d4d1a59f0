"""Attention layers among memory layers: they are transformers' own, and the model stays what it was around them."""

from __future__ import annotations

import pytest
import torch
from model_cases import HYBRIDS, SMALL, VOCAB, make_model, make_tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTState, detach_cache
from modeling_tnt.attention import plan_attention
from modeling_tnt.cache import TNTCacheLayer, memory_cache_layers
from modeling_tnt.compat import cache_of, named_cache
from modeling_tnt.kernels.memories.kinds import memory_kind

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SLIDING = {"num_hidden_layers": 2, "layer_types": ["memory", "sliding_attention"], "sliding_window": 6}


def make_llama(model: TNTForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama with the weights of a model of attention layers alone."""
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
            intermediate_size=c.intermediate_size, rms_norm_eps=c.rms_norm_eps, rope_parameters=c.rope_parameters,
        )
    ).to(model.dtype).eval()  # fmt: skip
    renamed = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize("rope", [
    None, {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
], ids=["default", "theta", "linear"])  # fmt: skip
@torch.no_grad()
def test_attention_layers_alone_are_llama(rope):
    """Logits of whole and padded reads, and generated tokens; float32, the same operations on logits of 0.1: 1e-6."""
    torch.manual_seed(0)
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    config = TNTConfig(**SMALL | {"initializer_range": 0.02}, layer_types=["full_attention"] * 2, **attention)
    model = TNTForCausalLM(config).eval()
    llama, tokens, mask = make_llama(model), make_tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    torch.testing.assert_close(model(tokens).logits, llama(tokens).logits, rtol=1e-6, atol=1e-6)
    ours, theirs = (m(tokens, attention_mask=mask).logits[mask == 1] for m in (model, llama))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    assert torch.equal(model.generate(tokens, **greedy), llama.generate(tokens, **greedy))


@pytest.mark.parametrize("variant", ["hybrid-full", "hybrid-sliding"])
@torch.no_grad()
def test_implementations_agree(variant):
    """Whole, padded and packed. transformers' eager attention takes its softmax in float32: 1e-6."""
    tokens, mask = make_tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :5] = 0
    ways = [{}, {"attention_mask": mask}, {"position_ids": torch.cat([torch.arange(8), torch.arange(11)])[None]}]
    ways.append(ways[1] | ways[2])
    model = make_model(variant)
    for given in ways:
        logits = {}
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            logits[name] = model(tokens, use_cache=False, **given).logits[given.get("attention_mask", tokens) != 0]
        torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["hybrid-windows", "titans-mal", "titans-mag", "titans-mac"])
@torch.no_grad()
def test_implementations_agree_behind_a_state(variant):
    """Rows of different lengths, a padded prompt and single tokens."""
    model, logits = make_model(variant), []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        state = model.memorize([make_tokens(13).tolist(), [1]], progress=False)
        prompt = padded_prompts()
        read = [model(**prompt, cache=state).logits[prompt["attention_mask"] == 1]]
        read += [model(make_tokens(2, 1, seed=s), cache=state).logits[:, 0] for s in (3, 4)]
        logits.append(torch.cat(read))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_sees_its_window_alone():
    """Without memories between them, two layers of a window of 6 see 10 tokens back."""
    model = make_model(num_hidden_layers=2, layer_types=["sliding_attention"] * 2, sliding_window=6)
    tokens = make_tokens(1, 19)
    other = tokens.clone()
    other[0, 3] = other[0, 3] % (VOCAB - 1) + 1
    moved = (model(tokens).logits - model(other).logits).abs().amax(-1)[0]
    assert moved[13] > 1e-6 and moved[14:].max() < 1e-12


@torch.no_grad()
def test_a_cache_of_memories_and_windows_does_not_grow():
    model, sizes = make_model(**SLIDING), []
    for length in (40, 90):
        cache = DynamicCache(config=model.config)
        model(make_tokens(1, length), cache=cache)
        memory, window = cache.layers
        sizes.append((memory.nbytes, window.keys.shape, window.values.shape))
    assert sizes[0] == sizes[1] and sizes[0][1] == (1, 2, 5, 16)


@torch.no_grad()
def test_a_cache_that_is_read_and_not_wanted_stays_as_it_is():
    model, tokens = make_model("hybrid-sliding"), make_tokens(2, 12)
    cache = model(tokens[:, :7], use_cache=True).cache
    first, second = (model(tokens[:, 7:], cache=cache, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second) and cache.get_seq_length() == 7


@torch.no_grad()
def test_beams_and_rows_of_one_cache():
    """`generate` repeats the cache of one row for several prompts and beams: keys, values and memories."""
    model, prompt = make_model("hybrid-full"), make_tokens(1, 9)
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    cache = model(prompt[:, :-1], use_cache=True).cache
    assert torch.equal(model.generate(prompt, **named_cache(cache), **options), expected)


def test_detached_caches_end_gradients():
    model, tokens = make_model("hybrid-full"), make_tokens(1, 12)
    cache = detach_cache(model(tokens[:, :7], use_cache=True).cache)
    assert not cache.layers[1].keys.requires_grad and not cache.layers[0].memories["global"].weights.w1.requires_grad
    whole, cut = model(tokens).logits[:, 7:], model(tokens[:, 7:], cache=cache).logits
    torch.testing.assert_close(cut, whole, **EXACT)
    cut.sum().backward()


def check_gradients(model: TNTForCausalLM) -> None:
    """Every parameter's, against finite differences of the loss in float64 along a random direction."""
    tokens, parameters = make_tokens(2, 13), dict(model.named_parameters())

    def loss() -> torch.Tensor:
        return model(tokens, use_cache=False).logits.square().mean()

    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = loss()
            parameter.add_(direction, alpha=-2e-6)
            slope = (above - loss()) / 2e-6
            parameter.add_(direction, alpha=1e-6)
        found = (gradient * direction).sum()
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_of_a_hybrid():
    check_gradients(make_model("hybrid-sliding").train())


def test_what_a_hybrid_cannot_do_is_said():
    model, tokens = make_model("hybrid-full"), make_tokens(1, 9)
    for attempt in (lambda: TNTState(model.config), lambda: model.memorize(tokens, progress=False)):
        with pytest.raises(
            ValueError, match="TNTState is of constant size, .*full_attention, whose keys grow with what is"
        ):
            attempt()
    with pytest.raises(ValueError, match="layer_types=.* has attention, .* train this one with data parallelism"):
        model.enable_context_parallel(None)
    cache = cache_of(model(tokens, use_cache=True))
    with pytest.raises(ValueError, match="attention_mask has 2 columns and 9 tokens are in the cache"):
        model(tokens[:, :2], attention_mask=torch.ones(1, 2), cache=cache)
    with pytest.raises(ValueError, match="1 TNT cache layers among those of attention"):
        model(tokens, cache=make_model()(tokens, use_cache=True).cache)
    model.config._attn_implementation = "flash_attention_2"
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
    with pytest.raises(ValueError, match="keeps packed sequences apart in a single row .* got 2 rows"):
        model(tokens.expand(2, -1), position_ids=positions)


# ---------------------------------------------------------------------------------------------------- Titans' variants


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary positions of a head's vector, pairs (i, i + D/2), base 10000."""
    half = x.shape[-1] // 2
    angles = position / 10000.0 ** (torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def attend(attention, queries: torch.Tensor, others: list[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
    """Softmax attention, token by token and head by head: query t of [n, hidden] at position t sees the persistent
    tokens and, of each of `others`, the vectors [m, hidden] at positions, those that are at most t."""
    D, heads, out = attention.head_dim, attention.config.num_attention_heads, []
    shared = heads // attention.config.num_key_value_heads
    for t, query in enumerate(queries):
        parts = []
        for head in range(heads):
            rows = slice(head * D, (head + 1) * D)
            pair = slice(head // shared * D, (head // shared + 1) * D)
            keys = [attention.k_proj(p)[pair] for p in attention.persistent.weight]
            values = [attention.v_proj(p)[pair] for p in attention.persistent.weight]
            for vectors, positions in others:
                for vector, position in zip(vectors, positions, strict=True):
                    if position <= t:
                        keys.append(turn(attention.k_proj(vector)[pair], position))
                        values.append(attention.v_proj(vector)[pair])
            q, nowhere = attention.q_proj(query)[rows], len(attention.persistent.weight)
            scores = torch.cat([torch.stack(keys[:nowhere]) @ q, torch.stack(keys[nowhere:]) @ turn(q, t)]) / D**0.5
            parts.append(scores.softmax(0) @ torch.stack(values))
        joined = torch.cat(parts)
        out.append(joined if attention.o_proj is None else attention.o_proj(joined))
    return torch.stack(out)


def recall(layer, weights, x: torch.Tensor) -> torch.Tensor:
    """f(V, q) of each token's own query, and the layer's norm and projection."""
    params, heads = layer.global_memory.params, []
    for token in x:
        q = torch.nn.functional.silu(layer.q_proj(token)).unflatten(-1, layer.head_shape)
        q = torch.nn.functional.normalize(q, dim=-1)

        def linear(inputs, weight, bias):
            return torch.einsum("hd,hdm->hm", inputs, weight) + (0 if bias is None else bias)

        y = memory_kind(layer.config.memory_type).forward(weights, q, linear)
        h = q + torch.nn.functional.layer_norm(y, y.shape[-1:], eps=1e-6) * params.norm_weight + params.norm_bias
        heads.append(layer.norm(h).flatten())
    return layer.o_proj(torch.stack(heads))


@torch.no_grad()
def test_memory_as_a_context_by_its_equations():
    """One row of three segments, the last one unfinished: the paper's three lines, written out."""
    block = make_model("titans-mac").model.layers[0]
    model = make_model("titans-mac").model
    x, C = torch.randn(19, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), 8
    outputs = []
    for begin in range(0, 19, C):
        tokens = x[begin : begin + C]
        weights = block.memory.global_memory.params.fast_weights
        if outputs:
            cache = TNTCacheLayer()
            block.memory(torch.cat(outputs)[None], None, cache, True)
            weights = cache.memories["global"].weights.map(lambda t: t[0])
        h = recall(block.memory, weights, tokens)
        places = list(range(len(tokens)))
        outputs.append(attend(block.self_attn, tokens, [(h, places), (tokens, places)]))
    y, join = torch.cat(outputs), block.as_context
    m = block.memory(y[None])[0]
    expected = join.o_proj(join.attention_norm(y) * torch.sigmoid(join.memory_norm(m)))
    got = join(x[None], block.memory, block.self_attn, model.rotary_emb, None, None, False, None)[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # rotary frequencies are float32


@pytest.mark.parametrize("memory_as", ["layer", "gate"])
@torch.no_grad()
def test_memory_as_a_layer_and_as_a_gate_by_their_equations(memory_as):
    """All within one window: the block is its norms, memories and attention in the order of the paper."""
    variant = {"layer": "titans-mal", "gate": "titans-mag"}[memory_as]
    model = make_model(variant, sliding_window=30).model
    block, places = model.layers[0], list(range(13))
    hidden = torch.randn(13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = block.input_norm(hidden)
    if memory_as == "layer":
        said = block.memory_norm(block.memory(x[None])[0])
        mixed = attend(block.self_attn, said, [(said, places)])
    else:
        y = attend(block.self_attn, x, [(x, places)])
        m = block.memory.mix(x[None])[0]
        mixed = block.memory.o_proj(block.attention_norm(y) * torch.sigmoid(block.memory_norm(m)))
    expected = hidden + mixed
    expected = expected + block.mlp(block.mlp_norm(expected))
    plan = plan_attention(
        model.config, model.rotary_emb, hidden[None], attention_mask=None, position_ids=None, packing=None, cache=None
    )
    got = block(hidden[None], attention=plan)[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["titans-mal", "titans-mag", "titans-mac", "titans-mac-global"])
def test_gradients_of_titans(variant):
    check_gradients(make_model(variant).train())


@pytest.mark.parametrize("variant", ["titans-mal", "titans-mag"])
@torch.no_grad()
def test_persistent_tokens_are_at_no_position(variant):
    """As far into a text as one may be: the same logits where windows have counted 100,000 tokens more."""
    model, tokens = make_model(variant), make_tokens(1, 24)
    near = model(tokens[:, :12], use_cache=True).cache
    far = model(tokens[:, :12], use_cache=True).cache
    keys_at = model.model.rotary_emb(near.layers[0].window.keys, torch.arange(8, 12)[None])
    keys_to = model.model.rotary_emb(near.layers[0].window.keys, torch.arange(100_008, 100_012)[None])
    for layer in far.layers:
        layer.attended = 100_012
        layer.window.keys = apply_rotary_pos_emb(
            *[apply_rotary_pos_emb(layer.window.keys, layer.window.keys, keys_at[0], -keys_at[1])[0]] * 2, *keys_to
        )[0]
    want, got = (model(tokens[:, 12:], cache=cache).logits for cache in (near, far))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["titans-mal", "titans-mag", "titans-mac"])
@torch.no_grad()
def test_persistent_tokens_are_seen_from_anywhere(variant):
    """And are no positions: a row's logits depend on them at its end, far beyond the window or segment."""
    model, tokens = make_model(variant), make_tokens(1, 40)
    before = model(tokens).logits
    for block in model.model.layers:
        block.self_attn.persistent.weight.add_(1.0)
    assert (model(tokens).logits - before).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("variant", ["hybrid-windows", "titans-mal", "titans-mag"])
@torch.no_grad()
def test_windows_are_read_behind_millions_of_tokens(variant):
    """As at the beginning, but for angles that float64 rounds: 3e7 · 1e-16. Float32 has no odd number there."""
    model, logits = make_model(variant, num_persistent_tokens=0), []
    for read in (0, 30_000_001):
        state = TNTState(model.config)
        for layer in memory_cache_layers(state):
            layer.attended = read
        pieces = make_tokens(2, 9), make_tokens(2, 3, seed=2)
        logits.append(torch.cat([model(tokens, cache=state).logits for tokens in pieces], dim=1))
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- caches of all kinds

every_hybrid = pytest.mark.parametrize("variant", HYBRIDS)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}


def padded_prompts() -> dict[str, torch.Tensor]:
    """Two rows of 9 tokens, of which one begins with 4 of padding."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return {"input_ids": make_tokens(2, 9) * mask, "attention_mask": mask}


@every_hybrid
@pytest.mark.parametrize("implementation", ["static", "offloaded", "offloaded_static"])
def test_caches_that_generate_makes(variant, implementation):
    """Behind the window, too, and with the memories' layer first."""
    model, prompts = make_model(variant), padded_prompts()
    out = model.generate(**prompts, cache_implementation=implementation, **GREEDY)
    assert torch.equal(out, model.generate(**prompts, use_cache=False, **GREEDY))


@every_hybrid
def test_beams(variant):
    model, prompts = make_model(variant), padded_prompts()
    out = model.generate(**prompts, num_beams=3, **GREEDY)
    assert torch.equal(out, model.generate(**prompts, num_beams=3, use_cache=False, **GREEDY))


@every_hybrid
@torch.no_grad()
def test_tokens_cannot_be_taken_back(variant):
    model, prompts = make_model(variant), padded_prompts()
    for wanted in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": make_model(variant)}):
        with pytest.raises(ValueError, match="assisted generation is not supported|assistant_model must be a model"):
            model.generate(prompts["input_ids"][1:], **wanted, **GREEDY)
    cache = cache_of(model(**prompts, use_cache=True))
    with pytest.raises((ValueError, RuntimeError), match="cannot be cropped|does not track past states"):
        cache.crop(-1)


@torch.no_grad()
def test_a_cache_that_was_cropped_in_part_is_refused():
    """transformers crops layer by layer, and an attention layer in front of the first memory does not refuse it."""
    model = make_model(layer_types=["full_attention", "memory"])
    cache = cache_of(model(make_tokens(1, 9), use_cache=True))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="has read 7 tokens in a layer of attention and 9 in one of memories"):
        model(make_tokens(1, 1), cache=cache)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_gives_what_sdpa_gives():
    """Full and within a window, in float32, and compiled, which takes a minute: sums in another order."""
    config = make_model("hybrid-sliding", torch.float32).config
    models = [TNTForCausalLM._from_config(config, attn_implementation=name) for name in ("sdpa", "flex_attention")]
    models[1].load_state_dict(models[0].state_dict())
    tokens, mask = make_tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :4] = 0
    expected, got = (model.eval()(tokens, attention_mask=mask).logits for model in models)
    assert models[1].config._attn_implementation == "flex_attention" and expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
