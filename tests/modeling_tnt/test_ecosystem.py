"""transformers' own tools on a TNT model: streaming, constraints, pipelines, placement, shards, Trainer, graphs."""

import json
import threading

import numpy as np
import pytest
import torch
from model_cases import VOCAB, make_model, make_tokens
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from modeling_tnt import TNTForCausalLM

GREEDY = {"do_sample": False, "max_new_tokens": 12}
PROMPTS = ["def main(argv):", "x", "the memory reads"]


def make_byte_model():
    """Reads the bytes of ByT5's tokenizer; always the same."""
    model = make_model(dtype=torch.float32, vocab_size=384, pad_token_id=0, eos_token_id=1)
    letters = {byte + 3 for byte in b"abcdefg \n"}
    model.generation_config.suppress_tokens = [token for token in range(384) if token not in letters]
    return model, ByT5Tokenizer()


@pytest.fixture
def saved(tmp_path):
    """A model in float32 and the folder that holds it."""
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_streaming_gives_the_text_piece_by_piece():
    model, tokenizer = make_byte_model()
    inputs = tokenizer(PROMPTS[0], add_special_tokens=False, return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1


def test_generation_stops_at_a_string_and_by_a_rule():
    model, tokenizer = make_byte_model()
    inputs = tokenizer(PROMPTS[0], add_special_tokens=False, return_tensors="pt")
    prompt = inputs.input_ids.shape[1]
    tokens = model.generate(**inputs, **GREEDY)[0, prompt:]
    wanted = tokenizer.decode(tokens[3:5])
    stopped = model.generate(**inputs, **GREEDY, stop_strings=[wanted], tokenizer=tokenizer)[0, prompt:]
    text = tokenizer.decode(stopped)
    assert text.endswith(wanted) and text.count(wanted) == 1
    assert torch.equal(stopped, tokens[: len(stopped)]) and len(stopped) <= 5

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= prompt + 4)

    ruled = model.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([AfterFour()]))
    assert torch.equal(ruled[0, prompt:], tokens[:4])
    out_of_time = model.generate(**inputs, do_sample=False, max_new_tokens=1000, max_time=0.0)
    assert torch.equal(out_of_time[0, prompt:], tokens[:1])


@torch.no_grad()
def continue_among(model, tokens, allowed, steps):
    """Argmax of full forwards over the allowed tokens."""
    for _ in range(steps):
        logits = model(tokens, use_cache=False).logits[:, -1]
        hidden = torch.full_like(logits, -torch.inf)
        hidden[:, allowed] = logits[:, allowed]
        tokens = torch.cat([tokens, hidden.argmax(-1, keepdim=True)], dim=1)
    return tokens


def test_constrained_decoding_is_the_best_of_the_allowed_tokens():
    model, prompt = make_model(), make_tokens(2, 6)
    allowed = [7, 8, 9, 20, 31]
    got = model.generate(prompt, prefix_allowed_tokens_fn=lambda row, ids: allowed, **GREEDY)
    assert torch.equal(got, continue_among(model, prompt, allowed, 12))
    free = model.generate(prompt, **GREEDY)
    bad = sorted({*free[0, 6:].tolist()})[:3]
    got = model.generate(prompt, bad_words_ids=[[token] for token in bad], **GREEDY)
    assert torch.equal(got, continue_among(model, prompt, [t for t in range(VOCAB) if t not in bad], 12))


def test_guidance_reads_two_texts_with_two_caches():
    model, prompt = make_model(), make_tokens(1, 6)
    guided = {"guidance_scale": 3.0, "negative_prompt_ids": make_tokens(1, 5, seed=8), **GREEDY}
    cached = model.generate(prompt, **guided)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **guided))
    assert not torch.equal(cached, model.generate(prompt, **GREEDY))


