"""The native backend against the reference in float64, at the sizes that it takes, and what only C++ can get wrong.

test_float32_backends.py, test_equivalence.py and test_numerics.py have the cases that it shares with other backends.
"""

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
from float32_checks import LOCAL, SMALL, assert_right, inputs, read, run, run_in_pieces, zero_keys
from memory_cases import GLOBAL_CASES, MEMORIES, PROJECTIONS, RULES, Case, Result, call, random_case, summarize
from torch import Tensor

pytestmark = pytest.mark.native

BACKEND = "native"
DEEP = [
    Case(memory="mlp3", rule="both", projection="shard", **SMALL),
    Case(memory="mlp3", rule="token_scale", norm=False, bias=False, shard_length=None, **SMALL),
    Case(memory="mlp4", rule="momentum", projection="chunk_normalized", **SMALL),
    Case(memory="mlp1", rule="decay", projection="chunk", **SMALL),
]
GLOBAL = [case.with_(**SMALL) for case in GLOBAL_CASES]
GLOBAL += [Case(is_global=True, memory=m, rule="both", shard_length=None, **SMALL) for m in ("mlp1", "mlp3")]

# Inputs and results have 8 bits, as has the gradient that comes in: each is off by 2^-9 at most, and sums of a few of
# them by 9e-3 of the largest as seen. test_numerics.py rounds that gradient for the reference too, and allows less.
BFLOAT16_ROUNDING = 1.6e-2


def short_steps(x: dict[str, Tensor]) -> None:
    """Wide memories without a norm, and deep ones, explode with the step sizes of `make_inputs`."""
    x["lr"] *= 2 / max(w.shape[-1] for name, w in x.items() if name.startswith("params.w"))


def with_chunks(case: Case, chunk_size: int, length: int) -> Case:
    """The same in other chunks, and shards of two."""
    return case.with_(chunk_size=chunk_size, shard_length=case.shard_length and 2 * chunk_size, length=length)


# Kinds and sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory, rule, projection", list(product(("mlp1", "mlp3", "mlp4"), RULES, PROJECTIONS)))
def test_mlps_of_any_depth(memory: str, rule: str, projection: str):
    i = RULES.index(rule) + 2 * PROJECTIONS.index(projection)
    case = Case(memory=memory, rule=rule, projection=projection, norm=i % 3 != 0, bias=i % 4 < 2, **SMALL)
    case = case.with_(hidden=32, chunk_size=2, shard_length=6, length=8, batch=1, seed=i)
    assert_right(run(case, BACKEND, short_steps), case, short_steps)


@pytest.mark.parametrize("norm, bias, memory", list(product((True, False), (True, False), ("linear", "mlp", "mlp3"))))
@pytest.mark.parametrize("is_global", [False, True])
def test_norm_and_biases(norm: bool, bias: bool, memory: str, is_global: bool):
    case = Case(memory=memory, norm=norm, bias=bias, rule="both", is_global=is_global, shard_length=None, **SMALL)
    case = with_chunks(case if is_global else case.with_(projection="shard", shard_length=40), 20, 47)
    assert_right(run(case, BACKEND, short_steps), case, short_steps)


# Head dim and hidden width: vectors of 16, full tiles, and the rests of both.
SIZES = [
    (16, 16), (16, 48), (16, 256), (32, 32), (32, 64), (32, 128), (48, 80), (64, 64), (64, 144), (64, 256), (80, 48),
    (112, 240), (128, 16), (128, 128), (128, 256),
]  # fmt: skip


@pytest.mark.parametrize("memory", ["mlp", "mlp3", "linear"])
@pytest.mark.parametrize("i, sizes", list(enumerate(SIZES)), ids=str)
def test_head_dims_and_widths(i: int, sizes: tuple[int, int], memory: str):
    """With every other rule and projection, in a chunk of a tile, one of a tile and a rest, and a part of one."""
    rule, projection = RULES[i % len(RULES)], PROJECTIONS[(i + i // 5) % len(PROJECTIONS)]
    case = Case(memory=memory, rule=rule, projection=projection, norm=i % 4 != 3, dtype=torch.float32, batch=1)
    case = case.with_(head_dim=sizes[0], hidden=sizes[1], chunk_size=(16, 20)[i % 2], shard_length=None, length=43)
    change = short_steps if memory == "mlp3" or not case.norm else None
    assert_right(run(case, BACKEND, change), case, change)


@pytest.mark.parametrize("case", LOCAL + DEEP, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 8, 16, 17, 24, 64, 256])
def test_chunk_sizes(case: Case, chunk_size: int):
    """Two rows and heads; a shard, a chunk of the next one, and a part of another chunk."""
    length = {1: 7, 64: 200, 256: 300}.get(chunk_size, 3 * chunk_size + 2)
    case = with_chunks(case, chunk_size, length).with_(batch=1 if chunk_size > 24 else 2)
    assert_right(run(case, BACKEND), case)


@pytest.mark.parametrize("case", GLOBAL, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16, 24, 256])
@pytest.mark.parametrize("start", [None, (5, 24)], ids=["fresh", "continued"])
def test_chunk_sizes_of_the_global_memory(case: Case, chunk_size: int, start: tuple[int, ...] | None):
    case = case.with_(chunk_size=chunk_size, length={1: 5, 256: 300}.get(chunk_size, 2 * chunk_size + 3), start=start)
    assert_right(run(case, BACKEND), case)


