"""The models as transformers models: loss, loading, precision, compilation, and clear refusals."""

import inspect

import pytest
import torch
from model_cases import HYBRIDS, MEMORIES_ALONE, VARIANTS, VOCAB, make_model, make_tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTModel, health
from modeling_tnt.health import memory_health
from modeling_tnt.kernels import local_memory
from modeling_tnt.kernels.memories.kinds import memory_kind

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64; the same sums in another order


def test_auto_classes_know_the_model(tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TNTConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is TNTModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is TNTForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config)) is TNTForCausalLM


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_saved_and_loaded(variant, tmp_path):
    model, tokens = make_model(variant, torch.float32), make_tokens(2, 13)
    model.save_pretrained(tmp_path)
    loaded, info = TNTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Weights at other addresses may be multiplied in another order: some roundings of float32.
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@torch.no_grad()
def test_chunk_sizes_may_be_changed_on_loading_and_afterwards(tmp_path):
    model, tokens = make_model(dtype=torch.float32), make_tokens(2, 13)
    model.save_pretrained(tmp_path)
    loaded, info = TNTForCausalLM.from_pretrained(tmp_path, local_chunk_sizes=[1], output_loading_info=True)
    assert loaded.config.local_chunk_sizes == [1]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (loaded(tokens).logits - model(tokens).logits).abs().max() > 1e-3
    model.config.local_chunk_sizes = [1]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    model.config.local_chunk_sizes = [1, 2]
    with pytest.raises(ValueError, match="one entry for each of the model's 1 local memories"):
        model(tokens)


def test_no_shape_depends_on_a_chunk_size_or_shard_length():
    def shapes(**sizes):
        config = TNTConfig(**{**make_model("mlp-token-scale").config.to_dict(), **sizes})
        return {name: p.shape for name, p in TNTForCausalLM(config).named_parameters()}

    assert shapes() == shapes(local_chunk_sizes=[16], local_shard_lengths=64)


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    """Loading makes the model on the meta device: every parameter must come from the file or from `_init_weights`."""
    plain = make_model("mlp", torch.float32)
    plain.save_pretrained(tmp_path)
    loaded, info = TNTForCausalLM.from_pretrained(
        tmp_path, use_momentum=True, use_forget_gate=True, output_loading_info=True
    )
    assert {name.split(".")[-2] for name in info["missing_keys"]} == {"momentum_gate", "decay_gate"}
    for layer in loaded.model.layers:
        for memory in layer.memory.memories().values():
            assert torch.all(memory.decay_gate.bias == -6) and torch.all(memory.momentum_gate.bias == 0)
    own = dict(plain.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters() if name in own)
    assert not list(loaded.buffers()), "a buffer would come back as garbage unless it were saved"
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = TNTForCausalLM(make_model(variant).config)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    memory = TNTForCausalLM(TNTConfig(**{**plain.config.to_dict(), "head_dim": 64})).model.layers[0].memory
    assert abs(memory.local_memories[0].w1.std().item() - 64**-0.5) < 0.01  # 16,384 draws: a standard error of 0.0007


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    """In several chunks every gradient is there and not zero; in a single chunk it is at least there (DDP)."""
    model = make_model(variant).train()
    for length in (19, 3):
        model.zero_grad()
        tokens = make_tokens(2, length)
        model(tokens, labels=tokens).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        assert not missing
        zero = [name for name, p in model.named_parameters() if length == 19 and not p.grad.abs().max() > 0]
        assert not zero


def test_loss_counts_what_it_is_told():
    model, tokens = make_model(), make_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :5] = -100
    out = model(tokens, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.loss.float(), total / 12)  # 16 targets, of which 4 are masked
    summed = model(tokens, labels=labels, num_items_in_batch=torch.tensor(24)).loss
    torch.testing.assert_close(summed.float(), total / 24)


