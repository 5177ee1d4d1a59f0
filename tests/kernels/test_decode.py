"""One token through all memories of a layer, against the reference: in one launch, in Triton's interpreter, and in the
few operations of the torch backend.

In float64 both do the same operations in another order, so the tolerance of the equivalence suite (1e-10) holds here,
too. In float32 rounding (6e-8) summed over a few hundred operations stays below 1e-5; a norm that divides by a small
deviation takes one more digit, and a wrong term is above 1e-3.
"""

import copy
import os

import pytest
import torch
from decode_cases import GLOBALS, KIND_CASES, LINEAR, MIXED, SMALL, TILED, named, several, step_memory
from memory_cases import (
    FLOAT64_TOLERANCE,
    MUON_CASES,
    Case,
    assert_same,
    call,
    first_state,
    make_inputs,
    pick,
)

from modeling_tnt.kernels import MemoryParams
from modeling_tnt.kernels.stack import MemoryStack
from modeling_tnt.kernels.step import choose_step_backend, step_memories

pytest.importorskip("triton")

FLOAT32_TOLERANCE = 1e-4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see tests/conftest.py


@pytest.fixture(autouse=True)
def tensors_are_on_the_cpu(request):
    """Except in one test, so the others need the interpreter: with a GPU, TRITON_INTERPRET=1 pytest runs them."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") in ("torch", "reference"):
        return
    if not INTERPRETED and request.node.get_closest_marker("gpu") is None:
        pytest.skip("the tensors are on the CPU, where kernels run with TRITON_INTERPRET=1 only")


@torch.no_grad()
def decode(cases, inputs, backend="triton"):
    """Outputs of a layer with these memories, all reading the q, k, v of the first, and their final states."""
    stack = MemoryStack([first_state(case, x) for case, x in zip(cases, inputs, strict=True)])
    q, k, v = (inputs[0][name] for name in "qkv")
    outputs = []
    for t in range(cases[0].length):
        memories = [step_memory(case, x, t) for case, x in zip(cases, inputs, strict=True)]
        outputs.append(step_memories(q[:, t], k[:, t], v[:, t], memories, stack, backend=backend))
    return torch.stack(outputs, 1), stack.states


BOTH = pytest.mark.parametrize("backend", ["triton", "torch"])
MUON = [case.with_(**SMALL | {"heads": 2}) for case in MUON_CASES]


@BOTH
@pytest.mark.parametrize("case", LINEAR + MIXED + GLOBALS + TILED, ids=str)
@torch.no_grad()
def test_token_by_token_is_the_reference(case, backend):
    x = make_inputs(case)
    o, (state,) = decode([case], [x], backend)
    assert_same(named(o, state), named(*call(case, "reference", x)), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("case", KIND_CASES, ids=str)
@torch.no_grad()
def test_every_kind_token_by_token_is_the_reference(case):
    x = make_inputs(case)
    o, (state,) = decode([case], [x], "torch")
    assert_same(named(o, state), named(*call(case, "reference", x)), FLOAT64_TOLERANCE)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", MUON, ids=str)
@torch.no_grad()
def test_a_memory_that_learns_by_muon(case, backend):
    """Beside a local memory; Triton's kernel refuses."""
    local = case.with_(is_global=False, update="gradient", shard_length=8)
    x, y = make_inputs(case), make_inputs(local.with_(seed=1))
    o, states = decode([case, local], [x, y], backend)
    qkv = {name: x[name] for name in "qkv"}
    wants = [call(one, "reference", given) for one, given in ((case, x), (local, y | qkv))]
    assert_same({"o": o}, {"o": wants[0][0] + wants[1][0]}, FLOAT64_TOLERANCE * case.amplification)
    for got, (_, want) in zip(states, wants, strict=True):
        assert_same(got.tensors(), want.tensors(), FLOAT64_TOLERANCE * case.amplification)
    with pytest.raises(ValueError, match="update .* must be 'gradient', got 'muon'"):
        decode([case], [x], "triton")


