"""Dtypes, autocast, memory layouts, and what a backend may not do to tensors that are not its own."""

import pytest
import torch
from float32_checks import inputs
from memory_cases import (
    BACKENDS,
    FAST_BACKENDS,
    FLOAT32_TOLERANCE,
    LOCAL_CASES,
    Case,
    assert_same,
    call,
    calls,
    make_inputs,
    native,
    run,
    summarize,
)

every_backend = pytest.mark.parametrize("backend", (*BACKENDS, native))
fast_backends = pytest.mark.parametrize("backend", (*FAST_BACKENDS, native))
every_call = calls((*BACKENDS, "native"))
fast_calls = calls((*FAST_BACKENDS, "native"))

# One rounding to bfloat16, half of 2^-7 of the value: what outputs and the gradients of q, k, v carry.
BFLOAT16_TOLERANCE = 4e-3


@calls(FAST_BACKENDS)
def test_float32_is_near_float64(case: Case, backend: str):
    """Against the float64 reference on the same numbers, at a longer chunk than elsewhere."""
    case = case.with_(chunk_size=8, shard_length=case.shard_length and 16, length=37, head_dim=8, hidden=16, batch=1)
    x = {name: t.detach().float().requires_grad_() for name, t in make_inputs(case).items()}
    got = summarize(*call(case, backend, x), x)
    assert got["o"].dtype == torch.float32
    x = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    want = summarize(*call(case, "reference", x), x)
    assert_same({n: t.double() if t.is_floating_point() else t for n, t in got.items()}, want, FLOAT32_TOLERANCE)


@every_call
def test_bfloat16_inputs(case: Case, backend: str):
    """Only q, k, v, o and their gradients are rounded: state and parameters stay in float32."""
    x = {name: t.detach().float() for name, t in make_inputs(case).items()}
    half = {name: t.bfloat16() if name in ("q", "k", "v") else t for name, t in x.items()}
    full = {name: t.float().requires_grad_() for name, t in half.items()}
    half = {name: t.requires_grad_() for name, t in half.items()}
    o, state = call(case, backend, half)
    assert o.dtype == torch.bfloat16
    got = summarize(o.float(), state, half)
    assert got["grad.q"].dtype == torch.bfloat16 and got["grad.params.w1"].dtype == torch.float32
    o, state = call(case, "reference", full)
    # The upstream gradient of o is rounded to bfloat16 on its way back, here as there.
    want = summarize(o.bfloat16().float(), state, full)
    rounded = ["o", "grad.q", "grad.k", "grad.v"]
    if backend == "native" and case.norm:  # makes this one of the rounded gradients of v
        rounded.append("grad.params.norm_bias")
    assert_same({n: got[n].float() for n in rounded}, {n: want[n] for n in rounded}, 2 * BFLOAT16_TOLERANCE)
    exact = [n for n in want if n not in rounded]
    assert_same({n: got[n] for n in exact}, {n: want[n] for n in exact}, FLOAT32_TOLERANCE * case.amplification)


@every_call
def test_bfloat16_parameters(case: Case, backend: str):
    """A model cast to bfloat16 has the same values in its memory as one that was rounded and kept in float32."""
    case = case.with_(dtype=torch.float32)
    x = make_inputs(case)
    half = {name: t.detach().bfloat16().requires_grad_() for name, t in x.items()}
    full = {name: t.detach().float().requires_grad_() for name, t in half.items()}
    o, state = call(case, backend, half)
    assert o.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for name, t in state.tensors().items() if name != "position")
    grads = torch.autograd.grad(o.float().sum(), list(half.values()), allow_unused=True)
    assert all(g is None or (g.dtype == torch.bfloat16 and g.isfinite().all()) for g in grads)
    want, _ = call(case, "reference", full)
    assert_same({"o": o.float()}, {"o": want}, BFLOAT16_TOLERANCE)


@every_call
def test_autocast_changes_nothing(case: Case, backend: str):
    case = case.with_(dtype=torch.float32)
    want = run(case, backend)
    x = make_inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = call(case, backend, x)
    got = summarize(o, state, x)
    assert all(torch.equal(got[name], want[name]) for name in want)


@fast_calls
def test_layout_of_inputs_does_not_matter(case: Case, backend: str):
    case = case.with_(start=(5, 5))
    want = run(case, backend)
    x = make_inputs(case)
    strided = {}
    for name, t in x.items():
        # Every second entry of a transposed copy: neither contiguous nor dense.
        holder = t.new_zeros(*t.shape[::-1], 2)
        view = holder[..., 0].permute(*range(t.dim() - 1, -1, -1))
        strided[name] = view + 0 if t.dim() == 0 else view.copy_(t.detach())
        strided[name].requires_grad_()
    assert not strided["q"].is_contiguous()
    assert_same(summarize(*call(case, backend, strided), strided), want, case.tolerance)