@torch.no_grad()
def test_outputs_that_were_asked_for():
    model, tokens = make_model(), make_tokens(2, 9)
    out = model(tokens, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert out.cache is not None and model(tokens, use_cache=False).cache is None
    assert model.train()(tokens).cache is None, "training does not pay for states"
    model.eval()
    # Exact but for the rounding of a smaller matrix product.
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:], **EXACT)
    kept = model(tokens, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(kept, out.logits[:, [0, 4]], **EXACT)
    embeds = model(inputs_embeds=model.get_input_embeddings()(tokens))
    assert torch.equal(embeds.logits, out.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], out.logits)
    assert torch.equal(model.model(tokens).last_hidden_state, out.hidden_states[-1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    tokens, mask = make_tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    gradients = []
    for checkpoint in (False, True):
        model = make_model("mlp-momentum-forget").train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert model(tokens, use_cache=True).cache is None, "as other models do, with a warning"
    with pytest.raises(ValueError, match="gradient checkpointing runs every block twice"):
        model(tokens, cache=DynamicCache(config=model.config))


@pytest.mark.parametrize("variant", ["mlp-momentum-forget", "linear"])
def test_bfloat16_and_autocast(variant):
    """Both stay near float32: 8 bits of mantissa, a few dozen roundings in a row, logits of size 1."""
    tokens = make_tokens(2, 19)
    full = make_model(variant, torch.float32, initializer_range=0.05)
    expected = full(tokens).logits
    half = make_model(variant, torch.bfloat16, initializer_range=0.05)
    out = half(tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    states = out.cache.layers[0].memories.values()
    assert {t.dtype for s in states for t in s.tensors().values()} == {torch.float32, torch.int64}
    with torch.autocast("cpu", torch.bfloat16):
        auto = full(tokens, labels=tokens)
    for logits in (out.logits, auto.logits):
        assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    (out.loss + auto.loss).backward()
    for model in (half, full):
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert half.generate(tokens, max_new_tokens=5, do_sample=False).shape == (2, 24)


def test_gates_are_computed_in_float32():
    memory = make_model("mlp-momentum-forget", torch.float32).model.layers[0].memory.local_memories[0]
    x = torch.randn(1, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = memory(x, 4).gates()
    for gate, expected in zip(inside, memory(x, 4).gates(), strict=True):
        assert gate.dtype == torch.float32 and torch.equal(gate, expected)


@pytest.mark.slow
def test_compiled_equals_eager():
    """Logits, gradients and a step on the cache. The backend is eager: what is tested is what dynamo captures."""
    model, tokens = make_model("mlp-momentum-forget"), make_tokens(2, 11)
    compiled = torch.compile(model, backend="aot_eager")
    parameters = list(model.parameters())
    results = []
    for run in (model, compiled):
        out = run(tokens, labels=tokens, use_cache=True)
        step = run(tokens[:, :1], cache=out.cache)
        results.append((out.logits, step.logits, torch.autograd.grad(out.loss, parameters)))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@torch.no_grad()
def test_lora_adapters_are_not_bypassed():
    peft = pytest.importorskip("peft")
    model, tokens = make_model(dtype=torch.float32), make_tokens(1, 9)
    before = model(tokens).logits
    names = ["q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "lr_gate", "gate_proj", "up_proj", "down_proj"]
    for name in names:
        config = peft.LoraConfig(target_modules=[name], r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(make_model(dtype=torch.float32), config)
        with torch.enable_grad():
            out = adapted(tokens, labels=tokens)
            out.loss.backward()
        assert (out.logits - before).abs().max() > 1e-4, f"{name}: the adapter does nothing"
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_wrong_inputs_are_refused():
    model, tokens = make_model(), make_tokens(2, 5)
    embeds = model.get_input_embeddings()(tokens)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, T\] with B ≥ 1 and T ≥ 1, got \(2, 0\)"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match=r"input_ids must have shape \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"inputs_embeds must have shape \[B, T, 32\]"):
        model(inputs_embeds=embeds[..., :31])
    with pytest.raises(TypeError, match="input_ids must be integers"):
        model(tokens.float())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(tokens, attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(tokens, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="position_ids must have shape"):
        model(tokens, position_ids=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="cu_seqlens needs all sequences in one row"):
        model(tokens, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens, 5"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 3, 4]))
    with pytest.raises(ValueError, match=r"integer tensor of shape \[N \+ 1\]"):
        model(tokens[:1], cu_seqlens=torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match="attention_mask must be all ones"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 2, 5]), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="cu_seqlens and cu_seq_lens_q must be equal"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 2, 5]), cu_seq_lens_q=torch.tensor([0, 3, 5]))
    with pytest.raises(ValueError, match="packed sequences in 1 rows leave no state per row"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 2, 5]), use_cache=True)
    with pytest.raises(ValueError, match="no attention weights"):
        model(tokens, output_attentions=True)
    with pytest.raises(TypeError, match="atention_mask"):
        model(tokens, atention_mask=torch.ones(2, 5))