@torch.no_grad()
def test_a_step_of_muon_without_a_step_size():
    """Weights that decay towards an anchor that they are equal to stay there: no rounding that would be a step."""
    case = MUON[3].with_(dtype=torch.float32, start=None, length=9)
    x = make_inputs(case)
    x["lr"].zero_()
    _, (state,) = decode([case], [x], "torch")
    torch.testing.assert_close(state.weights.w1, x["params.w1"].expand_as(state.weights.w1))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [MIXED[2].with_(heads=1), LINEAR[18]], ids=str)
@torch.no_grad()
def test_single_precision_against_the_reference_in_double(case, dtype, backend):
    """bfloat16 inputs and parameters: the step widens them, and rounds its output once (8 bits: 4e-3)."""
    x = {name: t.to(dtype) for name, t in make_inputs(case).items()}
    o, (state,) = decode([case], [x], backend)
    assert o.dtype == dtype and state.weights.w1.dtype == torch.float32
    want_o, want = call(case, "reference", {name: t.double() for name, t in x.items()})
    got = named(o.float(), state)
    assert_same({"o": got.pop("o")}, {"o": want_o.float()}, 1e-2 if dtype == torch.bfloat16 else FLOAT32_TOLERANCE)
    want = want.map(lambda t: t.float() if t.is_floating_point() else t)
    assert_same(got, {f"state.{name}": t for name, t in want.tensors().items()}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("rule", "memory"), [("both", "linear"), ("token_scale", "linear"), ("decay", "mlp")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@torch.no_grad()
def test_several_memories_of_one_layer(rule, memory, backend):
    cases = several(rule, memory)
    inputs = [make_inputs(case) for case in cases]
    for x in inputs[1:]:
        x.update({name: inputs[0][name] for name in "qkv"})
    o, states = decode(cases, inputs, backend)
    want = [call(case, "reference", x) for case, x in zip(cases, inputs, strict=True)]
    for got, (_, state) in zip(states, want, strict=True):
        assert_same(named(o, got), named(sum(each for each, _ in want), state))


@torch.no_grad()
def test_rows_without_a_token_are_left_alone():
    case = MIXED[2]
    x = make_inputs(case)
    want = {}
    for backend in ("triton", "torch"):
        stack = MemoryStack([first_state(case, x)])
        before = stack.states[0].clone()
        o = step_memories(
            *(x[name][:, 0] for name in "qkv"), [step_memory(case, x, 0)], stack,
            active=torch.tensor([True, False, True]), backend=backend,
        )  # fmt: skip
        assert not o[1].any() and stack.states[0].position.tolist() == [9, 3, 16]
        for name, t in stack.states[0].tensors().items():
            assert torch.equal(t[1], before.tensors()[name][1]), name
        want[backend] = named(o, stack.states[0])
    assert_same(want["triton"], want["torch"])


@BOTH
@torch.no_grad()
def test_the_state_is_written_in_place_and_heads_keep_counters_of_their_own(backend):
    case = MIXED[1]
    x = make_inputs(case)
    stack = MemoryStack([first_state(case, x)])
    states, buffers = stack.states, [t.data_ptr() for t in (stack.weights, stack.projection, stack.position)]
    given = first_state(case, x).clone()
    step_memories(*(x[name][:, 0] for name in "qkv"), [step_memory(case, x, 0)], stack, backend=backend)
    assert stack.states is states and states[0].position.tolist() == [9, 4, 16]
    assert stack.position[0].tolist() == [[9, 9], [4, 4], [16, 16]]
    assert [t.data_ptr() for t in (stack.weights, stack.projection, stack.position)] == buffers
    assert_same(named(x["q"], given), named(x["q"], first_state(case, x)))  # the stack holds copies
    stack.fill([given])
    assert_same(named(x["q"], stack.states[0]), named(x["q"], given))


@BOTH
@torch.no_grad()
def test_inputs_may_be_strided(backend):
    case = LINEAR[6].with_(length=1)
    x = make_inputs(case)
    want = named(*call(case, "reference", x))
    q, k, v = (x[name][:, 0] for name in "qkv")
    wide = torch.stack([q, k, v], 1).repeat(1, 1, 1, 2)[..., :16]  # as views of one projection's output
    for views in (wide.unbind(1), [t.mT.contiguous().mT for t in (q, k, v)]):
        stack = MemoryStack([first_state(case, x)])
        o = step_memories(*views, [step_memory(case, x, 0)], stack, backend=backend)
        assert_same(named(o[:, None], stack.states[0]), want)


@BOTH
@torch.no_grad()
def test_a_parameter_that_is_written_in_place_is_seen_at_the_next_reset(backend):
    case = LINEAR[6].with_(start=(7, 7, 7), length=2)
    x = make_inputs(case)
    stack = MemoryStack([first_state(case, x)])
    for t in range(2):
        before = stack.states[0].clone()
        o = step_memories(*(x[n][:, t] for n in "qkv"), [step_memory(case, x, t)], stack, backend=backend)
        want = call(case, "reference", pick(x, slice(None), slice(t, t + 1)), state=before)
        assert_same(named(o[:, None], stack.states[0]), named(*want))
        x["params.w1"].mul_(1.5)


@BOTH
@torch.no_grad()
def test_a_state_of_another_chunk_size_is_read_on(backend):
    """Where a chunk begins, the stored anchor is not looked at; nor is a projection "since the start of the chunk"."""
    case = LINEAR[17].with_(start=(4, 12, 16))
    x = make_inputs(case)
    x["initial.projection"] = torch.ones_like(x["initial.projection"])
    o, (state,) = decode([case], [x], backend)
    assert_same(named(o, state), named(*call(case, "reference", x)))


# Forks and threads of the compilers are what takes time below, not the kernel: one small memory is enough.
TINY = Case(**SMALL | {"memory": "linear", "rule": "both", "projection": "shard", "batch": 2, "start": (7, 2)})


def step_arguments(case, x, t=0):
    return [x[name][:, t] for name in ("q", "k", "v", "lr", "momentum", "decay")]


def stepper(case, x, stack):
    """A function of tensors for torch.compile."""
    x = {name: p.detach() for name, p in x.items()}

    def step(q, k, v, lr, momentum, decay):
        memory = step_memory(case, x, 0)._replace(lr=lr, momentum=momentum, decay=decay)
        return step_memories(q, k, v, [memory], stack, backend="triton")

    return step


@torch.no_grad()
def test_the_operator_keeps_the_rules_of_custom_operators():
    from modeling_tnt.kernels.fused import decode as module

    x, arguments = make_inputs(TINY), []
    stack = MemoryStack([first_state(TINY, x)])
    operator = module.decode_step
    try:
        module.decode_step = lambda *args: arguments.append(args)
        stepper(TINY, x, stack)(*(t.detach() for t in step_arguments(TINY, x)))
    finally:
        module.decode_step = operator
    torch.library.opcheck(operator, arguments[0])


@torch.no_grad()
def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    x = make_inputs(TINY)
    stack = MemoryStack([first_state(TINY, x)])
    other = copy.deepcopy(stack)
    eager = stepper(TINY, x, other)
    compiled = torch.compile(stepper(TINY, x, stack), fullgraph=True, backend="aot_eager")
    for t in range(3):
        assert torch.equal(compiled(*step_arguments(TINY, x, t)), eager(*step_arguments(TINY, x, t)))
    assert_same(named(x["q"], stack.states[0]), named(x["q"], other.states[0]), 0.0)
    torch._dynamo.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_step_goes_on_when_replayed():
    case = MIXED[2].with_(dtype=torch.float32)
    x = {name: t.cuda() for name, t in make_inputs(case).items()}
    want_o, want = call(case, "reference", x)
    stack = MemoryStack([first_state(case, x).map(torch.Tensor.cuda)])
    q, k, v, *gates = (t.clone() for t in step_arguments(case, x))
    memory = step_memory(case, x, 0)._replace(**dict(zip(("lr", "momentum", "decay"), gates, strict=True)))
    outputs = [step_memories(q, k, v, [memory], stack, backend="triton")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step_memories(q, k, v, [memory], stack, backend="triton")
    for t in range(1, case.length):
        for target, source in zip((q, k, v, *gates), step_arguments(case, x, t), strict=True):
            target.copy_(source)
        graph.replay()
        outputs.append(o.clone())
    assert_same(named(torch.stack(outputs, 1), stack.states[0]), named(want_o, want), FLOAT32_TOLERANCE)


def test_what_a_step_cannot_do_is_refused():
    case = MIXED[2].with_(length=1)
    x = {name: t.detach() for name, t in make_inputs(case).items()}
    state, memory = first_state(case, x), step_memory(case, x, 0)
    stack = MemoryStack([state])
    q, k, v = (x[name][:, 0] for name in "qkv")

    def step(error, match, q=q, memories=(memory,), stack=stack, **options):
        with pytest.raises(error, match=match):
            step_memories(q, k, v, list(memories), stack, **options)

    step(ValueError, r"shape \[rows, H, D\]", q=x["q"])
    step(ValueError, "2 memories|1 memories", memories=(memory, memory))
    step(TypeError, "MemoryStack", stack=[state])
    step(TypeError, r"memories\[0\] must be a StepMemory", memories=(memory.params,))
    step(ValueError, "lr must have shape", memories=(memory._replace(lr=x["lr"]),))
    step(ValueError, "must divide shard_length", memories=(memory._replace(chunk_size=3),))
    step(
        ValueError,
        "does not fit qk_projection='none'",
        memories=(memory._replace(qk_projection="none", normalize_projection=False),),
    )
    step(ValueError, "a global memory has no shard_length", memories=(memory._replace(is_global=True),))
    step(ValueError, "must both be given", memories=(memory._replace(momentum=None),))
    step(ValueError, "active must be a bool tensor", active=torch.ones(3))
    step(ValueError, "backend='cuda' is unknown", backend="cuda")
    step(RuntimeError, "no backward", q=q.clone().requires_grad_())
    pair = MemoryStack([state, state])
    step(ValueError, "decay must be given for all", memories=(memory, memory._replace(decay=None)), stack=pair)


def test_states_that_cannot_be_stacked_are_refused():
    states = [first_state(case, make_inputs(case)) for case in (MIXED[1], MIXED[1].with_(batch=2, start=(1, 2)))]
    with pytest.raises(ValueError, match=r"anchor.b1 of states\[1\] is .*; step such memories"):
        MemoryStack(states)
    with pytest.raises(ValueError, match="at least one"):
        MemoryStack([])
    stack = MemoryStack(states[:1])
    assert stack.fits(states[:1]) and not stack.fits(states[1:])
    assert not stack.fits([states[0].map(lambda t: t.float() if t.is_floating_point() else t)])


def test_the_choice_of_a_backend(monkeypatch):
    params = MemoryParams(torch.zeros(1, 16, 16))
    assert choose_step_backend("auto", params).name != "triton"  # on a CPU, see test_backends.py
    assert choose_step_backend("reference", params).name == "reference"
    assert choose_step_backend("triton", params).name == "triton"
    with pytest.raises(ValueError, match="head dim must be one of 16, 32, 64, 128, got 24"):
        choose_step_backend("triton", MemoryParams(torch.zeros(1, 24, 48)))
    with pytest.raises(ValueError, match="multiple of 16, got 40"):
        choose_step_backend("triton", MemoryParams(torch.zeros(1, 16, 40)))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        choose_step_backend("triton", MemoryParams(torch.zeros(1, 16, 16, device="meta")))
