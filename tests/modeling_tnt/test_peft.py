"""PEFT's ways of adapting a model that depend on the shapes between blocks and on whose forward reads a parameter."""

import pytest
import torch
from model_cases import VOCAB, make_model, make_tokens

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64
GREEDY = {"do_sample": False, "max_new_tokens": 6}


def adapted(model, adapters=("one",), **options):
    """The model with adapters that change it: B of LoRA starts at zero otherwise."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    model = peft.get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.double().eval()


def left_padded(rows: int = 2, length: int = 14, padding: int = 5):
    ids, mask = make_tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return ids, mask


@torch.no_grad()
def test_every_row_may_have_an_adapter_of_its_own():
    model = adapted(make_model(), ("one", "two"), target_modules=["q_proj", "v_proj", "down_proj", "lr_gate"])
    ids, mask = left_padded()
    alone = []
    for name, row in (("one", ids[:1, 5:]), ("two", ids[1:])):
        model.set_adapter(name)
        alone.append(model(row).logits[0])
    together = model(ids, attention_mask=mask, adapter_names=["one", "two"]).logits
    torch.testing.assert_close(together[0, 5:], alone[0], **CLOSE)
    torch.testing.assert_close(together[1], alone[1], **CLOSE)
    assert (alone[0] - model.get_base_model()(ids[:1, 5:]).logits[0]).abs().max() > 1e-3


@torch.no_grad()
def test_an_activated_adapter_counts_the_tokens_of_a_padded_row():
    """aLoRA adapts what stands behind its invocation tokens, which it looks for in input_ids [B, T]."""
    model = adapted(make_model(), target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[VOCAB - 2, VOCAB - 1])
    ids, mask = left_padded()
    ids[ids >= VOCAB - 2] = 1
    ids[:, 9:11] = torch.tensor([VOCAB - 2, VOCAB - 1])
    whole = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(whole[:1, 5:], model(input_ids=ids[:1, 5:]).logits, **CLOSE)
    torch.testing.assert_close(whole[1:], model(input_ids=ids[1:]).logits, **CLOSE)
    with model.disable_adapter():
        plain = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(plain[1, :9], whole[1, :9]) and (plain - whole).abs().max() > 1e-3


@pytest.mark.parametrize("parameter", ["local_memories.0.w1", "global_memory.w2"])
@torch.no_grad()
def test_initial_fast_weights_can_be_adapted(parameter):
    """`target_parameters` holds inside of the forward of the module that owns the parameter, and nowhere else."""
    model, ids = make_model(), make_tokens(2, 13)
    before = model(ids).logits
    model = adapted(model, target_modules=[], target_parameters=[parameter])
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-3
    generated = model.generate(ids, **GREEDY)  # tokens one by one: the path that reads all memories together
    state = model.get_base_model().memorize(ids, progress=False)
    stepped = model(ids[:, :1], cache=state).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, after, **CLOSE)
    assert torch.equal(merged.generate(ids, **GREEDY), generated)
    again = merged(ids[:, :1], cache=merged.memorize(ids, progress=False)).logits
    torch.testing.assert_close(stepped, again, **CLOSE)


def test_initial_fast_weights_learn_through_their_adapter():
    model = adapted(make_model(), target_modules=[], target_parameters=["local_memories.0.w1"]).train()
    ids = make_tokens(2, 13)
    model(ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients.values())


@pytest.mark.parametrize("padding", [0, 4])
@torch.no_grad()
def test_a_learned_prompt_is_its_embeddings_before_the_text(padding):
    """In generate, with left padding and with a row that ends early, too."""
    torch.manual_seed(2)
    model = peft.get_peft_model(make_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    model = model.double().eval()
    base, (ids, mask) = model.get_base_model(), left_padded(padding=padding)
    answers = []
    for row in (ids[:1, padding:], ids[1:]):
        for _ in range(8):
            embeds = torch.cat([model.get_prompt(1), base.get_input_embeddings()(row)], dim=1)
            row = torch.cat([row, base(inputs_embeds=embeds, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(row[0, -8:].tolist())
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert model.generate(input_ids=ids, **options)[:, 14:].tolist() == answers
    early, eos = next((r, t) for r in (0, 1) for t in answers[r][:5] if t not in answers[1 - r])
    end = answers[early].index(eos) + 1
    answers[early][end:] = [0] * (8 - end)
    assert model.generate(input_ids=ids, eos_token_id=eos, **options)[:, 14:].tolist() == answers


@torch.no_grad()
def test_prefix_tuning_is_refused_by_its_name():
    model = peft.get_peft_model(
        make_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    with pytest.raises(ValueError, match="as prefix tuning makes them"):
        model(input_ids=make_tokens(1, 4))