def test_assisted_generation_is_refused_before_a_token_is_read(monkeypatch):
    model, prompt = make_model(dtype=torch.float32), make_tokens(1, 5)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip

    def fail(*args, **kwargs):
        raise AssertionError("a token was read")

    monkeypatch.setattr(model, "forward", fail)
    for options in ({"assistant_model": llama}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="cannot unlearn tokens .* leave out assistant_model, prompt_lookup"):
            model.generate(prompt, **options, **GREEDY)
    with pytest.raises(
        ValueError, match="assistant_model must be a model whose cache can be cropped, got TNTForCausal"
    ):
        llama.generate(prompt, assistant_model=model, **GREEDY)


def test_what_generate_returns_beside_tokens():
    model, prompt = make_model(), make_tokens(2, 6)
    asked = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(prompt, output_hidden_states=True, **asked, **GREEDY)
    with torch.no_grad():
        full = model(out.sequences[:, :-1], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(out.logits, 1), full.logits[:, 5:].to(out.logits[0].dtype))
    for layer, expected in enumerate(full.hidden_states):
        got = torch.cat([step[layer] for step in out.hidden_states], dim=1)
        torch.testing.assert_close(got, expected)

    beams = model.generate(prompt, num_beams=3, **asked, **GREEDY)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices)
    # The score of a beam is the mean of its tokens' log-probabilities, which transformers sums in float32.
    torch.testing.assert_close(scores.sum(1) / 12, beams.sequences_scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no attention weights"):
        model.generate(prompt, output_attentions=True, **asked, **GREEDY)


def test_the_generation_config_is_saved(tmp_path):
    model, prompt = make_model(dtype=torch.float32), make_tokens(1, 6)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=7, bad_words_ids=[[3]])
    model.save_pretrained(tmp_path)
    again = TNTForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.bad_words_ids == [[3]]
    assert torch.equal(again.generate(prompt), model.generate(prompt)) and again.generate(prompt).shape == (1, 13)


def test_text_generation_in_padded_batches_is_that_of_each_prompt_alone():
    model, tokenizer = make_byte_model()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    tokenizer.padding_side = "left"
    alone = [generate(prompt, **GREEDY)[0]["generated_text"] for prompt in PROMPTS]
    assert all(len(text) > len(prompt) for text, prompt in zip(alone, PROMPTS, strict=True))
    for batch_size in (2, 3):
        assert [out[0]["generated_text"] for out in generate(PROMPTS, batch_size=batch_size, **GREEDY)] == alone


@torch.no_grad()
def test_features_are_the_last_hidden_states():
    model, tokenizer = make_byte_model()
    extract = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer, device="cpu")
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    features = extract(PROMPTS[0], return_tensors=True)
    torch.testing.assert_close(features, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("variant", ["mlp", "global-only"], ids=["untied", "tied"])
@torch.no_grad()
def test_more_tokens_may_be_added(variant):
    model, tokens = make_model(variant), make_tokens(2, 6)
    before = model(tokens).logits
    model.resize_token_embeddings(VOCAB + 9)
    torch.testing.assert_close(model(tokens).logits[..., :VOCAB], before)
    assert model.config.vocab_size == VOCAB + 9 == model.lm_head.weight.shape[0]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (variant == "global-only")
    assert model.generate(tokens + 9, **GREEDY).shape == (2, 18)


# The rounding of weights and activations to 8 or 11 bits, through two layers whose logits have a deviation of 1.5.
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.2), ("float16", 0.03), ("auto", 1e-5)])
@torch.no_grad()
def test_dtype_on_load(saved, dtype, tolerance):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    tokens = make_tokens(2, 20)
    logits = loaded(tokens).logits
    assert logits.dtype == wanted
    torch.testing.assert_close(logits.float(), model(tokens).logits, rtol=0, atol=tolerance)
    assert loaded.generate(tokens, **GREEDY).shape == (2, 32)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
