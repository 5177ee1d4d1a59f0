"""The fused global memory: against the scan of the torch backend, and against the reference through that backend."""

import pytest
import torch

pytest.importorskip("triton")

from memory_cases import GLOBAL_CASES, Case, assert_same, call, make_inputs, summarize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeling_tnt.kernels.fused import global_scan
from modeling_tnt.kernels.fused.global_layout import STATE, Layout
from modeling_tnt.kernels.fused.global_scan import scan_global_chunks
from modeling_tnt.kernels.operators import OPERATORS
from modeling_tnt.kernels.torch_backend import reader
from modeling_tnt.kernels.torch_backend.coefficients import Gates, global_coefficients
from modeling_tnt.kernels.torch_backend.scan import scan_chunks
from modeling_tnt.kernels.torch_backend.slab import ScanInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# float32 rounds at 6e-8 and the norm amplifies that; the worst entry seen is off by 1e-6.
FLOAT32_TOLERANCE = 1e-5
# float16 rounds at 2^-11 = 5e-4, and a gradient goes through some ten roundings; the worst entry seen is off by 2.4e-3.
FLOAT16_TOLERANCE = 6e-3

# Linear and MLP; norm, biases, momentum, decay with and without; shards of one length and of several.
CASES = [
    dict(mlp=False, norm=False, bias=False, rule="plain", lengths=[2, 2]),
    dict(mlp=False, norm=True, bias=True, rule="both", lengths=[3, 2, 1]),
    dict(mlp=False, norm=False, bias=True, rule="decay", lengths=[2, 1]),
    dict(mlp=True, norm=False, bias=True, rule="momentum", lengths=[2]),
    dict(mlp=True, norm=True, bias=False, rule="plain", lengths=[2, 1]),
    dict(mlp=True, norm=True, bias=False, rule="decay", lengths=[2]),
    dict(mlp=True, norm=True, bias=True, rule="both", lengths=[3, 2, 1]),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))


def make(case: dict, chunk_size: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Leaf tensors by the names of `ScanInputs`; x, k, v of `dtype`, the rest float32. Two heads, D 16, M 32."""
    generator = torch.Generator().manual_seed(0)
    lengths, H, D = case["lengths"], 2, 16
    M = 32 if case["mlp"] else D
    J, n, L = len(lengths), lengths[0], lengths[0] * chunk_size

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return std * torch.randn(*shape, generator=generator)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    x = {"x": normal(J, L, H, D), "k": normal(J, L, H, D), "v": normal(J, L, H, D)}
    x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    x["lr"] = uniform(J, L, H, low=0.02, high=0.2)
    shapes = {"w1": (D, M), "b1": (M,), "w2": (M, D), "b2": (D,)}
    names = [name for name in shapes if (case["bias"] or name[0] == "w") and (case["mlp"] or name[1] == "1")]
    for name in names:
        x[name] = normal(J, H, *shapes[name], std=shapes[name][0] ** -0.5)
    if case["norm"]:
        x |= {"norm_weight": uniform(H, D, low=0.5, high=1.5), "norm_bias": normal(H, D, std=0.3)}
    gates = Gates(None, None)
    if case["rule"] in ("momentum", "both"):
        gates = gates._replace(momentum=uniform(J, n, H, chunk_size, low=0.1, high=0.9))
        for name in names:
            x[f"momentum_{name}"] = normal(J, H, *shapes[name], std=0.3 * shapes[name][0] ** -0.5)
    if case["rule"] in ("decay", "both"):
        gates = gates._replace(decay=uniform(J, n, H, chunk_size, low=0.01, high=0.15))
    x |= {name: t for name, t in global_coefficients(gates)._asdict().items() if t is not None}
    return {n: t.to(DEVICE, dtype if n in ("x", "k", "v") else torch.float32).requires_grad_() for n, t in x.items()}


def named_outputs(outputs: tuple) -> dict[str, Tensor]:
    o, weights, momentum = outputs
    named = {"o": o, **weights._asdict()}
    if momentum is not None:
        named |= {f"momentum_{name}": t for name, t in momentum._asdict().items()}
    return {name: t for name, t in named.items() if t is not None}


def with_gradients(outputs: dict[str, Tensor], x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradient of every input, for random, fixed upstream gradients."""
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for t in outputs.values():
        upstream = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        loss = loss + (t.double() * upstream).sum()
    grads = torch.autograd.grad(loss, list(x.values()))
    return {n: t.detach() for n, t in outputs.items()} | {f"grad.{n}": g for n, g in zip(x, grads, strict=True)}


def fused(case: dict, x: dict[str, Tensor], chunk_size: int = 5) -> dict[str, Tensor]:
    return with_gradients(named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], chunk_size)), x)


def oracle(case: dict, x: dict[str, Tensor], chunk_size: int = 5) -> dict[str, Tensor]:
    """The torch backend's scan on the same numbers, in float64."""
    x = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    return with_gradients(named_outputs(plain(case, x, chunk_size)), x)