def test_a_batch_of_nothing_but_padding_is_read_as_nothing():
    model = make_model()
    out = model(make_tokens(2, 3), attention_mask=torch.zeros(2, 3), use_cache=True)
    assert not out.logits.any() and out.cache.get_seq_length() == 3
    tokens = make_tokens(2, 4)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 4)], dim=1)
    later = model(tokens, attention_mask=mask, cache=out.cache)
    assert torch.equal(later.logits, model(tokens).logits)


def test_transformers_finds_the_arguments_it_needs():
    """No **kwargs that would swallow a typo, but every name that the Trainer, collators and `generate` pass."""
    parameters = inspect.signature(TNTForCausalLM.forward).parameters
    assert not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    needed = {"labels", "num_items_in_batch", "logits_to_keep", "position_ids", "seq_idx", "cu_seq_lens_q"}
    assert needed <= set(parameters) and TNTForCausalLM.accepts_loss_kwargs


@pytest.mark.parametrize("variant", MEMORIES_ALONE)
def test_health_reports_what_the_inner_loop_does(variant):
    """Against automatic differentiation of the inner loss with respect to the fast weights themselves."""
    model, tokens = make_model(variant, torch.float32).train(), make_tokens(2, 8)
    report = memory_health(model, tokens)
    assert model.training
    names = {"step_size", "inner_loss", "inner_grad_norm", "loss_before", "loss_after", "state_norm"}
    memories = [f"layer{i}/{m}" for i in range(2) for m in model.model.layers[0].memory.memories()]
    assert set(report) == {f"{m}/{n}" for m in memories for n in names}
    assert all(0 < value < 1e4 for value in report.values())

    layer = model.model.layers[0]
    x = layer.input_norm(model.model.embed_tokens(tokens)).detach()
    _, k, v, _ = layer.memory.project(x)
    name, memory = next(iter(layer.memory.memories().items()))
    weights = memory.params.fast_weights.map(lambda t: t.detach().requires_grad_())
    norms = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.einsum("hd,hdm->hm", x, weight) + (0 if bias is None else bias)

    for token_k, token_v in zip(k.detach().flatten(0, 1), v.detach().flatten(0, 1), strict=True):
        y = memory_kind(model.config.memory_type).forward(weights, token_k, linear)
        if memory.norm_weight is not None:
            y = token_k + torch.nn.functional.layer_norm(y, (16,), eps=1e-6) * memory.norm_weight + memory.norm_bias
        loss = 0.5 * (y - token_v).square().sum()
        gradients = torch.autograd.grad(loss, [t for t in weights if t is not None])
        norms.append(sum(g.detach().square().flatten(1).sum(1) for g in gradients).sqrt())
    # Float32 sums of a few hundred numbers.
    assert report[f"layer0/{name}/inner_grad_norm"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)


