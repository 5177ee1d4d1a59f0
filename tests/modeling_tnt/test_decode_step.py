"""Decoding a token behind a cache, with one launch a layer (in Triton's interpreter), with one call of C++, and with
the torch backend's step: the same logits and states as the other path, in place."""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
from model_cases import HYBRIDS, TORCH_ONLY, VARIANTS, assert_same_states, make_model, make_tokens, state_tensors
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from modeling_tnt import load_cache, memory_layer, save_cache
from modeling_tnt.cache import memory_cache_layers
from modeling_tnt.kernels import BackendChoice, backends, probe, step
from modeling_tnt.memory_layer import TNTMemoryLayer

pytest.importorskip("triton")

# Float64: the same sums in another order; see test_equivalence.py.
EXACT = {"rtol": 1e-9, "atol": 1e-9}
# The native step is for float32, which rounds at 6e-8, over a few hundred operations a token; 1e-5 was enough here.
SINGLE = {"rtol": 3e-5, "atol": 3e-5}
ONE_LAYER = {"num_hidden_layers": 1}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see tests/conftest.py


native = pytest.param("native", marks=pytest.mark.native)
EACH = pytest.mark.parametrize("backend", ["triton", "torch", native])
ON_CPU = pytest.mark.parametrize("backend", ["torch", native])


def precision_of(backend):
    """In which a backend's models are compared, and how closely."""
    return (torch.float32, SINGLE) if backend == "native" else (torch.float64, EXACT)


