"""The triton backend against the reference: in Triton's interpreter, or compiled where there is a GPU.

The reference runs in float64 on the same float32 numbers. A result may be off by 2e-5 of its tensor's largest entry
(float32 rounds at 6e-8, and some hundred roundings go into an entry), or, where the memory itself amplifies rounding (a
norm that divides by a small deviation), by 8 times what the torch backend in float32 is off on the same numbers, but
never by more than 1e-2: a wrong term is above that.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import pytest
import torch
from memory_cases import (
    GLOBAL_CASES,
    LOCAL_CASES,
    MEMORIES,
    PROJECTIONS,
    RULES,
    Case,
    Result,
    call,
    first_state,
    make_inputs,
    pick,
    summarize,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from modeling_tnt import TNTConfig, memory_layer
from modeling_tnt.kernels.checks import MemoryProblem
from modeling_tnt.kernels.operators import OPERATORS
from modeling_tnt.modeling import TNTBlock

pytest.importorskip("triton")

from modeling_tnt.kernels.fused import local_scan, reader
from modeling_tnt.kernels.fused.limits import Tiles, assume_device, tiles_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2e-5
SMALLEST = 0.1  # a tensor counts as no smaller than this: a gradient may vanish but for rounding
AMPLIFIED = 8
LIMIT = 1e-2

# The least that the kernels take: 16 entries a head, 16 hidden units. In float32 a tile has 16 rows: shorter chunks are
# padded, longer ones have several tiles.
SMALL = {"head_dim": 16, "hidden": 16, "dtype": torch.float32}
LOCAL = [case.with_(**SMALL) for case in LOCAL_CASES]
# Chunks of 2 in shards of 6: the backward goes through two groups, of two chunks and of one, and a shorter shard.
GRID = [
    Case(
        memory=memory, rule=rule, projection=projection, norm=i % 3 != 0, bias=i % 4 < 2, chunk_size=2, shard_length=6,
        batch=1, heads=1, length=8, seed=i, **SMALL,
    )
    for i, (projection, rule, memory) in enumerate(product(PROJECTIONS, RULES, MEMORIES))
]  # fmt: skip

# Compute capability, bytes of shared memory a block.
A100, H200 = ((8, 0), 166912), ((9, 0), 232448)

Change = Callable[[dict[str, Tensor]], None]
local_cases = pytest.mark.parametrize("case", LOCAL, ids=str)


def inputs(case: Case, change: Change | None = None) -> dict[str, Tensor]:
    """The inputs of a case, on the CPU; `change` writes into them before.

    Where projected queries are normalised, no query is nearly orthogonal to its key: the first of a chunk would be
    projected to nearly nothing, and its gradient be a difference of large numbers.
    """
    x = make_inputs(case)
    if case.projection.endswith("_normalized"):
        with torch.no_grad():
            along = (x["q"] * x["k"]).sum(-1, keepdim=True)
            x["q"] += 2 * torch.where(along < 0, -1, 1) * x["k"]
    if change is not None:
        with torch.no_grad():
            change(x)
    return x


def read(case: Case, x: dict[str, Tensor], state=None):
    """o and final state of the triton backend, on the CPU, from inputs there."""
    if state is None and case.start is not None:
        state = first_state(case, x)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], device=DEVICE)
    state = None if state is None else state.map(lambda t: t.to(DEVICE))
    moved = {name: t.to(DEVICE) for name, t in x.items()}
    o, state = call(case, "triton", moved, state=state, cu_seqlens=cu_seqlens)
    return o.cpu(), state.map(Tensor.cpu)


def run(case: Case, change: Change | None = None) -> Result:
    x = inputs(case, change)
    return summarize(*read(case, x), x)


def run_in_pieces(case: Case, cuts: Sequence[int]) -> Result:
    x = inputs(case)
    outputs, state = [], None
    for start, end in zip([0, *cuts], [*cuts, case.length], strict=True):
        o, state = read(case, pick(x, slice(None), slice(start, end)), state)
        outputs.append(o)
    return summarize(torch.cat(outputs, 1), state, x)


@cache
def oracle(case: Case, backend: str, dtype: torch.dtype, change: Change | None) -> Result:
    """Another backend on the same numbers, in another precision."""
    x = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs(case, change).items()}
    return summarize(*call(case, backend, x), x)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_right(got: Result, case: Case, change: Change | None = None, rounding: float = ROUNDING) -> None:
    """Each tensor of `got` is the reference's, to the tolerance of this file or the given one."""
    want = oracle(case, "reference", torch.float64, change)
    assert got.keys() == want.keys()
    assert torch.equal(got["position"], want["position"])
    wrong = []
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        error, size = largest(got[name].double() - expected), max(largest(expected), SMALLEST)
        allowed = rounding * size
        if allowed < error:
            single = oracle(case, "torch", torch.float32, change)[name].double()
            allowed = min(max(allowed, AMPLIFIED * largest(single - expected)), LIMIT * size)
        if not error <= allowed:  # also true for NaN
            wrong.append(f"{name}: off by {error:.2e}, allowed {allowed:.2e}, largest entry {size:.2e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_rule_projection_and_memory(case: Case):
    """Outputs, final states and every gradient, for random upstream gradients of outputs and states."""
    assert_right(run(case), case)


@pytest.mark.parametrize("memory, norm, bias", list(product(MEMORIES, (True, False), (True, False))))
def test_norm_and_biases(memory: str, norm: bool, bias: bool):
    """In chunks of two tiles, whose anchors are kept apart."""
    case = Case(memory=memory, norm=norm, bias=bias, rule="both", projection="shard", **SMALL)
    case = case.with_(chunk_size=20, shard_length=20, length=22, batch=1, heads=1)
    assert_right(run(case), case)


# One token a chunk, a tile, a tile and a token, several tiles, a chunk that is longer than the sequence.
SIZES = [(1, 4, 6), (5, 10, 13), (16, 16, 33), (17, 34, 37), (40, 40, 45), (64, 64, 35)]


@pytest.mark.parametrize("i, chunk_size, shard_length, length", [(i, *sizes) for i, sizes in enumerate(SIZES)])
@pytest.mark.parametrize("turn", range(2))
def test_chunk_and_shard_sizes(i: int, chunk_size: int, shard_length: int, length: int, turn: int):
    case = LOCAL[(i + 4 * turn) % len(LOCAL)]
    case = case.with_(chunk_size=chunk_size, shard_length=case.shard_length and shard_length, length=length)
    case = case.with_(batch=1, heads=1)
    assert_right(run(case), case)


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


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_lengths_around_chunk_and_shard(length: int):
    case = LOCAL[length % len(LOCAL)].with_(length=length, batch=2, heads=1)
    assert_right(run(case), case)


@pytest.mark.parametrize("case", [LOCAL[i] for i in (1, 2, 3, 4, 6)], ids=str)
def test_rows_at_different_positions(case: Case):
    """At a shard's start, in mid-chunk, at a chunk's start in mid-shard, and one token before a shard's end."""
    case = case.with_(start=(16, 3, 12, 23), batch=4, length=5, heads=1)
    assert_right(run(case), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LOCAL[2:5], ids=str)
def test_a_start_in_the_second_tile_of_a_chunk(case: Case):
    case = case.with_(chunk_size=40, shard_length=40, start=(21, 16), length=21, heads=1)
    assert_right(run(case), case)


@pytest.mark.parametrize(
    "case, start", [(LOCAL[2], (5, 3, 8, 0)), (LOCAL[3], None), (LOCAL[4], (5, 3, 8, 0)), (LOCAL[6], None)], ids=str
)
def test_packed_sequences(case: Case, start: tuple[int, ...] | None):
    """One of them empty: it keeps its state."""
    case = case.with_(batch=1, heads=1, lengths=(5, 0, 9, 2), length=16, start=start)
    assert_right(run(case), case)


@local_cases
def test_a_cut_anywhere_changes_nothing(case: Case):
    """Chunks of 4 and shards of 8 tokens are cut inside and at a border; gradients flow through the states."""
    case = case.with_(length=11, batch=1, heads=1)
    cuts = [(3, 8), (2, 6, 7)][case.memory == "linear"]
    assert_right(run_in_pieces(case, cuts), case)


@pytest.mark.parametrize(
    "rule, projection, start",
    [("both", "shard", None), ("both", "shard", (3,)), ("token_scale", "chunk_normalized", (3,)),
     ("plain", "none", None)],
)  # fmt: skip
def test_a_backward_of_several_groups(rule: str, projection: str, start: tuple[int, ...] | None):
    """7 chunks in three groups of at most three."""
    case = Case(memory="linear", rule=rule, projection=projection, chunk_size=2, shard_length=None, **SMALL)
    case = case.with_(length=13, batch=1, heads=1, start=start)
    assert_right(run(case), case)


def zero_keys(x: dict[str, Tensor]) -> None:
    x["k"][:, :2] = 0
    x["k"][0, 6] = 0
    x["q"][:, 3] = 0


@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p != "none"])
def test_zero_keys_and_queries(projection: str):
    """A zero key adds nothing to the projection, a zero projected query stays zero, and no gradient is NaN."""
    case = Case(projection=projection, batch=1, heads=1, length=9, **SMALL)
    assert_right(run(case, zero_keys), case, zero_keys)


