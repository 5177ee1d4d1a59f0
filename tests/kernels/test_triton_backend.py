"""What the triton backend alone has: tiles and layouts, float16, operators, one graph, what it keeps.

In Triton's interpreter, or compiled where there is a GPU. The cases of test_float32_backends.py are the rest.
"""

from functools import partial
from itertools import product

import float32_checks
import pytest
import torch
from float32_checks import LOCAL, SMALL, assert_right, inputs, largest
from memory_cases import MEMORIES, Case, Result, call, summarize
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from modeling_tnt import TNTConfig, memory_layer
from modeling_tnt.block import TNTBlock
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.operators import OPERATORS

pytest.importorskip("triton")

from modeling_tnt.kernels.fused import local_scan, reader
from modeling_tnt.kernels.fused.limits import Tiles, assume_device, tiles_for

DEVICE = float32_checks.device_of("triton")
read, run = (partial(function, backend="triton") for function in (float32_checks.read, float32_checks.run))

# Compute capability, bytes of shared memory a block.
A100, H200 = ((8, 0), 166912), ((9, 0), 232448)

# Rows of a tile, tokens of a chunk, where the sequence starts: a padded tile, two tiles and a start in the second, a
# chunk that is one full tile and a start in its middle.
LARGE_TILES = [(32, 20, 0), (32, 40, 35), (64, 64, 0), (64, 64, 37)]