@pytest.fixture(autouse=True)
def tensors_are_on_the_cpu(request):
    """Except in one test, so kernels need the interpreter: with a GPU, TRITON_INTERPRET=1 pytest runs them."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec is not None else None
    if backend in ("torch", "native"):
        return
    if not INTERPRETED and request.node.get_closest_marker("gpu") is None:
        pytest.skip("the tensors are on the CPU, where kernels run with TRITON_INTERPRET=1 only")


def stepping(model, backend="triton"):
    """The model with the backend that is to step. Prompts are read before, by the torch backend."""
    model.config.kernel_backend = backend
    return model


@torch.no_grad()
def prompt_read(variant, tokens, backend="triton", **overrides):
    """A stepping model and its cache after a prompt, which the torch backend reads."""
    model = make_model(variant, precision_of(backend)[0], kernel_backend="torch", **overrides)
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache)
    return stepping(model, backend), cache


@torch.no_grad()
def read(model, cache, tokens, **columns):
    """Logits of one call for each token."""
    logits = []
    for t in range(tokens.shape[1]):
        now = {name: value[:, : value.shape[1] - tokens.shape[1] + t + 1] for name, value in columns.items()}
        logits.append(model(tokens[:, t : t + 1], cache=cache, **now).logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("variant", "backend"),
    [
        *((v, "torch") for v in VARIANTS),
        *((v, "triton") for v in VARIANTS if v not in TORCH_ONLY),
        *(pytest.param(v, "native", marks=pytest.mark.native) for v in VARIANTS),
    ],
)
@torch.no_grad()
def test_steps_give_what_the_whole_sequence_gives(variant, backend):
    """A batch padded on the left and in mid-row, over chunk and shard boundaries, one row with nothing but padding."""
    tokens, mask = make_tokens(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 7] = mask[2] = 0
    tokens, (dtype, close) = tokens * mask, precision_of(backend)
    layers = {} if variant in HYBRIDS else ONE_LAYER
    want = make_model(variant, dtype, **layers)(tokens, attention_mask=mask, use_cache=True, output_hidden_states=True)
    model = make_model(variant, dtype, **layers)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :6], attention_mask=mask[:, :6], cache=cache)
    refused = {"triton": ("mlp-muon",), "native": ("mlp-muon", "swiglu-forget")}.get(backend, ())
    if variant in refused:
        with pytest.raises(ValueError, match=".* must be .*, got '(muon|swiglu)'"):
            read(stepping(model, backend), cache, tokens[:, 6:9], attention_mask=mask[:, :9])
        return
    logits = read(stepping(model, backend), cache, tokens[:, 6:9], attention_mask=mask[:, :9])
    last = model(tokens[:, 9:], attention_mask=mask, cache=cache, output_hidden_states=True)
    torch.testing.assert_close(torch.cat([logits, last.logits], 1), want.logits[:, 6:], **close)
    for ours, theirs in zip(last.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[:, 9:], **close)
    assert_same_states(cache, want.cache, **close)
    assert cache.get_seq_length() == 10 and memory_cache_layers(cache)[0].stack is not None


@EACH
@pytest.mark.parametrize("variant", ["mlp-momentum-forget", "linear-plain-two-locals"])
def test_greedy_generation_is_the_most_probable_token_of_the_whole_sequence(variant, backend, monkeypatch):
    dtype, _ = precision_of(backend)
    calls = []
    step = TNTMemoryLayer._step
    monkeypatch.setattr(TNTMemoryLayer, "_step", lambda self, *args: calls.append(self) or step(self, *args))
    greedy = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    rows = torch.cat([torch.tensor([[0, 0], [5, 9]]), make_tokens(2, 5)], 1)
    mask = (rows > 0).long()
    model = make_model(variant, dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(rows[:, :-1], attention_mask=mask[:, :-1], cache=cache)
    got = stepping(model, backend).generate(rows, attention_mask=mask, cache=cache, **greedy)
    assert len(calls) == 4 * 2
    with torch.no_grad():
        all_real = torch.cat([mask, mask.new_ones(2, 4)], 1)
        want = make_model(variant, dtype)(got.sequences, attention_mask=all_real).logits[:, 6:-1]
    assert torch.equal(got.sequences[:, 7:], want.argmax(-1))
    torch.testing.assert_close(torch.stack(got.logits, 1), want.float())  # generate() keeps them in float32


@EACH
@torch.no_grad()
def test_a_prompt_of_one_token_and_an_empty_cache(backend):
    """Also one of which a row is padding, whose memories have then read nothing."""
    dtype, close = precision_of(backend)
    tokens, mask = make_tokens(2, 3), torch.tensor([[1, 1, 1], [0, 1, 1]])
    want = make_model("linear-momentum-chunk", dtype, **ONE_LAYER)(tokens * mask, attention_mask=mask, use_cache=True)
    model = stepping(make_model("linear-momentum-chunk", dtype, **ONE_LAYER), backend)
    cache = DynamicCache(config=model.config)
    logits = read(model, cache, tokens * mask, attention_mask=mask)
    torch.testing.assert_close(logits, want.logits, **close)
    assert_same_states(cache, want.cache, **close)
    with torch.inference_mode():  # buffers made outside of it may be written within, and those made within outside
        inside = DynamicCache(config=model.config)
        read(model, inside, tokens[:, :1])
        model(tokens[:, 1:2], cache=cache)
    read(model, inside, tokens[:, 1:])
    assert inside.layers[0].memories["local0"].position.tolist() == [3, 3]


LINEAR = "linear-plain-two-locals"


@EACH
@pytest.mark.parametrize("variant", ["linear-momentum-chunk", LINEAR])
@torch.no_grad()
def test_a_stepped_cache_can_do_what_every_cache_can(variant, backend, tmp_path):
    """Rows reordered, repeated, selected, copied, saved, loaded, moved; then a longer call and steps again."""
    dtype, close = precision_of(backend)
    tokens, more = make_tokens(2, 5), make_tokens(3, 4, seed=2)
    torch_model = make_model(variant, dtype, **ONE_LAYER)
    want = DynamicCache(config=torch_model.config)
    torch_model(tokens, cache=want)
    model, cache = prompt_read(variant, tokens[:, :3], backend, **ONE_LAYER)
    read(model, cache, tokens[:, 3:])
    kept = copy.deepcopy(cache)
    for each in (want, cache):
        each.batch_repeat_interleave(2)
        each.reorder_cache(torch.tensor([3, 0, 1, 2]))
        each.batch_select_indices(torch.tensor([0, 3, 1]))
    assert cache.layers[0].stack is None
    assert_same_states(cache, want, **close)

    save_cache(cache, tmp_path / "cache.safetensors")
    loaded = load_cache(tmp_path / "cache.safetensors", model.config)
    copied = copy.deepcopy(cache)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    wanted = torch_model(more, cache=want).logits
    for each in (cache, loaded, copied):
        logits = [read(model, each, more[:, :1])]
        model.config.kernel_backend = "torch"
        logits.append(model(more[:, 1:3], cache=each).logits)
        logits.append(read(stepping(model, backend), each, more[:, 3:]))
        torch.testing.assert_close(torch.cat(logits, 1), wanted, **close)
        assert_same_states(each, want, **close)
    # A deep copy of a stepped cache has states of its own: the steps above did not reach it.
    fresh = DynamicCache(config=model.config)
    model.config.kernel_backend = "torch"
    model(tokens, cache=fresh)
    assert_same_states(kept, fresh, **close)


@EACH
@torch.no_grad()
def test_buffers_keep_their_addresses_over_prompts(backend):
    """What a captured CUDA graph needs: the next prompt's states are moved into the buffers of the last one."""
    tokens = make_tokens(2, 6)
    model, cache = prompt_read("linear-momentum-chunk", tokens[:, :4], backend, **ONE_LAYER)
    layer = cache.layers[0]
    read(model, cache, tokens[:, 4:])

    def addresses():
        stack = layer.stack
        return [t.data_ptr() for t in (stack.weights, stack.projection, stack.position, layer.conv_tail)]

    before, want = addresses(), {name: t.clone() for name, t in state_tensors(cache).items()}
    for _ in range(2):
        cache.reset()
        model.config.kernel_backend = "torch"
        model(tokens[:, :4], cache=cache)
        read(stepping(model, backend), cache, tokens[:, 4:])
        assert addresses() == before and cache.get_seq_length() == 6
        for name, t in state_tensors(cache).items():
            torch.testing.assert_close(t, want[name], rtol=0, atol=0)
    cache.reset()
    read(model, cache, tokens[:, :1])  # the convolution's zeros before the first token, too
    fresh = DynamicCache(config=model.config)
    read(model, fresh, tokens[:, :1])
    assert addresses() == before
    assert_same_states(cache, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch", "auto", "reference"])
def test_where_states_must_not_change_the_call_is_no_step(backend, monkeypatch):
    """A cache that is only read, no cache, several tokens, gradients, the reference."""

    def refuse(*args):
        raise AssertionError("stepped")

    tokens = make_tokens(2, 4)
    model, cache = prompt_read("linear", tokens, backend, **ONE_LAYER)
    monkeypatch.setattr(TNTMemoryLayer, "_step", refuse)
    # What the other path computes, and on which backend, is not at stake here.
    monkeypatch.setattr(TNTMemoryLayer, "_read", lambda self, x, *args: x.new_zeros(*x.shape[:2], 2, 16))
    with torch.no_grad():
        model(tokens[:, :1], cache=cache, use_cache=False)
        model(tokens[:, :1], use_cache=True)
        model(tokens[:, :2], cache=cache)
        with nullcontext() if backend == "reference" else pytest.raises(AssertionError, match="stepped"):
            model(tokens[:, :1], cache=cache)
    model(tokens[:, :1], cache=cache)


@EACH
@torch.no_grad()
def test_a_column_that_does_not_fit_is_refused(backend):
    tokens = make_tokens(2, 4)
    model, cache = prompt_read("linear", tokens, backend, **ONE_LAYER)
    token = tokens[:, :1]
    with pytest.raises(ValueError, match=r"= \(2, 1\) or \(2, 5\) \(4 tokens are in the cache\), got \(2, 3\)"):
        model(token, cache=cache, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"position_ids must have shape \(2, 1\) or \(1, 1\), got \(2, 5\)"):
        model(token, cache=cache, position_ids=torch.ones(2, 5))
    with pytest.raises(ValueError, match="holds 2 rows but the batch has 1"):
        model(token[:1], cache=cache)
    model(token, cache=cache)
    model.config.local_chunk_sizes = [2, 4]
    with pytest.raises(ValueError, match=r"was filled by a model with local_chunk_sizes=\[4\] \(now \[2, 4\]\)"):
        model(token, cache=cache)
    with pytest.raises(ValueError, match="one entry for each of the model's 1 local memories"):
        model(token, cache=DynamicCache(config=model.config))


class CountOperators(TorchDispatchMode):
    """How many of torch's operators are called, views not counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        self.count += not is_view
        return function(*args, **kwargs or {})


@ON_CPU
@torch.no_grad()
def test_a_token_takes_few_operators_whatever_the_rows_and_memories(backend):
    """Operators are what a step of a small model costs: 95 a layer were counted with the torch backend, 48 with the
    native step. A boundary takes a few more, so the positions are such that there is none."""
    counts = {}
    for rows, chunk_sizes in ((1, [8]), (3, [8]), (3, [8, 8, 8])):
        model, cache = prompt_read("mlp", make_tokens(rows, 2), backend, local_chunk_sizes=chunk_sizes)
        token = make_tokens(rows, 1)
        model(token, cache=cache)
        with CountOperators() as counted:
            model(token, cache=cache)
        counts[rows, len(chunk_sizes)] = counted.count
    layers = model.config.num_hidden_layers
    assert counts[1, 1] == counts[3, 1] <= {"torch": 105, "native": 55}[backend] * layers
    # A gate's product, and with the torch backend the product with its base step size.
    a_memory = {"torch": 2, "native": 1}[backend]
    assert counts[3, 3] - counts[3, 1] <= 2 * a_memory * layers + layers


@ON_CPU
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@torch.no_grad()
def test_half_precision_gives_what_the_reference_gives(precision, backend):
    """Memories and gates stay in float32; projections are rounded to 8 bits (4e-3) in both, at other places.

    Without normalised projections: the first of a shard is k or −k by the sign of k·q, a matter of rounding.
    """
    options = {"initializer_range": 0.05, "memory_base_lr": 0.1, "normalize_projection": False}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    tokens, results = make_tokens(2, 9), {}
    for stepper in ("reference", backend):
        model = make_model("mlp-momentum-forget", dtype, **options)
        cache = DynamicCache(config=model.config)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            model(tokens[:, :5], cache=cache)
            results[stepper] = read(stepping(model, stepper), cache, tokens[:, 5:]), state_tensors(cache)
    (got, got_states), (want, want_states) = results[backend], results["reference"]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02 * want.abs().max().item())
    for name, state in got_states.items():
        assert state.dtype == want_states[name].dtype, name
        assert (state.double() - want_states[name].double()).norm() <= 0.02 * want_states[name].double().norm(), name


@ON_CPU
@torch.no_grad()
def test_adapters_are_not_bypassed(backend):
    """PEFT's layers, which are called and never read from."""
    peft = pytest.importorskip("peft")
    tokens, (dtype, close) = make_tokens(2, 8), precision_of(backend)
    base = make_model("mlp", dtype, **ONE_LAYER)
    plain = base(tokens).logits
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "lr_gate"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora).to(dtype).eval()
    want = model(tokens, use_cache=True)
    cache = DynamicCache(config=base.config)
    model(tokens[:, :4], cache=cache)
    stepping(base, backend)
    logits = read(model, cache, tokens[:, 4:])
    torch.testing.assert_close(logits, want.logits[:, 4:], **close)
    assert (logits - plain[:, 4:]).abs().max() > 1e-3