def plain(case: dict, x: dict[str, Tensor], chunk_size: int = 5) -> tuple:
    """The torch backend's scan."""
    memory_type = "mlp" if case["mlp"] else "linear"
    return scan_chunks(ScanInputs.from_tensors(x), memory_type, case["lengths"], chunk_size, False)


def doubles(result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in result.items()}


@every_case
def test_float32_against_the_scan(case: dict):
    x = make(case)
    got = fused(case, x)
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_same(doubles(got), oracle(case, x), FLOAT32_TOLERANCE)


@pytest.mark.slow
@every_case
def test_float16_against_the_scan(case: dict):
    """Operands are rounded; the state is not, and has the precision of sums in float32."""
    x = make(case, dtype=torch.float16)
    got = fused(case, x)
    low = {name for name, t in got.items() if t.dtype == torch.float16}
    assert low == {"o", "grad.x", "grad.k", "grad.v"}
    assert_same(doubles(got), oracle(case, x), FLOAT16_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[1], CASES[-1]], ids=["linear", "mlp"])
def test_float16_with_a_scaled_loss(case: dict):
    """Gradients of a state past float16's range are operands like others: a power of two passes through unrounded."""
    x = make(case, dtype=torch.float16)
    x["lr"] = (x["lr"].detach() * 2**-8).requires_grad_()  # tokens have gradients in float16, which must stay finite
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for name, t in named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], 5)).items():
        upstream = torch.randint(-8, 9, t.shape, generator=generator) * (2**-6 if name == "o" else 1.0)
        loss = loss + (t.double() * upstream.to(t.device)).sum()
    plain, scaled = (torch.autograd.grad(loss * by, list(x.values()), retain_graph=True) for by in (1, 2**16))
    for want, got in zip(plain, scaled, strict=True):
        assert got.isfinite().all()
        if want.dtype == torch.float16:  # the plain ones may be subnormal, multiples of 2^-24
            torch.testing.assert_close(got.double(), want.double() * 2**16, rtol=2**-10, atol=2**-9)
        else:
            torch.testing.assert_close(got, want * 2**16, rtol=0, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 70])
def test_chunk_sizes(chunk_size: int):
    """One token a chunk, and more tokens than one program's rows."""
    case = CASES[-1] | {"lengths": [2, 1]}
    x = make(case, chunk_size)
    assert_same(doubles(fused(case, x, chunk_size)), oracle(case, x, chunk_size), FLOAT32_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_spans_do_not_matter(limit: int, monkeypatch):
    """A chunk of one shard at a time, or two: the same as all at once."""
    case = CASES[-1] | {"lengths": [2, 2, 1]}
    x = make(case)
    whole = fused(case, x)
    monkeypatch.setattr(global_scan, "_limit", lambda inputs, chunk_size: limit)
    assert_same(fused(case, x), whole, 1e-6)


@pytest.mark.parametrize("lengths", [[1], [3, 3], [4, 4, 2, 1, 1], [5, 2]])
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_spans_cover_every_chunk_once_in_packed_order(lengths: list[int], limit: int):
    layout = Layout(lengths, 2, heads=1)
    chunks = [(chunk, shard) for chunk in range(lengths[0]) for shard in range(len(lengths)) if chunk < lengths[shard]]
    row = {place: i for i, place in enumerate(chunks)}
    spans = list(layout.spans())
    by_chunk = [span for chunk in range(layout.chunks) for span in layout.chunk_spans(chunk, limit)]
    for some in (spans, by_chunk):
        seen = []
        for span in some:
            chunk_range = range(span.chunk, span.chunk + span.chunks)
            places = [(chunk, shard) for chunk in chunk_range for shard in range(span.shard, span.shard + span.shards)]
            assert span.rows == slice(row[places[0]], row[places[-1]] + 1)
            seen += places
        assert seen == chunks
    assert all(span.shards <= limit for span in by_chunk)
    for span in by_chunk:
        following = [row.get((span.chunk + 1, span.shard + i)) for i in range(span.shards)]
        assert list(range(span.next_rows.start, span.next_rows.stop)) == [r for r in following if r is not None]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["o", "w1", "momentum_b2"])
def test_upstream_gradient_of_one_output(wanted: str):
    case = CASES[-1] | {"lengths": [2, 1]}
    x = make(case)
    got = named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], 5))[wanted]
    doubled = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    want = named_outputs(plain(case, doubled))[wanted]
    results = []
    for t, inputs in ((got, x), (want, doubled)):
        grads = torch.autograd.grad(t.double().square().sum(), list(inputs.values()))
        results.append({name: g.double() for name, g in zip(inputs, grads, strict=True)})
    assert_same(*results, FLOAT32_TOLERANCE)