@pytest.mark.slow
@pytest.mark.parametrize("i, turn", list(product(range(len(LOCAL)), range(2))))
def test_tiles_of_more_rows(i: int, turn: int, monkeypatch):
    """Of every rule, also where the choice is for fewer."""
    rows, chunk_size, start = LARGE_TILES[(i + i // 4 + 2 * turn) % len(LARGE_TILES)]

    def tiles(problem: MemoryProblem, multi_start: bool) -> Tiles:
        multi = multi_start or chunk_size > rows
        return tiles_for(problem, multi_start)._replace(rows=rows, multi=multi)

    monkeypatch.setattr(reader, "tiles_for", tiles)
    case = LOCAL[i].with_(chunk_size=chunk_size, batch=1, heads=1, length=chunk_size + 3, start=(start,))
    case = case.with_(shard_length=case.shard_length and chunk_size)
    assert_right(run(case), case)


@pytest.mark.slow
@pytest.mark.parametrize("i", [2, 4, 5])
@pytest.mark.parametrize("device", [A100, H200], ids=str)
def test_the_layouts_of_both_generations(i: int, device: tuple):
    """Older cards hold the weights the other way round."""
    case = LOCAL[i].with_(hidden=32, chunk_size=20, shard_length=20, length=22, batch=1, heads=1)
    with assume_device(*device):
        got = run(case)
    assert_right(got, case)


# Operands of products, traced states and results are rounded to float16, at 5e-4; the worst entry is off by 1.1e-3.
FLOAT16_ROUNDING = 3e-3


# The last one in tiles of 64 rows.
FLOAT16 = [LOCAL[i].with_(norm=True) for i in (1, 2, 3, 4)] + [
    LOCAL[5].with_(chunk_size=40, shard_length=40, length=45)
]


@pytest.mark.parametrize("case", FLOAT16, ids=str)
def test_float16(case: Case):
    """Outputs and gradients in the dtypes of what they belong to, states in float32."""
    case = case.with_(dtype=torch.float16, batch=1, heads=1)
    got = run(case)
    float32 = {name for name, t in got.items() if t.dtype == torch.float32}
    assert float32 == {name for name in got if name.startswith("state.")}
    assert_right(got, case, rounding=FLOAT16_ROUNDING)


def gradients_of_a_scaled_loss(case: Case, scale: float, backend: str) -> Result:
    """q, k, v in float16, all else in float32, and a small step size, so that few results are beyond float16."""
    x = {name: t.detach().to(torch.float16 if name in "qkv" else torch.float32) for name, t in inputs(case).items()}
    x["lr"] *= 1e-3
    x = {name: t.to(DEVICE).requires_grad_() for name, t in x.items()}
    o, state = call(case, backend, x)
    loss = 1e-3 * o.float().sin().sum() + sum(t.sum() for t in state.weights if t is not None)
    return dict(zip(x, (g.cpu() for g in torch.autograd.grad(scale * loss, list(x.values()))), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case(rule="both", projection="shard", norm=False), Case(rule="token_scale", projection="chunk_normalized")],
    ids=str,
)
def test_float16_under_loss_scaling(case: Case):
    """Gradients of the state are then beyond float16, which must not show: all are those of the plain loss times the
    scale, which is a power of two, and finite where the torch backend's are."""
    case = case.with_(**SMALL | {"dtype": torch.float16}, chunk_size=20, shard_length=None, length=22, batch=1, heads=1)
    scale = 2.0**17
    plain, got = (gradients_of_a_scaled_loss(case, s, "triton") for s in (1.0, scale))
    torchs = gradients_of_a_scaled_loss(case, scale, "torch")
    for name, g in got.items():
        finite = torchs[name].isfinite()
        assert finite.all() or name in "qkv", name
        want = scale * plain[name].float()
        error = largest((g.float() - want)[finite])  # tokens' gradients are rounded to float16, small ones to less
        assert error <= 2e-3 * largest(want[finite]) + (scale * 2**-24 if name in "qkv" else 0), name


def biases_near_the_values(x: dict[str, Tensor]) -> None:
    """Errors are then small differences of large numbers: a bias must not be rounded where it is added."""
    x["lr"] *= 0.02
    x["v"] += 64
    x["params.b2" if "params.b2" in x else "params.b1"] += 64


@pytest.mark.slow
@pytest.mark.parametrize("rule, chunk_size", [("plain", 4), ("momentum", 20)])
@pytest.mark.parametrize("memory", MEMORIES)
def test_float16_with_biases_in_float32(memory: str, rule: str, chunk_size: int):
    """In the backward, too, where states are written down and read again; also those in mid-chunk, and the momentum.
    Rounded to float16 there, 64 is off by 1/32, and gradients by 2 to 5%."""
    case = Case(memory=memory, rule=rule, norm=False, shard_length=None, batch=1, heads=1, **SMALL)
    case = case.with_(dtype=torch.float16, chunk_size=chunk_size, length=2 * chunk_size + 1)
    assert_right(run(case, change=biases_near_the_values), case, biases_near_the_values, rounding=FLOAT16_ROUNDING)


# What a call goes through on the way to the kernels -------------------------------------------------------------------

TINY = Case(memory="linear", rule="both", projection="shard", batch=1, heads=1, length=5, **SMALL)


@pytest.fixture
def scans(monkeypatch) -> list[tuple]:
    """The arguments of each fused scan of a local memory: inputs, table of segments, plan."""
    calls, scan = [], reader.scan_segments
    monkeypatch.setattr(reader, "scan_segments", lambda *args: calls.append(args) or scan(*args))
    return calls


def test_nothing_is_kept_without_gradients(scans: list[tuple]):
    x = inputs(TINY)
    want, state = read(TINY, x=x)
    with torch.no_grad():
        without_mode, _ = read(TINY, x=x)
    without_leaves, _ = read(TINY, x={name: t.detach() for name, t in x.items()})
    assert [plan.interval for *_, plan in scans] == [2, 0, 0]
    assert torch.equal(want, without_mode) and torch.equal(want, without_leaves)
    assert want.requires_grad and state.weights.w1.requires_grad and not without_leaves.requires_grad


def test_a_final_state_is_only_made_on_demand(scans: list[tuple]):
    x = {name: t.to(DEVICE) for name, t in inputs(TINY).items()}
    o, state = call(TINY, "triton", x, output_final_state=False)
    assert state is None and scans[0][2].ends == 0
    assert torch.equal(o, call(TINY, "triton", x)[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", [TINY.with_(start=(3,), length=2), Case(batch=1, heads=1, length=3, **SMALL)], ids=str)
def test_the_operators_keep_the_rules_of_custom_operators(case: Case, scans: list[tuple]):
    """Schema, fake implementation, autograd registration and tracing."""
    read(case, x=inputs(case))
    given, segments, plan = scans[0]
    tensors, sizes = [None if t is None else t.detach() for t in given], (segments, list(plan))
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(OPERATORS.fused_forward.default, (*leaves, *sizes))

    o, *states = OPERATORS.fused_forward(*tensors, *sizes)
    ends = 2 + (given.momentum is not None) + (given.projection is not None)
    grad_ends = [torch.randn_like(t) for t in states[:ends]]
    torch.library.opcheck(
        OPERATORS.fused_backward.default, (*tensors, states[ends:], torch.randn_like(o), grad_ends, *sizes)
    )


@pytest.mark.slow
def test_compilation_is_one_graph():
    """Of a call in training: from a learned start, without packing; those ask tensors for their contents."""
    torch._dynamo.reset()
    x = {name: t.detach().to(DEVICE).requires_grad_() for name, t in inputs(TINY).items()}
    counter = CompileCounterWithBackend("aot_eager")

    def reading(x: dict[str, Tensor]) -> Tensor:
        return call(TINY, "triton", x, output_final_state=False)[0]

    want = summarize(reading(x).cpu(), None, x)
    got = summarize(torch.compile(reading, fullgraph=True, backend=counter)(x).cpu(), None, x)
    torch._dynamo.reset()
    assert counter.frame_count == 1
    assert all(torch.equal(got[name], want[name]) for name in want)


# What is kept and what is chosen -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"local_chunk_sizes": [1]}, {"local_chunk_sizes": [64]}, {"memory_expansion": 4},
     {"use_momentum": True, "use_forget_gate": True, "local_chunk_sizes": [1]}],
    ids=str,
)  # fmt: skip
def test_extra_memory_is_less_than_the_activations_around(options: dict, scans: list[tuple], monkeypatch):
    """Of tnt-150m in bf16: what a local memory keeps for its backward besides its inputs, with what it writes again
    there (for one layer at a time), against what its block keeps for all the rest.
    """
    tokens, operation, place, kept = 8192, memory_layer.read, ["block"], {}

    def read(problem, *args):
        place.append("block" if problem.options.is_global else "memory")
        try:
            return operation(problem, *args)
        finally:
            place.pop()

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept.setdefault(storage._cdata, (place[-1], storage.nbytes(), t))  # held, so that no address comes twice
        return t

    monkeypatch.setattr(memory_layer, "read", read)
    config = TNTConfig.from_preset("tnt-150m", kernel_backend="triton", **options)
    default = torch.get_default_dtype()
    with FakeTensorMode(), torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            block = TNTBlock(config)
        finally:
            torch.set_default_dtype(default)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            block(x)
    bytes_of = {where: sum(n for w, n, _ in kept.values() if w == where) for where in ("block", "memory")}
    weights = sum(p.nbytes for p in block.parameters())

    (given, segments, plan), *_ = scans
    states = plan.interval * (plan.tiles * (2 if config.use_momentum else 1) + plan.multi)
    written = states * len(segments) * given.weights[0].numel() * given.q.element_size()
    assert bytes_of["memory"] > (plan.groups - 1) * len(segments) * given.weights[0].nbytes > 0
    assert bytes_of["memory"] + written < bytes_of["block"] - weights


@pytest.mark.slow
@pytest.mark.parametrize("case", [TINY, TINY.with_(rule="token_scale", projection="chunk", memory="mlp")], ids=str)
def test_kernels_are_compiled_once_for_all_lengths(case: Case, monkeypatch):
    constants: dict[str, set] = {}

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple):
            return lambda *args, **sizes: constants.setdefault(self.name, set()).add(tuple(sorted(sizes.items())))

    for name in [name for name in vars(local_scan) if name.endswith("_kernel")]:
        monkeypatch.setattr(local_scan, name, Recorder(name))
    seen = []
    for length in (16, 199, 1024):
        run(case.with_(chunk_size=2, shard_length=None, length=length))
        seen.append({name: frozenset(sizes) for name, sizes in constants.items()})
    assert len(seen[0]) == 6 and seen[0] == seen[1] == seen[2]