@ON_CPU
@torch.no_grad()
def test_hooks_see_and_may_change_what_a_layers_modules_give(backend):
    """The convolution twice as strong by a hook is one with twice the weights; a gate's logits by a hook, its bias."""
    tokens = make_tokens(2, 8)
    _, close = precision_of(backend)
    (hooked, cache), (changed, other) = (prompt_read("mlp", tokens[:, :5], backend, **ONE_LAYER) for _ in range(2))
    for model, states in ((hooked, cache), (changed, other)):
        read(model, states, tokens[:, 5:6])
    layer, seen = hooked.model.layers[0].memory, []
    layer.conv.register_forward_hook(lambda module, args, out: seen.append(out[0]) or (2 * out[0], out[1]))
    layer.local_memories[0].lr_gate.register_forward_hook(lambda module, args, out: out + 0.5)
    changed.model.layers[0].memory.conv.weight.mul_(2)
    changed.model.layers[0].memory.local_memories[0].lr_gate.bias.add_(0.5)
    logits = read(hooked, cache, tokens[:, 6:])
    torch.testing.assert_close(logits, read(changed, other, tokens[:, 6:]), **close)
    assert_same_states(cache, other, **close)
    assert [y.shape for y in seen] == [(2, 1, 96)] * 2


@torch.no_grad()
def test_auto_steps_by_torch_where_the_kernel_fails(monkeypatch):
    """As on a GPU whose driver refuses it: every token of the model is read, after one warning."""
    tokens = make_tokens(2, 10)
    want = make_model("linear", **ONE_LAYER)(tokens, use_cache=True)
    model, cache = prompt_read("linear", tokens[:, :4], "auto", **ONE_LAYER)
    picks_triton = BackendChoice("triton", "as on a GPU")
    monkeypatch.setattr(memory_layer, "step_backend_for", lambda *_: picks_triton)
    monkeypatch.setattr(step, "choose_step_backend", lambda *_: picks_triton)
    monkeypatch.setattr(probe, "failure", lambda configuration: "decode_kernel does not compile")
    backends.warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match="decode_kernel does not compile"):
        logits = read(model, cache, tokens[:, 4:])
    torch.testing.assert_close(logits, want.logits[:, 4:], **EXACT)
    assert_same_states(cache, want.cache, **EXACT)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph():
    """With `fullgraph=True` nothing may ask a tensor for its contents: no step waits for the device."""
    torch._dynamo.reset()
    tokens, mask = make_tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :2] = 0
    want = make_model("linear", **ONE_LAYER)(tokens * mask, attention_mask=mask, use_cache=True)
    model = make_model("linear", **ONE_LAYER)
    cache = DynamicCache(config=model.config)
    model((tokens * mask)[:, :4], attention_mask=mask[:, :4], cache=cache)
    read(stepping(model), cache, tokens[:, 4:5], attention_mask=mask[:, :5].contiguous())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    logits = [
        compiled(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1].clone(), cache=cache).logits
        for t in range(5, 10)
    ]
    torch.testing.assert_close(torch.cat(logits, 1), want.logits[:, 5:], **EXACT)
    assert_same_states(cache, want.cache, **EXACT)
    assert counter.frame_count <= 3, "compiled anew for every length"
    torch._dynamo.reset()


