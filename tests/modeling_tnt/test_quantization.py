"""Weights in 8 and 4 bits by torchao: of the projections, not of the memories and their gates."""

import copy

import pytest
import torch
from model_cases import make_model, make_tokens
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

GREEDY = {"do_sample": False, "max_new_tokens": 8}
# The error of the logits in units of their deviation. A weight is rounded to 1/127 of the largest in its row, or to 1/7
# of the largest of 32: an rms of 0.6% or 9% of a weight, seven times in each of two layers and in the head, makes
# 0.6% · √15 = 2.3% or 35%; the memories may double it, as they learn from what the rounded projections say.
KINDS = {
    "int8": (Int8WeightOnlyConfig(version=2), 0.046),
    "int4": (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), 0.7),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def make_float_model(variant="mlp"):
    """With all gates, but no `normalize_projection`: at a first token it keeps only the sign of q·k, which can flip."""
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
    return make_model(variant, torch.float32, use_momentum=True, use_forget_gate=True, **sizes)


def quantized_names(model) -> set[str]:
    return {name.rpartition(".weight")[0] for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}


@torch.no_grad()
def check_close(quantized, model, tolerance) -> None:
    """Its logits are those of the rounded weights in float32, and close to those of the weights as they were."""
    tokens = make_tokens(2, 32)
    rounded, original = copy.deepcopy(model), model(tokens).logits
    for name in quantized_names(quantized):
        weight = quantized.get_submodule(name).weight.dequantize()
        rounded.get_submodule(name).weight.copy_(weight)
        assert not torch.equal(weight, model.get_submodule(name).weight), name
    logits = quantized(tokens).logits
    # Sums in another order, in float32.
    torch.testing.assert_close(logits, rounded(tokens).logits, rtol=1e-3, atol=1e-3)
    assert 0 < (logits - original).std() / original.std() < tolerance
    generated = quantized.generate(tokens, **GREEDY)
    assert torch.equal(generated, rounded.generate(tokens, **GREEDY))


def projection_names(model) -> set[str]:
    """What is to be quantized; the gates of the memories, linear maps as well, need their digits."""
    return {name for name, _ in model.named_modules() if name.endswith("_proj")}


def test_projections_and_head(kind):
    model = make_float_model()
    quantized = copy.deepcopy(model)
    quantize_(quantized, kind[0])
    assert len(projection_names(model)) == 2 * 8
    assert quantized_names(quantized) == projection_names(model) | {"lm_head"}
    check_close(quantized, model, kind[1])


@pytest.mark.parametrize(
    "variant, projections", [("hybrid-full", 8 + 7), ("titans-mag", 2 * 11), ("titans-mac", 2 * 13)]
)
def test_projections_of_hybrids(variant, projections):
    """Twice the error of the others: there are up to twice as many."""
    model = make_float_model(variant)
    quantized = copy.deepcopy(model)
    quantize_(quantized, KINDS["int8"][0])
    assert len(projection_names(model)) == projections
    assert quantized_names(quantized) == projection_names(model) | {"lm_head"}
    check_close(quantized, model, 2 * KINDS["int8"][1])


@torch.no_grad()
def test_on_load_and_saved_as_it_is(kind, tmp_path):
    """transformers leaves the head as it is."""
    model = make_float_model()
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(kind[0]))
    assert quantized_names(loaded) == projection_names(model)
    check_close(loaded, model, kind[1])

    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert quantized_names(again) == quantized_names(loaded)
    tokens = make_tokens(2, 20)
    torch.testing.assert_close(again(tokens).logits, loaded(tokens).logits, rtol=1e-4, atol=1e-4)  # sums in float32
    files = [tmp_path / folder / "model.safetensors" for folder in ("float", "quantized")]
    assert files[1].stat().st_size < 0.75 * files[0].stat().st_size


@torch.no_grad()
def test_a_model_in_bfloat16():
    model = make_float_model()
    tokens = make_tokens(2, 32)
    expected = model(tokens).logits
    half = model.bfloat16()
    quantize_(half, KINDS["int8"][0])
    logits = half(tokens).logits
    assert logits.dtype == torch.bfloat16
    # bfloat16 rounds each weight and each activation to 0.2% on top.
    assert (logits - expected).std() / expected.std() < 2 * KINDS["int8"][1]