def gates_of_zero(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name].fill_(0)


def gates_of_one(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name].fill_(1)


def some_gates_of_zero_and_one(x: dict[str, Tensor]) -> None:
    for name in {"momentum", "decay"} & x.keys():
        x[name][:, ::3] = 1
        x[name][:, 1::3] = 0


@pytest.mark.parametrize("change", [gates_of_zero, gates_of_one, some_gates_of_zero_and_one])
@pytest.mark.parametrize("rule", ["momentum", "decay", "both"])
def test_gates_at_the_ends_of_their_range(rule: str, change: Change):
    """Without a norm: weights that have decayed to nothing would be blown up by it."""
    case = Case(memory="linear", rule=rule, norm=False, batch=1, heads=1, length=9, **SMALL)
    assert_right(run(case, change), case, change)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 4)], ids=str
)  # fmt: skip
def test_head_dims_and_expansions(sizes: tuple[int, int, int]):
    head_dim, hidden, chunk_size = sizes
    case = Case(rule="both", projection="shard", dtype=torch.float32, head_dim=head_dim, hidden=hidden)
    case = case.with_(chunk_size=chunk_size, shard_length=chunk_size, length=chunk_size + 1, batch=1)
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


@pytest.mark.slow
@pytest.mark.parametrize("memory, head_dim, hidden", [("mlp", 64, 128), ("linear", 128, 128)])
def test_wide_heads(memory: str, head_dim: int, hidden: int):
    case = Case(memory=memory, projection="shard", dtype=torch.float32, head_dim=head_dim, hidden=hidden)
    case = case.with_(length=5, batch=1, heads=1)
    assert_right(run(case), case)


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
    assert_right(run(case, biases_near_the_values), case, biases_near_the_values, rounding=FLOAT16_ROUNDING)


