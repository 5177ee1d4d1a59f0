"""`model.memorize`: what it leaves is what one call over the whole document would, of any kind, length and cut."""

import io
import warnings

import numpy as np
import pytest
import torch
from model_cases import CONSTANT_SIZE, VOCAB, assert_same_states, make_model, make_tokens, state_tensors
from transformers import AutoTokenizer, ByT5Tokenizer, DynamicCache
from transformers.utils import logging

from modeling_tnt import TNTConfig, TNTForCausalLM, TNTState

# float64: the same sums in another order, through the two layers and the large step sizes of the test models.
CLOSE = {"rtol": 1e-7, "atol": 1e-8}
GREEDY = {"do_sample": False, "max_new_tokens": 8}
QUIET = {"progress": False}


@pytest.mark.parametrize("chunk_length", [1, 3, 7, 50])
@pytest.mark.parametrize("variant", CONSTANT_SIZE)
@torch.no_grad()
def test_a_prompt_behind_a_document_is_read_as_if_they_were_one(variant, chunk_length):
    """Pieces of 3 and 7 end in mid-chunk, and 22 tokens are 7 · 3 + 1: the last piece is a single token."""
    model, document, prompt = make_model(variant), make_tokens(2, 22), make_tokens(2, 5, seed=2)
    whole = torch.cat([document, prompt], dim=1)
    state = model.memorize(document, chunk_length=chunk_length, **QUIET)
    assert state.tokens_read.tolist() == [22, 22] and state.get_seq_length() == 0
    expected = model(whole, use_cache=True)
    out = model(prompt, cache=state.clone())
    torch.testing.assert_close(out.logits, expected.logits[:, 22:], **CLOSE)
    assert_same_states(out.cache, expected.cache, **CLOSE)
    continued = model.generate(prompt, cache=state, **GREEDY)
    assert torch.equal(continued[:, 5:], model.generate(whole, use_cache=False, **GREEDY)[:, 27:])


@torch.no_grad()
def test_the_memory_is_used():
    model, prompt = make_model(), make_tokens(1, 5)
    one, other = (model(prompt, cache=model.memorize(make_tokens(1, 30, seed=s), **QUIET)).logits for s in (3, 4))
    assert (one - other).abs().max() > 0.01 and (one - model(prompt).logits).abs().max() > 0.01


def forms_of(ids: list[int], tmp_path) -> dict[str, object]:
    path = tmp_path / "ids.bin"
    np.asarray(ids, dtype=np.uint16).tofile(path)
    return {
        "list": ids,
        "tuple": tuple(ids),
        "tensor": torch.tensor(ids),
        "int32 rows": torch.tensor([ids], dtype=torch.int32),
        "array": np.asarray([ids]),
        "memmap": np.memmap(path, dtype=np.uint16, mode="r"),
        "list of tensors": [torch.tensor(ids)],
    }


@torch.no_grad()
def test_every_kind_of_ids_is_the_same_document(tmp_path):
    model, tokens = make_model(), make_tokens(1, 11)
    expected = model.memorize(tokens, **QUIET)
    for name, document in forms_of(tokens[0].tolist(), tmp_path).items():
        state = model.memorize(document, chunk_length=4, **QUIET)
        assert_same_states(state, expected, **CLOSE), name
    assert_same_states(model.model.memorize(tokens, **QUIET), expected, rtol=0, atol=0)


class Slices:
    """20,000 ids of which only slices exist, and which remembers the longest."""

    longest = 0

    def __len__(self) -> int:
        return 20_000

    def __getitem__(self, key):
        if isinstance(key, int):
            return 1
        begin, end, _ = key.indices(len(self))
        self.longest = max(self.longest, end - begin)
        return np.arange(begin, end) % VOCAB


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def tiny_config(**attention) -> TNTConfig:
    size = {
        "vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 8,
        "intermediate_size": 8, "memory_expansion": 1,
        "global_chunk_size": 500, "local_chunk_sizes": [250], "local_shard_lengths": 500,
    }  # fmt: skip
    return TNTConfig(**size | attention)


def test_memory_does_not_grow_with_the_document():
    """Neither what is kept, nor the largest tensor on the way, nor the piece of ids that is looked at."""
    model, document = TNTForCausalLM(tiny_config()).eval(), Slices()
    short = model.memorize(torch.arange(1000) % VOCAB, chunk_length=500, **QUIET)
    with LargestTensor() as made:
        state = model.memorize(document, chunk_length=500, **QUIET)
    assert state.tokens_read.tolist() == [20_000] and document.longest == 500
    # The feed-forward's 500 · 8 · 2 floats and the like; one int64 for each token of the document would be 160,000.
    assert 0 < made.largest < 100_000
    assert state.nbytes == short.nbytes
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state_tensors(state).values()), "views keep more"