@fast_calls
def test_layout_of_upstream_gradients_does_not_matter(case: Case, backend: str):
    """Of a sum they are one number, expanded; of a transpose they are transposed."""
    case = case.with_(start=(5, 5))
    x = make_inputs(case)
    o, state = call(case, backend, x)
    outputs = [o, *(t for t in state.tensors().values() if t.is_floating_point())]
    expanded = [torch.ones((), dtype=t.dtype).expand(t.shape) for t in outputs]
    transposed = [torch.randn_like(t.mT, memory_format=torch.contiguous_format).mT for t in outputs]
    assert not transposed[0].is_contiguous()
    for upstream in (expanded, transposed):
        got, want = (
            torch.autograd.grad(outputs, list(x.values()), given, retain_graph=True, materialize_grads=True)
            for given in (upstream, [t.contiguous() for t in upstream])
        )
        assert_same(*(dict(zip(x, grads, strict=True)) for grads in (got, want)), case.tolerance)


@fast_backends
def test_expanded_inputs(backend: str):
    """One step size for all tokens, as a view without memory of its own."""
    case = Case(rule="both", projection="shard").fit(backend)
    x = make_inputs(case)
    lr = torch.tensor(0.3, dtype=case.dtype, requires_grad=True)
    inputs = x | {"lr": lr.expand(case.batch, case.length, case.heads)}
    results = []
    for name in (backend, "reference"):
        o, _ = call(case, name, inputs)
        results.append({"o": o.detach(), "lr": torch.autograd.grad(o.square().sum(), lr)[0]})
    assert_same(*results, case.tolerance)


@every_call
def test_inputs_are_not_written(case: Case, backend: str):
    x = make_inputs(case.with_(start=(3, 8)))
    copies = {name: t.detach().clone() for name, t in x.items()}
    summarize(*call(case.with_(start=(3, 8)), backend, x), x)
    assert all(torch.equal(t, copies[name]) and t._version == x[name]._version for name, t in x.items())


@every_backend
def test_state_does_not_alias_inputs(backend: str):
    """A caller may write into a state it got: parameters and the state it passed in stay as they are."""
    case = Case(rule="both", projection="shard", length=1, start=(3, 8)).fit(backend)
    x = make_inputs(case)
    copies = {name: t.detach().clone() for name, t in x.items()}
    with torch.no_grad():
        _, state = call(case, backend, x)
        for t in state.tensors().values():
            t.zero_()
    assert all(torch.equal(t, copies[name]) for name, t in x.items())


@fast_calls
def test_gradients_of_parts(case: Case, backend: str):
    """Only the output, or only the state, is differentiated; only some inputs ask for a gradient."""
    case = case.with_(start=(3, 8))
    for part in ("o", "state"):
        for wanted in (("q",), ("params.w1",), ("lr",), ("initial.weights.w1",), ("k", "v")):
            results = []
            for name in (backend, "reference"):
                x = inputs(case)
                for key, t in x.items():
                    t.requires_grad_(key in wanted)
                o, state = call(case, name, x)
                loss = o.square().sum() if part == "o" else state.weights.w1.square().sum()
                # A state that does not depend on q has no graph, or a gradient of zero.
                leaves = [x[key] for key in wanted]
                grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None, None]
                grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=False)]
                results.append(dict(zip(wanted, grads, strict=True)))
            assert_same(*results, case.tolerance)


@fast_calls
def test_calls_do_not_share_buffers(case: Case, backend: str):
    """Two forwards before their backwards, and a backward run twice, give what each gives alone."""
    one, two = case, case.with_(seed=5)
    want_one, want_two = run(one, backend), run(two, backend)
    x_one, x_two = make_inputs(one), make_inputs(two)
    out_one, out_two = call(one, backend, x_one), call(two, backend, x_two)
    assert_same(summarize(*out_one, x_one), want_one, case.tolerance)
    assert_same(summarize(*out_two, x_two), want_two, case.tolerance)

    x = make_inputs(case)
    o, _ = call(case, backend, x)
    grads = [torch.autograd.grad(o.sum(), list(x.values()), retain_graph=True, allow_unused=True) for _ in range(2)]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


@fast_calls
def test_without_a_graph(case: Case, backend: str):
    case = case.with_(start=(3, 8))
    want = run(case, backend)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            o, state = call(case, backend, make_inputs(case))
            assert not o.requires_grad and not state.weights.w1.requires_grad
            assert_same(
                {"o": o, "w1": state.weights.w1}, {"o": want["o"], "w1": want["state.weights.w1"]}, case.tolerance
            )


@every_call
def test_final_state_is_made_on_demand_only(case: Case, backend: str):
    x = make_inputs(case)
    with torch.no_grad():
        o, state = call(case, backend, x)
        without, none = call(case, backend, x, output_final_state=False)
    assert none is None
    assert_same({"o": without}, {"o": o}, case.tolerance)
    assert (state.momentum is None) == ("momentum" not in x)
    assert (state.projection is None) == (case.projection == "none")
    assert state.position.tolist() == [case.length] * case.batch


@every_backend
def test_state_at_a_chunk_border(backend: str):
    """The anchor is the weights; a projection of the chunk is empty, one of the finished shard is still there."""
    for case in LOCAL_CASES:
        case = case.fit(backend)
        with torch.no_grad():
            x = make_inputs(case.with_(length=8))
            _, state = call(case, backend, x)
        for weights, anchor in zip(state.weights, state.anchor, strict=True):
            assert (weights is None and anchor is None) or torch.equal(weights, anchor)
        if case.projection.startswith("chunk"):
            assert (state.projection == 0).all()
        elif case.projection.startswith("shard"):
            assert (state.projection.diagonal(dim1=-2, dim2=-1).sum(-1) > 7.999).all()  # the trace: 8 unit keys
