"""One token through all memories of a layer in C++, against the reference.

The step computes in float32, the reference in float64 on the same float32 numbers. float32 rounds at 6e-8; over six
tokens of some hundred operations 2e-6 of a tensor's largest entry is the most that was seen, and a wrong term is above
1e-3.
"""

import copy
import gc
import resource
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from decode_cases import GLOBAL, GLOBALS, KIND_CASES, LINEAR, MIXED, SMALL, TILED, named, several, step_memory
from memory_cases import Case, assert_same, call, first_state, make_inputs, pick

from modeling_tnt.kernels.native import step as native
from modeling_tnt.kernels.stack import MemoryStack
from modeling_tnt.kernels.step import step_memories
from modeling_tnt.kernels.types import MemoryGates

pytestmark = pytest.mark.native

TOLERANCE = 2e-5
KINDS = [case for case in KIND_CASES if case.memory_type in native.KINDS]
# Sizes that fill no vector, one that is smaller than the other, chunks of one token.
ODD = [
    Case(**SMALL | {"head_dim": 5, "hidden": 19}, rule="both", projection="shard_normalized"),
    Case(**SMALL | {"head_dim": 33, "hidden": 7}, rule="token_scale", projection="chunk"),
    Case(**SMALL | {"head_dim": 21}, memory="linear", rule="momentum", projection="chunk_normalized", bias=False),
    Case(**SMALL | {"chunk_size": 1}, rule="token_scale"),
    Case(**SMALL | {"chunk_size": 1}, rule="both", projection="chunk"),
    Case(**SMALL | {"hidden": 8}, **GLOBAL, memory="mlp3", rule="both"),
]
MLP = Case(**SMALL | {"heads": 2}, rule="both", projection="shard", chunk_size=3, shard_length=6)


def single(x):
    """The numbers of a case in float32, and in float64 as the reference gets them."""
    x = {name: t.detach().float() for name, t in x.items()}
    return x, {name: t.double() for name, t in x.items()}


def step(q, k, v, memories, stack, active=None):
    """`step_memories`, past the choice of a backend."""
    gates = [[getattr(m, name) for m in memories] for name in MemoryGates._fields]
    gates = MemoryGates(*(None if gate[0] is None else torch.stack(gate) for gate in gates))
    options = tuple(m.step_options for m in memories)
    scales = [m.token_scale for m in memories]
    return native.launch_step(q, k, v, gates, options, [m.params for m in memories], scales, stack, active)


def decode(cases, inputs, stack=None):
    """Outputs of a layer with these memories, all reading the q, k, v of the first, and their final states."""
    stack = stack or MemoryStack([first_state(case, x) for case, x in zip(cases, inputs, strict=True)])
    outputs = []
    for t in range(cases[0].length):
        memories = [step_memory(case, x, t) for case, x in zip(cases, inputs, strict=True)]
        outputs.append(step(*(inputs[0][name][:, t] for name in "qkv"), memories, stack))
    return torch.stack(outputs, 1), stack.states


def assert_close(got, want, tolerance=TOLERANCE):
    """Results of a step and of the reference in float64."""
    assert_same({name: t.double() if t.is_floating_point() else t for name, t in got.items()}, want, tolerance)


@pytest.mark.parametrize("case", LINEAR + MIXED + GLOBALS + TILED + KINDS + ODD, ids=str)
@torch.no_grad()
def test_token_by_token_is_the_reference(case):
    x, exact = single(make_inputs(case))
    o, (state,) = decode([case], [x])
    assert_close(named(o, state), named(*call(case, "reference", exact)))


@pytest.mark.parametrize("rule", ["both", "token_scale", "plain"])
@torch.no_grad()
def test_many_tokens(rule):
    """From the learned start, over ten shards; what rounding does to the first tokens, later ones do not forget."""
    case = MLP.with_(rule=rule, start=None, length=61, batch=2)
    x, exact = single(make_inputs(case))
    o, (state,) = decode([case], [x])
    assert_close(named(o, state), named(*call(case, "reference", exact)), 10 * TOLERANCE)