@pytest.mark.parametrize("case", LOCAL + DEEP + GLOBAL, ids=str)
def test_without_a_final_state(case: Case):
    """What is read and learned from is the same: gradients of the outputs alone."""
    case = with_chunks(case, 5, 23).with_(start=(7, 2))
    x = inputs(case)
    got = summarize(*call(case, BACKEND, x, output_final_state=False), x)
    doubled = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    want = summarize(*call(case, "reference", doubled, output_final_state=False), doubled)
    for name, expected in want.items():
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-4, atol=1e-4 * max(1, expected.abs().max()))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 47, 48, 49])
def test_lengths_around_tiles_chunks_and_shards(length: int):
    for i, case in enumerate((*LOCAL, *DEEP)):
        if i % 3 == length % 3:
            case = with_chunks(case, 24, length)
            assert_right(run(case, BACKEND), case)


@pytest.mark.parametrize("memory", [*MEMORIES, "mlp3"])
@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed: int, memory: str):
    case = random_case(seed, (memory,)).with_(dtype=torch.float32)
    case = case.with_(head_dim=(16, 32, 48)[seed % 3], hidden=(16, 48, 64)[seed // 3 % 3])
    assert_right(run(case, BACKEND, short_steps), case, short_steps)


# Cuts and packing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOCAL + DEEP, ids=str)
@pytest.mark.parametrize("start", [17, 31, 40, 47])
def test_a_start_anywhere_in_a_shard(case: Case, start: int):
    """In the second tile of a chunk, at a tile's start, in the second chunk, at a shard's last token."""
    case = with_chunks(case, 24, 30).with_(start=(start, start + 1))
    assert_right(run(case, BACKEND), case)


@pytest.mark.parametrize("case", LOCAL + DEEP + GLOBAL, ids=str)
@pytest.mark.parametrize("cuts", [(3, 40, 41), (16, 20, 36), (24, 48)], ids=str)
def test_several_calls_are_one(case: Case, cuts: tuple[int, ...]):
    case = with_chunks(case, 24, 53).with_(batch=1)
    assert_right(run_in_pieces(case, BACKEND, cuts), case)


@pytest.mark.parametrize("case", LOCAL + DEEP + GLOBAL, ids=str)
@pytest.mark.parametrize("start", [None, (5, 3, 8, 0, 30)], ids=["fresh", "continued"])
def test_packed_sequences(case: Case, start: tuple[int, ...] | None):
    """Empty ones at both ends, and some that are shorter than a chunk."""
    case = with_chunks(case, 10, 36).with_(batch=1, lengths=(0, 5, 21, 10, 0), start=start)
    assert_right(run(case, BACKEND, short_steps), case, short_steps)


@pytest.mark.parametrize("case", LOCAL + DEEP, ids=str)
def test_zero_keys_and_queries(case: Case):
    case = with_chunks(case, 4, 13)
    assert_right(run(case, BACKEND, zero_keys), case, zero_keys)


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOCAL + DEEP + GLOBAL, ids=str)
@pytest.mark.parametrize("chunk_size", [4, 20])
def test_bfloat16(case: Case, chunk_size: int):
    """Outputs and gradients in the dtypes of what they belong to, states in float32."""
    case = with_chunks(case, chunk_size, 2 * chunk_size + 3).with_(dtype=torch.bfloat16, start=(3, 8))
    got = run(case, BACKEND)
    float32 = {name for name, t in got.items() if t.dtype == torch.float32}
    assert float32 == {name for name in got if name.startswith("state.")}
    assert_right(got, case, rounding=BFLOAT16_ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_a_lesser_cpu(capability: str):
    """The same sources for shorter vectors, by torch's own name for what the CPU can do; a build of their own."""
    tests = [f"{__file__}::{test}" for test in ("test_norm_and_biases", "test_lengths_around_tiles_chunks_and_shards")]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_equal(got: Result, want: Result) -> None:
    assert not [name for name, t in want.items() if not torch.equal(got[name], t)]


# One head of one shard; fewer items than threads; as many shards as there is work for; a global memory; packed.
THREADED = [
    LOCAL[2].with_(batch=1, heads=1, shard_length=None),
    LOCAL[3].with_(batch=1, heads=3, length=4),
    LOCAL[1].with_(batch=2, heads=3, length=61, start=(5, 2)),
    DEEP[0].with_(batch=3, length=40, head_dim=32, hidden=64),
    GLOBAL[1].with_(batch=1, heads=1, chunk_size=24, length=60),
    GLOBAL[1].with_(batch=3, length=21),
    LOCAL[4].with_(batch=1, lengths=(5, 0, 9, 22), length=36),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_changes_no_bit(case: Case):
    """Nor does a second run."""
    results = []
    for number in (1, 2, 2, 5, 1):
        with threads(number):
            results.append(run(case, BACKEND))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.fixture
def poisoned_malloc() -> Iterator[Callable[[bool], None]]:
    """Says whether the C library fills memory before it hands it out: floats are then 3.4e38."""
    libc, M_PERTURB = ctypes.CDLL(None), -6
    if not hasattr(libc, "mallopt"):
        pytest.skip("this C library cannot fill fresh memory")
    yield lambda on: libc.mallopt(M_PERTURB, 0x80 if on else 0)
    libc.mallopt(M_PERTURB, 0)


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_fresh_memory_does_not_matter(case: Case, poisoned_malloc: Callable[[bool], None]):
    """What torch.empty returns is NaN in all tests of this folder; here what malloc returns is not zero, either."""
    results = []
    for filled, poisoned in ((True, False), (True, True), (False, False)):
        torch.utils.deterministic.fill_uninitialized_memory = filled
        try:
            poisoned_malloc(poisoned)
            results.append(run(case, BACKEND))
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
    assert all(t.isfinite().all() for t in results[0].values())
    for result in results[1:]:
        assert_equal(result, results[0])


def others(result: Result, case: Case) -> Result:
    """What belongs to another row than 1, or to head 0."""
    parts = {}
    for name, t in result.items():
        if name.removeprefix("grad.").startswith("params."):
            parts[name] = t[:1]  # of head 0, whose sum over rows has row 1 in it
        elif t.dim() > 1:
            heads = t if name.startswith(("state.", "grad.initial.")) else t.transpose(1, 2)  # [rows, H, …]
            parts[name] = torch.cat([heads[::2].flatten(), heads[1, 0].flatten()])
    return parts


@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "initial.weights.w1"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [LOCAL[2], LOCAL[4], LOCAL[5], DEEP[0], GLOBAL[1]], ids=str)
def test_nan_and_infinity_stay_in_their_row_and_head(case: Case, name: str, value: float):
    case = with_chunks(case, 4, 13).with_(batch=3, start=(3, 3, 8))

    def spoil(x: dict[str, Tensor]) -> None:
        x[name][(1, 1) if name.startswith("initial.") else (1, 2, 1)] = value

    clean, spoiled = run(case, BACKEND), run(case, BACKEND, spoil)
    assert not spoiled["o"][1, :, 1].isfinite().all()
    assert_equal(others(spoiled, case), others(clean, case))


@pytest.mark.parametrize("case", [LOCAL[2], LOCAL[4], DEEP[0], GLOBAL[1]], ids=str)
def test_nan_stays_in_its_packed_sequence(case: Case):
    """Its last token and the first of the next one may lie in one tile."""
    case = with_chunks(case, 4, 14).with_(batch=1, lengths=(5, 2, 7))

    def spoil(x: dict[str, Tensor]) -> None:
        x["v"][0, 6] = torch.nan
        x["k"][0, 6] = torch.nan

    clean, spoiled = run(case, BACKEND), run(case, BACKEND, spoil)
    assert spoiled["state.weights.w1"][1].isnan().any()
    for name in ("o", "grad.q", "grad.k", "grad.v", "grad.lr"):
        for tokens in (slice(0, 5), slice(7, 14)):
            assert torch.equal(spoiled[name][:, tokens], clean[name][:, tokens]), name
    for name in (n for n in clean if n.startswith("state.")):
        assert torch.equal(spoiled[name][::2], clean[name][::2]), name


CALL = Case(batch=1, length=3, **SMALL)


@pytest.mark.parametrize(
    "case, words",
    [
        (CALL.with_(dtype=torch.float64), "q must be of dtype torch.float32 or torch.bfloat16, got torch.float64"),
        (CALL.with_(dtype=torch.float16), "q must be of dtype torch.float32 or torch.bfloat16, got torch.float16"),
        (CALL.with_(memory="swiglu"), "memory_type linear and mlp, got 'swiglu'"),
        (CALL.with_(is_global=True, shard_length=None, update="muon"), "update .* must be 'gradient', got 'muon'"),
        (CALL.with_(head_dim=24), "head dim must be a multiple of 16, got 24"),
        (CALL.with_(hidden=40), "hidden width must be a multiple of 16, got 40"),
    ],
    ids=lambda v: None if isinstance(v, Case) else v,
)
def test_what_it_cannot_run_is_refused(case: Case, words: str):
    """When it is named: with the rule, what was got and the remedy."""
    with pytest.raises(ValueError, match=f"backend='native' cannot run: .*{words}.*use backend='torch' or 'auto'"):
        call(case, BACKEND, inputs(case))


# In a process --------------------------------------------------------------------------------------------------------

STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="only Linux says here how much memory a process has")
def test_nothing_leaks():
    """A thousand calls after a warm-up. One state that were left each time, the least of what a call allocates, would
    be 4 KiB and more: 4 MiB. Pages that the allocator has not touched before may be some."""
    cases = [LOCAL[2].with_(hidden=32, start=(3, 2)), GLOBAL[1].with_(hidden=32), DEEP[0].with_(hidden=32)]

    def rounds(number: int) -> None:
        for i in range(number):
            run(cases[i % len(cases)], BACKEND)

    with threads(2):
        rounds(100)
        before = resident_bytes()
        rounds(1000)
        grown = resident_bytes() - before
    assert grown < 2 * 2**20, f"{grown / 2**20:.1f} MiB more after a thousand calls"


TINY = Case(rule="both", projection="shard", length=9, start=(3, 6), **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", [TINY, GLOBAL[1].with_(start=(3, 6))], ids=str)
def test_under_compile(case: Case):
    """Graphs may break in it; the results are those without."""
    torch._dynamo.reset()

    def reading(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        o, state = call(case, BACKEND, x)
        return 2 * o, state.weights.w1.sin()

    results = []
    for function in (reading, torch.compile(reading, backend="aot_eager", fullgraph=False)):
        x = inputs(case)
        o, w1 = function(x)
        results.append([o, w1, *torch.autograd.grad(o.sum() + w1.sum(), list(x.values()), materialize_grads=True)])
    torch._dynamo.reset()
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_nothing_is_kept_without_gradients():
    """Neither a graph nor a state; and the outputs are those with one."""
    x = inputs(TINY)
    want, _ = read(TINY, BACKEND, x)
    with torch.no_grad():
        without_mode, state = read(TINY, BACKEND, x)
    without_leaves, _ = read(TINY, BACKEND, {name: t.detach() for name, t in x.items()})
    assert torch.equal(want, without_mode) and torch.equal(want, without_leaves)
    assert want.requires_grad and not without_leaves.requires_grad and not state.weights.w1.requires_grad


@pytest.mark.parametrize("is_global", [False, True])
def test_states_are_kept_at_intervals_only(is_global: bool):
    """Of n states at the start of a chunk about √n are saved for the backward; the inputs are the rest."""
    n = 64
    case = Case(is_global=is_global, chunk_size=1, shard_length=None, batch=1, length=n, **SMALL).with_(hidden=32)
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = inputs(case)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(case, BACKEND, x, output_final_state=False)
    one_state = sum(x[name].nbytes for name in ("params.w1", "params.b1", "params.w2", "params.b2"))
    given = 5 * x["q"].nbytes + x["lr"].nbytes
    assert sum(saved.values()) < 2 * given + (n**0.5 + 4) * one_state < n / 2 * one_state


def read_in_a_fork() -> dict:
    """What a worker of a data loader does that reads with a memory: a forked process, after a parallel region in the
    parent, on one thread, as torch tells its workers. On two, GNU's OpenMP never returns, in torch's functions neither.
    """
    case = THREADED[3]
    torch.set_num_threads(2)
    want = run(case, BACKEND)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        got = run(case, BACKEND)
        os.write(writable, b"equal" if all(torch.equal(got[name], want[name]) for name in want) else b"other")
        os._exit(0)
    finished = bool(select.select([readable], [], [], 60)[0])
    if not finished:
        os.kill(child, signal.SIGKILL)
    answer = os.read(readable, 5).decode() if finished else "it hangs"
    os.waitpid(child, 0)
    return {"answer": answer}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_in_a_forked_process(in_other_process: Callable[[Callable, Path], dict], tmp_path: Path):
    assert in_other_process(read_in_a_fork, tmp_path) == {"answer": "equal"}


if __name__ == "__main__":
    chosen = {f.__name__: f for f in (read_in_a_fork,)}[sys.argv[1]]
    Path(sys.argv[2]).write_text(json.dumps(chosen()))