@pytest.mark.parametrize("case", [case.with_(**SMALL) for case in GLOBAL_CASES], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_global_memory(case: Case, packed: bool):
    if packed:
        case = case.with_(start=(5, 3, 8, 0), batch=1, lengths=(5, 0, 9, 2), length=16)
    assert_right(run(case.with_(heads=1)), case.with_(heads=1))


def test_inputs_may_be_strided():
    """As views of one projection's output."""
    case = LOCAL[1].with_(batch=1, length=3)
    x = inputs(case)
    wide = torch.stack([x["q"], x["k"], x["v"]], 2).detach()
    views = dict(zip("qkv", wide.unbind(2), strict=True)) | {"lr": x["lr"].detach().mT.contiguous().mT}
    assert not any(t.is_contiguous() for t in views.values())
    views = x | {name: t.requires_grad_() for name, t in views.items()}
    got, want = (summarize(*read(case, inputs_), inputs_) for inputs_ in (views, x))
    assert all(torch.equal(got[name], want[name]) for name in want)


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
    want, state = read(TINY, x)
    with torch.no_grad():
        without_mode, _ = read(TINY, x)
    without_leaves, _ = read(TINY, {name: t.detach() for name, t in x.items()})
    assert [plan.interval for *_, plan in scans] == [2, 0, 0]
    assert torch.equal(want, without_mode) and torch.equal(want, without_leaves)
    assert want.requires_grad and state.weights.w1.requires_grad and not without_leaves.requires_grad


def test_a_final_state_is_only_made_on_demand(scans: list[tuple]):
    x = {name: t.to(DEVICE) for name, t in inputs(TINY).items()}
    o, state = call(TINY, "triton", x, output_final_state=False)
    assert state is None and scans[0][2].ends == 0
    assert torch.equal(o, call(TINY, "triton", x)[0])


@pytest.mark.slow
def test_activation_checkpointing():
    x = inputs(TINY.with_(length=9, start=(3,)))
    case, names = TINY.with_(length=9, start=(3,)), list(x)

    def reading(*tensors: Tensor) -> tuple:
        return read(case, dict(zip(names, tensors, strict=True)))

    want = summarize(*reading(*x.values()), x)
    got = summarize(*checkpoint(reading, *x.values(), use_reentrant=False), x)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.parametrize("case", [TINY.with_(start=(3,), length=2), Case(batch=1, heads=1, length=3, **SMALL)], ids=str)
def test_the_operators_keep_the_rules_of_custom_operators(case: Case, scans: list[tuple]):
    """Schema, fake implementation, autograd registration and tracing."""
    read(case, inputs(case))
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