@pytest.mark.parametrize(("rule", "memory"), [("both", "linear"), ("token_scale", "linear"), ("decay", "mlp")])
@torch.no_grad()
def test_several_memories_of_one_layer(rule, memory):
    cases = several(rule, memory)
    inputs = [make_inputs(case) for case in cases]
    for x in inputs[1:]:
        x.update({name: inputs[0][name] for name in "qkv"})
    inputs, exact = zip(*map(single, inputs), strict=True)
    o, states = decode(cases, inputs)
    want = [call(case, "reference", x) for case, x in zip(cases, exact, strict=True)]
    for got, (_, state) in zip(states, want, strict=True):
        assert_close(named(o, got), named(sum(each for each, _ in want), state))


@torch.no_grad()
def test_rows_without_a_token_are_left_alone():
    x, _ = single(make_inputs(MLP))
    stack = MemoryStack([first_state(MLP, x)])
    before, whole = stack.states[0].clone(), copy.deepcopy(stack)
    arguments = [*(x[name][:, 0] for name in "qkv"), [step_memory(MLP, x, 0)]]
    o = step(*arguments, stack, torch.tensor([True, False, True]))
    want = step(*arguments, whole)
    assert not o[1].any() and stack.states[0].position.tolist() == [9, 3, 16]
    assert torch.equal(o[::2], want[::2])
    for name, t in stack.states[0].tensors().items():
        assert torch.equal(t[1], before.tensors()[name][1]), name
        assert torch.equal(t[::2], whole.states[0].tensors()[name][::2]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes_are_widened(dtype):
    """Tokens, gates and parameters; the state stays in float32 and the output is rounded once."""
    exact = {name: t.detach().to(dtype).double() for name, t in make_inputs(MLP).items()}
    exact |= {name: t.float().double() for name, t in exact.items()}  # float64 is narrowed
    x = {name: t.to(dtype) for name, t in exact.items()}
    x |= {name: t.float() for name, t in x.items() if name.startswith("initial.")}
    o, (state,) = decode([MLP], [x])
    assert o.dtype == dtype and state.weights.w1.dtype == torch.float32
    got, (want_o, want) = named(o, state), call(MLP, "reference", exact)
    rounding = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: TOLERANCE}[dtype]
    assert_close({"o": got.pop("o")}, {"o": want_o}, rounding)
    assert_close(got, {f"state.{name}": t for name, t in want.tensors().items()})


@torch.no_grad()
def test_every_half_is_widened_exactly():
    """All finite numbers of either type, as the learned weights that a shard begins with, unchanged by a step of 0."""
    for dtype in (torch.float16, torch.bfloat16):
        numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        case = Case(memory="linear", norm=False, batch=1, heads=16, head_dim=64, length=1, start=(0,))
        x, _ = single(make_inputs(case))
        x["lr"].zero_()
        x["params.w1"] = numbers = torch.where(numbers.isfinite(), numbers, 0).view(16, 64, 64)
        _, (state,) = decode([case], [x])
        assert torch.equal(state.weights.w1[0], numbers.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [None, 1, 2, 4])