@pytest.mark.slow
@ON_CPU
@torch.no_grad()
def test_a_compiled_model_on_a_cpu_breaks_its_graph_and_is_right(backend):
    torch._dynamo.reset()
    tokens, (dtype, close) = make_tokens(2, 10), precision_of(backend)
    want = make_model("linear", dtype, **ONE_LAYER)(tokens, use_cache=True)
    model, cache = prompt_read("linear", tokens[:, :4], backend, **ONE_LAYER)
    compiled = torch.compile(model, backend="aot_eager")
    logits = [compiled(tokens[:, t : t + 1], cache=cache).logits for t in range(4, 10)]
    torch.testing.assert_close(torch.cat(logits, 1), want.logits[:, 4:], **close)
    assert_same_states(cache, want.cache, **close)
    torch._dynamo.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_model_decodes():
    """Greedy tokens of graph replays = those of plain calls, over two prompts with the same graph."""
    prompts = [make_tokens(2, 9, seed=seed).cuda() for seed in (1, 2)]
    model = make_model("mlp-momentum-forget", dtype=torch.float32, kernel_backend="triton").cuda()
    cache, graph, token = DynamicCache(config=model.config), None, torch.zeros(2, 1, dtype=torch.long, device="cuda")
    for prompt in prompts:
        plain = DynamicCache(config=model.config)
        first = model(prompt, cache=plain).logits[:, -1:].argmax(-1)
        want = [first]
        for _ in range(12):
            want.append(model(want[-1], cache=plain).logits.argmax(-1))
        cache.reset()
        model(prompt, cache=cache)
        token.copy_(first)
        got = [first, model(token, cache=cache).logits.argmax(-1)]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(token, cache=cache).logits
        while len(got) < len(want):
            token.copy_(got[-1])
            graph.replay()
            got.append(out.argmax(-1))
        assert torch.equal(torch.cat(got, 1), torch.cat(want, 1))


@pytest.mark.parametrize("variant", TORCH_ONLY)
@torch.no_grad()
def test_triton_refuses_other_kinds_of_memory(variant):
    with pytest.raises(ValueError, match="memory_type=.* with 3 linear maps; use memory_type='mlp'") as error:
        make_model(variant, torch.float32, kernel_backend="triton")(make_tokens(1, 4))
    assert "triton" in str(error.value)
    model, cache = prompt_read(variant, make_tokens(1, 4), "torch", **ONE_LAYER)
    with pytest.raises(ValueError, match="with 3 linear maps"):
        stepping(model, "triton")(make_tokens(1, 1), cache=cache)