def test_layout_of_inputs_does_not_matter():
    """Expanded weights, and tokens that are slices of one projection."""
    case = CASES[-1] | {"lengths": [2, 2]}
    x = make(case)
    x = {n: t.detach()[:1].expand(t.shape) if n in ("w1", "b1", "w2", "b2") else t.detach() for n, t in x.items()}
    want = named_outputs(
        scan_global_chunks(ScanInputs.from_tensors({n: t.contiguous() for n, t in x.items()}), [2, 2], 5)
    )
    joined = torch.cat([x["x"], x["k"], x["v"]], dim=-1)
    x |= dict(zip(("x", "k", "v"), joined.chunk(3, dim=-1), strict=True))
    assert not x["k"].is_contiguous() and not x["w1"].is_contiguous()
    got = named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), [2, 2], 5))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
def test_states_are_kept_but_no_activations():
    """With many tokens a chunk, inputs and the states before the chunks are all that is saved."""
    case = CASES[-2] | {"lengths": [2]}
    chunk_size = 256
    x = make(case, chunk_size)
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], chunk_size)
    inputs = sum(t.nbytes for t in x.values())
    states = case["lengths"][0] * sum(x[name].nbytes for name in ("w1", "w2"))
    scalars = 4 * x["lr"].nbytes
    assert sum(saved.values()) <= inputs + states + scalars
    hidden = 2 * x["k"].nbytes
    assert scalars + states < hidden


def test_nothing_is_kept_without_gradients():
    case = CASES[-1] | {"lengths": [2, 1]}
    x = make(case)
    want = named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], 5))
    with torch.no_grad():
        got = named_outputs(scan_global_chunks(ScanInputs.from_tensors(x), case["lengths"], 5))
    assert all(torch.equal(got[name], want[name]) and not got[name].requires_grad for name in want)


def test_token_dtypes():
    x = make(CASES[0])
    with pytest.raises(TypeError, match="x, k, v must share one dtype of float32, bfloat16, float16"):
        scan_global_chunks(ScanInputs.from_tensors(x | {"k": x["k"].half()}), [2, 2], 5)
    with pytest.raises(TypeError, match="float64"):
        scan_global_chunks(ScanInputs.from_tensors({name: t.double() for name, t in x.items()}), [2, 2], 5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=["linear", "mlp"])
def test_operators(case: dict):
    """Schema, fake implementation and autograd registration of the forward, and schema and fake of the backward."""
    case = case | {"lengths": [1]}
    x = make(case, chunk_size=2)
    x["gain"] = x.pop("lr")
    x.pop("end_gain", None)
    if "momentum_gain" in x:
        x["momentum_gain"] = x["gain"].detach().clone().requires_grad_()
    names, lengths = ",".join(x), case["lengths"]
    torch.library.opcheck(OPERATORS.global_forward, (list(x.values()), names, lengths, 2, True))
    tensors = [t.detach() for t in x.values()]
    o, *rest = OPERATORS.global_forward(tensors, names, lengths, 2, True)
    kept = rest[sum(name in STATE for name in x) :]
    backward = (tensors, names, kept, [torch.randn_like(o)], "o", lengths, 2)
    torch.library.opcheck(OPERATORS.global_backward, backward)


@pytest.mark.slow
def test_compile_and_checkpoint():
    case = CASES[-1] | {"lengths": [2, 1]}
    x = make(case, chunk_size=2)
    names, tensors = list(x), list(x.values())

    def scan(*tensors: Tensor) -> dict[str, Tensor]:
        inputs = ScanInputs.from_tensors(dict(zip(names, tensors, strict=True)))
        return named_outputs(scan_global_chunks(inputs, case["lengths"], 2))

    want = with_gradients(scan(*tensors), x)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert_same(with_gradients(compiled(*tensors), x), want, 1e-6)
    again = with_gradients(checkpoint(scan, *tensors, use_reentrant=False), x)
    assert all(torch.equal(again[name], want[name]) for name in want)


@pytest.mark.parametrize("case", GLOBAL_CASES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_against_the_reference(case: Case, packed: bool, monkeypatch):
    """In the place of the torch backend's scan, with an initial state in mid-chunk, under autocast, packed or not."""
    case = case.with_(head_dim=16, hidden=32, start=(2, 4))
    if packed:
        case = case.with_(batch=1, lengths=(10, 3), length=13)
    x = {name: t.detach().float().requires_grad_() for name, t in make_inputs(case).items()}
    doubled = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    want = summarize(*call(case, "reference", doubled), doubled)
    ran = []

    def scan(inputs: ScanInputs, memory_type: str, lengths: list[int], chunk_size: int, intra: bool) -> tuple:
        ran.append(lengths)
        inputs = ScanInputs.from_tensors({n: t.to(DEVICE) for n, t in inputs.tensors().items()})
        o, *state = scan_global_chunks(inputs, lengths, chunk_size)
        return o.cpu(), *(None if group is None else group.map(Tensor.cpu) for group in state)

    monkeypatch.setattr(reader, "scan_chunks", scan)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = call(case, "torch", x)
    got = summarize(o, state, x)
    assert ran
    assert_same({n: t.double() if t.is_floating_point() else t for n, t in got.items()}, want, 1e-4)