@torch.no_grad()
def test_a_layer_steps_at_once(kernel_size, dtype):
    """The convolution, silu, the length of q and k (one of which is nothing), the gates' sigmoids, and now and then the
    output's norm and gate, over tokens of which a row misses one. q, k, v, gate and the tail are of `dtype`; nothing is
    rounded to it in between."""
    x, _ = single(make_inputs(MLP))
    g = torch.Generator().manual_seed(0)
    rows, H, D = MLP.batch, MLP.heads, MLP.head_dim
    channels = 3 * H * D
    taps = None if kernel_size is None else torch.randn(channels, kernel_size, generator=g)
    tail = None if kernel_size is None else torch.randn(rows, kernel_size - 1, channels, generator=g).to(dtype)
    got, want = (MemoryStack([first_state(MLP, x)]) for _ in range(2))
    memory = step_memory(MLP, x, 0)
    for t in range(MLP.length):
        active = torch.tensor([True, t != 2, True])
        projected = torch.randn(rows, 1, channels, generator=g).to(dtype)
        projected[0, 0, : D * (t == 0)] = 0
        logits = torch.randn(3, rows, 1, H, generator=g)
        window = projected.float()
        if taps is not None:
            window = torch.cat([tail, projected], 1)
            window, after = window.float() * taps.t(), torch.where(active[:, None, None], window[:, 1:], tail)
        norm = (torch.rand(D, generator=g), 1e-5) if t % 3 else None
        gate = torch.randn(rows, 1, H * D, generator=g).to(dtype) if t % 3 == 2 else None
        o = native.launch_layer_step(
            *projected.split(H * D, -1), taps, tail, MemoryGates(*([one] for one in logits)), [0.3],
            (memory.step_options,), [memory.params], [None], got, active, norm, gate,
        )  # fmt: skip
        q, k, v = F.silu(window.sum(1)).view(rows, 3, H, D).unbind(1)
        lr, momentum, decay = logits[:, :, 0].sigmoid()
        gated = memory._replace(lr=0.3 * lr, momentum=momentum, decay=decay)
        expected = step(*(F.normalize(one, dim=-1, eps=1e-6) for one in (q, k)), v, [gated], want, active)
        if norm is not None:
            expected = F.rms_norm(expected, (D,), *norm)
        if gate is not None:
            expected = expected * F.silu(gate.float()).view(rows, H, D)
        assert o.dtype == torch.float32 and o.shape == (rows, 1, H, D)
        assert_same(named(o.squeeze(1), got.states[0]), named(expected, want.states[0]), TOLERANCE)
        assert taps is None or torch.equal(tail, after)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_result_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(native, "NUMBERS_A_THREAD", 1)
    cases = [case.with_(memory="mlp") for case in several("both", "mlp")]
    inputs = [single(make_inputs(case))[0] for case in cases]
    results = []
    for count in (1, 2, 5):
        with threads(count):
            o, states = decode(cases, inputs)
        results.append([named(o, state) for state in states])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same(got, want, 0.0)


@torch.no_grad()
def test_the_state_is_written_in_place_and_heads_keep_counters_of_their_own():
    x, _ = single(make_inputs(MLP))
    stack = MemoryStack([first_state(MLP, x)])
    states, buffers = stack.states, [t.data_ptr() for t in (stack.weights, stack.projection, stack.position)]
    version = stack.weights._version
    step(*(x[name][:, 0] for name in "qkv"), [step_memory(MLP, x, 0)], stack)
    assert stack.states is states and stack.position[0].tolist() == [[9, 9], [4, 4], [16, 16]]
    assert [t.data_ptr() for t in (stack.weights, stack.projection, stack.position)] == buffers
    assert stack.weights._version > version  # autograd knows


@torch.no_grad()
def test_inputs_may_be_strided():
    x, exact = single(make_inputs(MLP.with_(length=1)))
    want = named(*call(MLP.with_(length=1), "reference", exact))
    q, k, v = (x[name][:, 0] for name in "qkv")
    x["params.w1"], x["params.norm_bias"] = (t.mT.contiguous().mT for t in (x["params.w1"], x["params.norm_bias"]))
    wide = torch.stack([q, k, v], 1).repeat(1, 1, 1, 2)[..., :16]  # as views of one projection's output
    for views in (wide.unbind(1), [t.mT.contiguous().mT for t in (q, k, v)]):
        stack = MemoryStack([first_state(MLP, x)])
        o = step(*views, [step_memory(MLP, x, 0)], stack)
        assert_close(named(o[:, None], stack.states[0]), want)


@torch.no_grad()
def test_parameters_may_change_between_two_tokens():
    """Written in place, replaced, of another dtype: what is learned is seen where a shard begins, the norm at once."""
    case = MLP.with_(start=(5, 4, 0), length=4)
    x, _ = single(make_inputs(case))
    stack = MemoryStack([first_state(case, x)])
    changes = [
        lambda t: t.mul_(1.5), lambda t: t * 1.25, lambda t: t.to(torch.bfloat16), lambda t: t,
    ]  # fmt: skip
    for t, change in enumerate(changes):
        before = stack.states[0].clone().map(lambda s: s.double() if s.is_floating_point() else s)
        o = step(*(x[n][:, t] for n in "qkv"), [step_memory(case, x, t)], stack)
        now = pick({name: p.double() for name, p in x.items()}, slice(None), slice(t, t + 1))
        assert_close(named(o[:, None], stack.states[0]), named(*call(case, "reference", now, state=before)))
        x |= {name: change(p) for name, p in x.items() if name.startswith("params.")}


