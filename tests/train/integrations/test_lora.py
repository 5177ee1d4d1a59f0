"""LoRA through PEFT: gradients, saving and loading, merging, and the local memories that an adapter brings along."""

from __future__ import annotations

import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTModel
from modeling_tnt.train import load_lora, lora_config, save_lora

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
VARIANTS = {
    "mlp": {"use_momentum": True, "use_forget_gate": True},
    "token scale": {"token_scale": True, "qk_projection": "none"},
    "two linear": {
        "memory_type": "linear", "use_output_gate": False, "local_chunk_sizes": [2, 8],
        "local_shard_lengths": [16, None],
    },
    "hybrid": {"layer_types": ["memory", "full_attention"], "num_key_value_heads": 1},
    "context": {"memory_as": "context", "num_persistent_tokens": 2},
    "gate": {"memory_as": "gate", "sliding_window": 5, "num_persistent_tokens": 2},
}  # fmt: skip
TOKENS = torch.randint(0, 40, (2, 19), generator=torch.Generator().manual_seed(1))


def make_model(variant="mlp") -> TNTForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16,
        "intermediate_size": 48, "global_chunk_size": 8, "local_chunk_sizes": [4], "local_shard_lengths": 8,
        # So large that what the memories have learned shows in the logits.
        "initializer_range": 0.1, "memory_base_lr": 0.5,
    }  # fmt: skip
    return TNTForCausalLM(TNTConfig(**sizes | VARIANTS[variant])).eval()


def adapt(model, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    # PEFT begins with B = 0, where the adapter changes nothing and A gets no gradient: not so here.
    return peft.get_peft_model(model, lora_config(model, r=2, alpha=4, init_lora_weights=False, **options))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def train_a_step(model) -> None:
    """A step large enough to show in the logits."""
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.zero_grad()


@pytest.fixture(params=VARIANTS)
def trained(request, tmp_path):
    """A base model that lies in base/, and on it an adapter that has made a step."""
    make_model(request.param).save_pretrained(tmp_path / "base")
    model = adapt(TNTForCausalLM.from_pretrained(tmp_path / "base"))
    train_a_step(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train_local_memories", [True, False])
def test_every_target_gets_a_gradient_and_nothing_else(variant, train_local_memories):
    model = adapt(make_model(variant), train_local_memories=train_local_memories)
    model(TOKENS, labels=TOKENS).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable if ".lora_" in name}
    assert adapted == PROJECTIONS - ({"g_proj"} if variant == "two linear" else set())
    copies = {name.split(".modules_to_save.default.")[1] for name in trainable if ".lora_" not in name}
    memory = dict(make_model(variant).model.layers[0].memory.local_memories[0].named_parameters())
    assert copies == (set(memory) if train_local_memories else set())


def test_the_copies_of_the_local_memories_are_what_the_model_reads(trained):
    """Their parameters and gates are attributes that the layer reads; PEFT's wrapper hands on those of the copy."""
    before = logits(trained)
    wrappers = [m for m in trained.modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    layers = trained.config.layer_types.count("tnt_memory")
    assert len(wrappers) == layers * len(trained.config.local_chunk_sizes)
    for wrapper in wrappers:
        for name, own in wrapper.original_module.named_parameters():
            assert not torch.equal(own, wrapper.modules_to_save["default"].get_parameter(name)), f"{name} did not learn"
    for part in ("w1", "lr_gate.weight"):
        weight = wrappers[0].modules_to_save["default"].get_parameter(part)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
            assert (logits(trained) - before).abs().max() > 1e-4, f"{part} of the copy has no part in the output"
            weight.copy_(kept)
    assert torch.equal(logits(trained), before)


def test_without_the_adapter_it_is_the_base_model(trained, tmp_path):
    base = TNTForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(trained) - logits(base)).abs().max() > 1e-2
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(base))


def test_saved_and_loaded(trained, tmp_path):
    """By ours at the chunks that it was trained with, also after a swap; by PEFT's at those of the base model."""
    before = logits(trained)
    trained.save_pretrained(tmp_path / "plain")
    base = TNTForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "plain")), before)
    trained.set_local_chunks([1] * len(trained.config.local_chunk_sizes))
    after = logits(trained)
    assert (after - before).abs().max() > 1e-4
    save_lora(trained, tmp_path / "adapter")
    assert any("local_memories.0." in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    loaded = load_lora(tmp_path / "adapter")
    assert torch.equal(logits(loaded), after)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load_lora(tmp_path / "adapter", is_trainable=True).parameters())


def test_merged_equals_unmerged(trained, tmp_path):
    """Up to the rounding of float32 sums in another order; saved, it is a whole model again."""
    trained.set_local_chunks([2] * len(trained.config.local_chunk_sizes))
    before = logits(trained)
    merged = trained.merge_and_unload()
    assert type(merged) is TNTForCausalLM
    assert set(merged.state_dict()) == set(TNTForCausalLM.from_pretrained(tmp_path / "base").state_dict())
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = TNTForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.local_chunk_sizes == merged.config.local_chunk_sizes
    assert torch.equal(logits(loaded), logits(merged))


def test_generation_with_the_adapter(trained):
    """Greedy decoding, token by token with a cache, is the argmax of the full forward."""
    prompt = TOKENS[:, :7]
    tokens = trained.generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
    with torch.no_grad():
        assert torch.equal(tokens[:, 7:], trained(tokens).logits[:, 6:-1].argmax(-1))


def test_single_gates_may_be_trained_as_they_are():
    """PEFT's own config, for one who wants other modules."""
    model = make_model()
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lr_gate", "conv"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    before = logits(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    saved = {name: p for name, p in model.named_parameters() if ".modules_to_save." in name}
    assert {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in saved} == {"lr_gate", "conv"}
    assert all(p.grad.abs().max() > 0 for p in saved.values())
    train_a_step(model)
    assert not torch.equal(logits(model), before)


def test_what_lora_config_passes_on():
    model = make_model()
    config = lora_config(model, 4, 8, 0.1, use_rslora=True)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert (config.task_type, config.modules_to_save) == ("CAUSAL_LM", ["local_memories.0"])
    assert config.target_modules == PROJECTIONS
    assert lora_config(model.model).target_modules == PROJECTIONS, "the base model too"
    assert lora_config(adapt(model)).target_modules == PROJECTIONS, "and one with an adapter"
    memory_free = TNTModel(TNTConfig(**{**model.config.to_diff_dict(), "local_chunk_sizes": []}))
    assert lora_config(memory_free).modules_to_save is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be an int of at least 1, got 0"),
        ({"alpha": -1}, ValueError, "alpha must be a number above 0, got -1"),
        ({"dropout": 1.0}, ValueError, "dropout must be a number with 0 ≤ dropout < 1, got 1.0"),
        ({"lora_droput": 0.1}, TypeError, "lora_droput"),
    ],
)
def test_wrong_numbers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        lora_config(make_model(), **arguments)


def test_wrong_models_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    with pytest.raises(TypeError, match="must be a TNT model, .*, or wrap one; got LlamaForCausalLM"):
        lora_config(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
    with pytest.raises(TypeError, match="must be a PeftModel, got TNTForCausalLM; save a whole one by save_pretrained"):
        save_lora(make_model(), tmp_path)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type .*ModuleList"):
        peft.get_peft_model(
            make_model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["local_memories"])
        )


def test_an_adapter_without_its_chunks_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path / "plain")
    with pytest.raises(OSError, match=r"base_config\.json"):
        load_lora(tmp_path / "plain")


def test_without_peft_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft, which is not installed; use pip install 'modeling-tnt\[lora\]'"):
        lora_config(make_model())