@pytest.mark.parametrize("attention", [
    {"memory_as": "layer", "sliding_window": 64}, {"memory_as": "gate", "sliding_window": 64}, {"memory_as": "context"},
    {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "memory"], "sliding_window": 64},
], ids=["mal", "mag", "mac", "windows"])  # fmt: skip
@torch.no_grad()
def test_states_with_attention_do_not_grow(attention):
    """From 1k to 100k tokens, nor what is kept under their tensors. Both end in mid-segment, where one is held."""
    model = TNTForCausalLM(tiny_config(**attention)).eval()
    states = [model.memorize(torch.arange(n) % VOCAB, chunk_length=700, **QUIET) for n in (1_003, 100_003)]
    assert states[1].tokens_read.tolist() == [100_003] and states[1].nbytes == states[0].nbytes
    for layer in states[1].layers:
        for attended in (layer, getattr(layer, "window", None)):
            for keys in (getattr(attended, name, None) for name in ("keys", "values", "segment")):
                assert keys is None or keys.untyped_storage().nbytes() == keys.nbytes, "views keep more"
    assert model(torch.ones(1, 2, dtype=torch.int64), cache=states[1]).logits.isfinite().all()


@pytest.mark.parametrize("chunk_length", [1, 4, 50])
@pytest.mark.parametrize("variant", CONSTANT_SIZE)
@torch.no_grad()
def test_rows_of_different_lengths_and_a_padded_prompt(variant, chunk_length):
    """Of windows each row's own last tokens count, however many columns of padding were read behind them."""
    model = make_model(variant)
    rows = [make_tokens(n, seed=n).tolist() for n in (17, 1, 9)]
    prompts = [make_tokens(n, seed=20 + n) for n in (2, 4, 1)]
    state = model.memorize(rows, chunk_length=chunk_length, **QUIET)
    assert state.tokens_read.tolist() == [17, 1, 9]
    padded = torch.stack([torch.cat([torch.zeros(4 - len(p), dtype=torch.long), p]) for p in prompts])
    out = model.generate(padded, attention_mask=(padded > 0).long(), cache=state, **GREEDY)
    for row, (ids, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = model.generate(torch.cat([torch.tensor(ids), prompt])[None], use_cache=False, **GREEDY)
        assert torch.equal(out[row, 4:], alone[0, len(ids) + len(prompt) :])


@pytest.mark.parametrize("variant", ["mlp", "hybrid-windows", "titans-mag", "titans-mac"])
@torch.no_grad()
def test_a_state_is_read_on_from_and_a_conversation_passes_all_of_its_ids(variant):
    model = make_model(variant)
    first, second, turn, answer = (make_tokens(1, n, seed=n) for n in (13, 6, 5, 3))
    state = model.memorize(first, **QUIET)
    assert model.memorize(second, state=state, **QUIET) is state and state.tokens_read.tolist() == [19]
    said = model.generate(turn, cache=state, **GREEDY)
    assert state.get_seq_length() == said.shape[1] - 1
    longer = torch.cat([said, answer], dim=1)
    more = model.generate(longer, cache=state, **GREEDY)
    whole = torch.cat([first, second, longer], dim=1)
    expected = model.generate(whole, use_cache=False, **GREEDY)
    assert torch.equal(more, expected[:, 19:])
    model.memorize(second, state=state, **QUIET)  # the conversation is before it, and before what follows
    assert state.get_seq_length() == 0
    before = torch.cat([expected[:, :-1], second, turn], dim=1)
    logits = model(turn, cache=state).logits
    torch.testing.assert_close(logits, model(before).logits[:, -5:], **CLOSE)


def byte_model() -> TNTForCausalLM:
    return make_model(vocab_size=384)


@torch.no_grad()
def test_text_is_read_without_the_end_that_a_tokenizer_puts_after_it():
    model, tokenizer = byte_model(), ByT5Tokenizer()
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id
    state = model.memorize("the memory", tokenizer=tokenizer, **QUIET)
    expected = model.memorize([b + 3 for b in b"the memory"], **QUIET)
    assert_same_states(state, expected, rtol=0, atol=0)
    two = model.memorize(["the memory", "a"], tokenizer=tokenizer, **QUIET)
    assert two.tokens_read.tolist() == [10, 1]


@torch.no_grad()
def test_a_tokenizer_that_begins_texts_does_so_once(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), make_model()
    state = model.memorize("a b", tokenizer=tokenizer, **QUIET)
    model.memorize("b a", tokenizer=tokenizer, state=state, **QUIET)
    assert_same_states(state, model.memorize([0, 3, 4, 4, 3], **QUIET), **CLOSE)


@torch.no_grad()
def test_what_a_document_cannot_be():
    model = make_model()
    with pytest.raises(ValueError, match=r"tokenizer must be given, got None; pass this model's"):
        model.memorize("text")
    with pytest.raises(ValueError, match="at least one token in each row"):
        model.memorize([])
    with pytest.raises(ValueError, match="at least one token in each row"):
        model.memorize([[1], []])
    with pytest.raises(ValueError, match="at least one token in each row"):
        byte_model().memorize("", tokenizer=ByT5Tokenizer())
    with pytest.raises(ValueError, match=f"token id {VOCAB}, and this model's ids are 0 to {VOCAB - 1}"):
        model.memorize([1, VOCAB], **QUIET)
    with pytest.raises(ValueError, match="token id -1"):
        model.memorize(torch.tensor([1, -1]), **QUIET)
    with pytest.raises(TypeError, match="integer token ids, got torch.float32"):
        model.memorize(torch.zeros(3), **QUIET)
    with pytest.raises(TypeError, match="integer token ids, got float64"):
        model.memorize([0.5], **QUIET)
    with pytest.raises(TypeError, match="texts only, or sequences of ids only"):
        model.memorize(["a", [1]], tokenizer=ByT5Tokenizer())
    with pytest.raises(TypeError, match="sequences of ids only, or ids only"):
        model.memorize([[1], 2])
    with pytest.raises(TypeError, match="pass its input_ids"):
        model.memorize({"input_ids": [1]})
    with pytest.raises(TypeError, match="got generator; .*state = model.memorize"):
        model.memorize(i for i in range(3))
    with pytest.raises(ValueError, match=r"shape \[tokens\] or \[rows, tokens\]"):
        model.memorize(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="chunk_length must be an int of at least 1"):
        model.memorize([1], chunk_length=0)


@torch.no_grad()
def test_what_a_state_cannot_be():
    model = make_model()
    state = model.memorize([1, 2], **QUIET)
    with pytest.raises(ValueError, match="holds 1 rows but the batch has 2; .*repeat"):
        model.memorize([[1], [2]], state=state, **QUIET)
    with pytest.raises(TypeError, match="state must be a TNTState, got DynamicCache"):
        model.memorize([1], state=DynamicCache(config=model.config), **QUIET)
    with pytest.raises(ValueError, match=r"local_chunk_sizes=\[4\] \(now \[2\]\)"):
        make_model(local_chunk_sizes=[2]).memorize([1], state=state, **QUIET)
    assert state.tokens_read.tolist() == [2]


@pytest.mark.parametrize("at", ["between layers", "first layer"])
@pytest.mark.parametrize("chunk_length", [4, 1])
@pytest.mark.parametrize("variant", ["mlp", "hybrid-windows", "titans-mag", "titans-mac"])
@torch.no_grad()
def test_an_interrupted_state_stands_after_the_last_whole_piece(variant, at, chunk_length):
    model, document = make_model(variant), make_tokens(1, 12)
    state = model.memorize(make_tokens(1, 3, seed=9), **QUIET)
    calls = iter(range(100))

    def interrupt(*_):
        if next(calls) == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1 if at == "between layers" else 0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.memorize(document, state=state, chunk_length=chunk_length, **QUIET)
    hook.remove()
    read = 3 + 2 * chunk_length
    assert state.tokens_read.tolist() == [read] and state.get_seq_length() == 0
    model.memorize(document[:, read - 3 :], state=state, **QUIET)
    whole = model.memorize(torch.cat([make_tokens(1, 3, seed=9), document], dim=1), **QUIET)
    assert_same_states(state, whole, **CLOSE)
    logits = [model(make_tokens(1, 2), cache=one).logits for one in (state, whole)]
    torch.testing.assert_close(*logits, **CLOSE)


def test_the_mode_of_the_model_is_restored_and_no_graph_is_kept():
    model = make_model().train()
    model.model.gradient_checkpointing = True
    state = model.memorize([1, 2, 3], **QUIET)
    assert model.training and not any(t.requires_grad for t in state_tensors(state).values())
    with pytest.raises(ValueError, match="token id"):
        model.memorize([VOCAB], **QUIET)
    assert model.training


def test_no_logits_are_computed(monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: pytest.fail("logits were computed"))
    model.memorize([1, 2, 3], **QUIET)


def test_progress_counts_tokens_and_can_be_turned_off(capsys):
    model, lines = make_model(), io.StringIO()
    previous = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **kwargs | {"file": lines}))
    logging.enable_progress_bar()  # `tnt`, which other tests run, disables it for its process
    try:
        model.memorize([[1] * 9, [1]], chunk_length=4)
        assert "memorize: 100%" in lines.getvalue() and "10.0/10.0" in lines.getvalue()
        seen = len(lines.getvalue())
        model.memorize([1], progress=False)
        logging.disable_progress_bar()
        model.memorize([1])
        assert len(lines.getvalue()) == seen
    finally:
        logging.enable_progress_bar()
        logging.set_tqdm_hook(previous)
    assert "memorize" not in capsys.readouterr().err


def test_a_state_of_other_weights_gives_a_warning():
    model, other = make_model(), make_model()
    torch.manual_seed(1)
    for memory in other.model.layers[0].memory.memories().values():
        torch.nn.init.normal_(memory.w1, std=0.2)
    state = model.memorize([1, 2], **QUIET)
    with pytest.warns(UserWarning, match="weights of an unnamed model, which are not this model's"):
        other.memorize([3], state=state.clone(), **QUIET)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.memorize([3], state=state, **QUIET)  # rounded weights are the same ones
    assert isinstance(state, TNTState)


def test_weights_that_are_offloaded_are_not_looked_at():
    model = make_model()
    assert model.to("meta").memory_origin() == {"model": "", "fingerprint": None}
    state = make_model().memorize([1, 2], **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state.check_origin(model.memory_origin())