@torch.no_grad()
def test_a_state_of_another_chunk_size_is_read_on():
    """Where a chunk begins, the stored anchor is not looked at; nor is a projection "since the start of the chunk"."""
    case = LINEAR[17].with_(start=(4, 12, 16))
    x, _ = single(make_inputs(case))
    x["initial.projection"] = torch.ones_like(x["initial.projection"])
    o, (state,) = decode([case], [x])
    exact = {name: t.double() for name, t in x.items()}
    assert_close(named(o, state), named(*call(case, "reference", exact)))


@torch.no_grad()
def test_backends_and_chunk_sizes_may_take_turns():
    """What the torch step knows of the anchors holds for its own chunk sizes alone."""
    case = MLP.with_(start=None, length=12, shard_length=None, projection="none")
    x, _ = single(make_inputs(case))
    turns, plain = (MemoryStack([first_state(case, x)]) for _ in range(2))
    for t in range(case.length):
        memory = step_memory(case, x, t)._replace(chunk_size=3 if t % 4 else 2)
        arguments = [x[name][:, t] for name in "qkv"]
        if t % 4 == 3:
            got = step(*arguments, [memory], turns)
        else:
            got = step_memories(*arguments, [memory], turns, backend="torch")
        want = step_memories(*arguments, [memory], plain, backend="reference")
        assert_same(named(got, turns.states[0]), named(want, plain.states[0]), TOLERANCE)


@torch.no_grad()
def test_copies_of_a_stack_step_apart():
    x, _ = single(make_inputs(MLP))
    stack = MemoryStack([first_state(MLP, x)])
    arguments = [*(x[name][:, 0] for name in "qkv"), [step_memory(MLP, x, 0)]]
    step(*arguments, stack)
    other, before = copy.deepcopy(stack), stack.states[0].clone()
    step(*arguments, other)
    assert_same(named(x["q"], stack.states[0]), named(x["q"], before), 0.0)
    assert other.stepper is not stack.stepper and other.position[0].tolist() == [[10, 10], [5, 5], [17, 17]]


def test_a_graph_with_states_that_were_written_since_is_refused():
    x, _ = single(make_inputs(MLP))
    stack = MemoryStack([first_state(MLP, x)])
    read = stack.states[0].weights.b1 * x["params.b1"].requires_grad_()
    x["params.b1"] = x["params.b1"].detach()
    step(*(x[name][:, 0] for name in "qkv"), [step_memory(MLP, x, 0)], stack)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


@torch.no_grad()
def test_a_thousand_steps_leave_nothing_behind():
    """At most a page in eight steps; a step's outputs alone are larger."""
    case = MLP.with_(batch=8, start=None, heads=4, head_dim=64)
    x, _ = single(make_inputs(case))
    stack = MemoryStack([first_state(case, x)])
    arguments = [*(x[name][:, 0] for name in "qkv"), [step_memory(case, x, 0)]]

    def steps(count):
        for _ in range(count):
            step(*arguments, stack)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = steps(200)
    assert steps(1000) - before <= 512


def test_what_is_not_for_these_kernels():
    cpu = torch.device("cpu")
    assert native.obstacle("mlp", 3, "gradient", 24, 7, cpu) is None
    assert native.obstacle("linear", 1, "gradient", 24, 24, cpu, torch.float32) is None
    for arguments, words in (
        (("swiglu", 3, "gradient", 16, 32, cpu), "memory_type .* must be one of 'linear', 'mlp', got 'swiglu'"),
        (("mlp", 2, "muon", 16, 32, cpu), "update .* must be 'gradient', got 'muon'"),
        (("mlp", 2, "gradient", 16, 32, torch.device("cuda")), "must be on a CPU, got cuda"),
        (("mlp", 2, "gradient", 16, 32, cpu, torch.float64), "must be float32, got float64"),
    ):
        with pytest.raises(AssertionError, match=words):
            assert native.obstacle(*arguments) is None, native.obstacle(*arguments)