@torch.no_grad()
def test_device_map_places_the_model(saved, device_map):
    model, folder = saved
    expected = model.generate(make_tokens(2, 6), **GREEDY)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    wanted = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert {parameter.device.type for parameter in loaded.parameters()} == {wanted}
    assert torch.equal(loaded.generate(make_tokens(2, 6).to(wanted), **GREEDY).cpu(), expected)


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "lm_head": "cpu"}],
    ids=["auto", "a layer"],
)  # fmt: skip
def test_offloaded_weights_are_brought_when_they_are_used(saved, tmp_path, device_map):
    model, folder = saved
    options = {"max_memory": {"cpu": 40_000}} if device_map == "auto" else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "offload"), **options
    )
    assert any(p.is_meta for p in loaded.parameters())
    prompt = make_tokens(2, 6)
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert torch.equal(loaded.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
    assert loaded.memorize(prompt, progress=False).tokens_read.tolist() == [6, 6]


def test_weights_in_several_files(tmp_path):
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    wrong = [json.dumps(index | {"weight_map": places}) for places in ([], {"a": 1})]
    for broken in ("", "[]", "{}", *wrong):
        (tmp_path / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(OSError, match="index.json is no index of a model's weights .*copy it again"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(OSError, match=f"{shards[1]} missing in .*index.json names them; copy all files of weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_step_equals_the_eager_one():
    """A token a row behind a cache. The backend is eager: what is tested is what dynamo captures."""
    torch._dynamo.reset()
    model, tokens = make_model("mlp-momentum-forget", num_hidden_layers=1), make_tokens(2, 13)
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(tokens).logits[:, 5:]
    cache = DynamicCache(config=model.config)
    model(tokens[:, :5], cache=cache)
    steps = [compiled(tokens[:, t : t + 1], cache=cache).logits for t in range(5, 13)]
    # Over the boundaries of chunks and shards; equal but for the order of sums in float64.
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_export_makes_a_program_of_one_shape(tmp_path):
    """As `TNTModel.forward` says: no mask, no cache, no other length."""
    model, tokens = make_model(num_hidden_layers=1), make_tokens(2, 6)
    program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    other = make_tokens(2, 6, seed=9)
    torch.testing.assert_close(run(other, use_cache=False).logits, model(other).logits)
    with pytest.raises(Exception, match="input_ids"):
        run(make_tokens(2, 7), use_cache=False)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, (tokens,), {"use_cache": False, "attention_mask": mask}, strict=False)
    cache = DynamicCache(config=model.config)
    with pytest.raises(Exception, match="DynamicCache"):
        torch.export.export(model, (tokens[:, :1],), {"cache": cache}, strict=False)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_tracing_names_what_goes_instead(backend):
    """Not an internal assertion of PyTorch's, also behind a cache, whose token is read by another operator."""
    model, tokens = make_model(num_hidden_layers=1, kernel_backend=backend), make_tokens(2, 6)
    cache = model(tokens, use_cache=True).past_key_values
    calls = (
        lambda ids: model(ids, use_cache=False).logits,
        lambda ids: model(ids[:, :1], past_key_values=cache).logits,
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"torch\.export\.export\(model"), torch.no_grad():
            torch.jit.trace(call, (tokens,))


def test_trainer_evaluates_without_the_caches(tmp_path):
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    model = make_model(dtype=torch.float32)
    rows = make_tokens(5, 9).tolist()
    seen = []

    def measure(prediction):
        seen.append(prediction.predictions)
        return {"tokens": prediction.label_ids.size}

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=transformers.default_data_collator, compute_metrics=measure,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_tokens"] == 45
    assert isinstance(seen[0], np.ndarray) and seen[0].shape == (5, 9, VOCAB)
    with torch.no_grad():
        expected = model(torch.tensor(rows), labels=torch.tensor(rows))
    np.testing.assert_allclose(seen[0], expected.logits, rtol=1e-4, atol=1e-4)  # sums in float32
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