@pytest.mark.parametrize("variant", HYBRIDS)
def test_health_of_a_hybrid_looks_at_all_that_its_memories_read(variant, monkeypatch):
    """Also where a gate of attention asks a layer for less than its output, and a context for one segment of two."""
    model, tokens, looked = make_model(variant, torch.float32), make_tokens(2, 16), []
    look = health._look_at_memory
    monkeypatch.setattr(health, "_look_at_memory", lambda *given: looked.append(given[3].shape) or look(*given))
    report, layers = memory_health(model, tokens), model.memory_layers()
    assert {name.rpartition("/")[0] for name in report} == {
        f"layer{i}/{m}" for i in layers for m in layers[i].memories()
    }
    assert all(0 < value < 1e4 for value in report.values())
    assert set(looked) == {(2, 16, model.config.hidden_size)} and not any(
        "mix" in vars(layer) for layer in layers.values()
    )


def test_health_tells_the_loss_of_a_chunk_before_and_after_its_update():
    """With reset at the last chunk the weights before it are W_init; with no step they are W_init after it, too."""
    tokens = make_tokens(2, 16)
    model = make_model("linear", torch.float32, local_chunk_sizes=[4], local_shard_lengths=12, global_chunk_size=None)
    layer = model.model.layers[0].memory
    # W_init, over the last chunk, by the operation itself: what a memory that never learns answers at its keys.
    x = model.model.layers[0].input_norm(model.model.embed_tokens(tokens)).detach()
    _, k, v, _ = layer.project(x)
    params, never = layer.local_memories[0].params, torch.zeros(2, 4, 2)
    answer, _ = local_memory(k[:, 12:], k[:, 12:], v[:, 12:], never, params, chunk_size=4, qk_projection="none")
    expected = 0.5 * (answer - v[:, 12:]).square().sum(-1).mean().item()
    report = memory_health(model, tokens)
    assert report["layer0/local0/loss_before"] == pytest.approx(expected, rel=1e-5)
    assert report["layer0/local0/loss_after"] < 0.999 * expected
    # Not reset there, the memory comes to the last chunk with what it has learned.
    model.set_local_chunks([4], [None])
    assert memory_health(model, tokens)["layer0/local0/loss_before"] != pytest.approx(expected, rel=1e-4)
    for memory in (block.memory.local_memories[0] for block in model.model.layers):
        torch.nn.init.constant_(memory.lr_gate.bias, -200.0)
    still = memory_health(model, tokens)
    assert still["layer0/local0/loss_after"] == pytest.approx(still["layer0/local0/loss_before"], rel=1e-6)


@torch.no_grad()
def test_hooks_see_the_batch_as_it_was_given():
    """Between blocks, and in every linear map: [B, T, ...], with padding, too, whose hidden states are zero."""
    model, tokens, mask, seen = make_model(), make_tokens(3, 9), torch.ones(3, 9, dtype=torch.long), {}
    mask[0, :4] = mask[2, 7:] = 0
    for name, module in model.model.named_modules():
        if name.startswith("layers.") and (name.count(".") == 1 or isinstance(module, torch.nn.Linear)):
            module.register_forward_hook(lambda _m, _args, out, name=name: seen.__setitem__(name, out))
    out = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert len(seen) > 20 and {tuple(t.shape[:2]) for t in seen.values()} == {(3, 9)}
    assert all(not hidden[mask == 0].any() for hidden in (*out.hidden_states, seen["layers.0"], seen["layers.1"]))
    # Adding a vector to a block's output, as steering does, is the same for a row alone.
    model.model.layers[0].register_forward_hook(lambda _m, _args, out: out + 0.5)
    padded = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 4:], model(tokens[:1, 4:]).logits, **EXACT)


def test_vocabulary_size_is_respected():
    assert make_model().get_output_embeddings().weight.shape == (VOCAB, 32)
