"""Compiled kernels, emulated: a few calls of the memories are right and race-free, and what is broken on purpose shows.

Under TRITON_INTERPRET, which the other tests of the kernels need, nothing can be compiled: this file is also a script,
which the tests run in a process without that variable. All rows of the grid: `python tests/kernels/emulated_grid.py`.
"""

import json
import re
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

HERE = Path(__file__).parent


@triton.jit
def chain_kernel(x, w, o, R: tl.constexpr, D: tl.constexpr, ROUNDS: tl.constexpr):
    """x ← x @ w, again and again: each product needs the last one in another layout. o: the last x."""
    rows, columns = tl.arange(0, R)[:, None], tl.arange(0, D)[None, :]
    weights = tl.load(w + tl.arange(0, D)[:, None] * D + columns)
    state = tl.load(x + rows * D + columns)
    for _ in range(ROUNDS):
        state = tl.dot(state, weights).to(state.dtype)
    tl.store(o + rows * D + columns, state.to(tl.float32))


# -- In the process without the interpreter ----------------------------------------------------------------------------


def run_subset() -> dict:
    """The rows of the grid's subset."""
    from emulated_grid import SUBSET, run

    return {"rows": [vars(run(setting)) for setting in SUBSET]}


def break_kernels() -> dict:
    """For each way of breaking the chain's PTX, at each place where it can be: (races, whether results changed)."""
    import recording
    from emulator import launch as emulation
    from emulator.machine import Kernel

    facts = {}
    for target in (80, 90):
        g = torch.Generator().manual_seed(0)
        x, w = (torch.randn(64, 64, generator=g).bfloat16() / 8 for _ in range(2))
        with recording.record(target) as launches:
            chain_kernel[(1,)](x, w, torch.empty(64, 64), 64, 64, 2, num_warps=4)
        (recorded,) = launches
        ptx, shared = emulation.compile_to_ptx(recorded)

        def emulate(text: str, recorded=recorded, shared=shared, x=x, w=w) -> tuple[int, torch.Tensor]:
            o = torch.full((64, 64), torch.nan)
            run = emulation.Emulation(recorded.target, kernels={recorded.key: (Kernel(text), shared)})
            run.run(recorded, (1,), {"x": x, "w": w, "o": o, "R": 64, "D": 64, "ROUNDS": 2})
            return sum(run.report.races.values()), o

        races, o = emulate(ptx)
        want = x.float() @ w.float()
        want = want.bfloat16().float() @ w.float()
        facts[target] = {"races": races, "error": ((o - want).norm() / want.norm()).item(), "mutants": {}}
        for name, mutants in broken(ptx).items():
            results = [emulate(text) for text in mutants]
            facts[target]["mutants"][name] = [(races, not torch.equal(after, o)) for races, after in results]
    return facts


def broken(ptx: str) -> dict[str, list[str]]:
    """Texts in which one thing is wrong: a barrier missing, registers of a factor exchanged, another swizzle."""

    def at_each(pattern: str, change) -> list[str]:
        places = list(re.finditer(pattern, ptx))
        return [ptx[: m.start()] + change(m) + ptx[m.end() :] for m in places]

    def exchange(match: re.Match) -> str:
        first, second, *rest = match.group(2).split(",")
        return f"{match.group(1)}{{{','.join([second, first, *rest])}}}"

    def other_swizzle(match: re.Match) -> str:
        """Flip the lower bit of the two that give the mode."""
        return f"{match.group(1)}{int(match.group(2)) ^ (3 << 62)}"

    found = {
        "barrier": at_each(r"bar\.sync\s+0;", lambda m: ""),
        "factor": at_each(r"(mma\.sync\S+\s*\{[^}]*\},\s*)\{([^}]*)\}", exchange)[:3],
        "proxy fence": at_each(r"fence\.proxy\.async\S*;", lambda m: ""),
        "swizzle": at_each(r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d{15,})", other_swizzle)[:3],
    }
    return {name: texts for name, texts in found.items() if texts}


# -- In the process of the tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(in_other_process, tmp_path_factory):
    return in_other_process(run_subset, tmp_path_factory.mktemp("subset"))["rows"]


@pytest.fixture(scope="module")
def mutants(in_other_process, tmp_path_factory):
    return in_other_process(break_kernels, tmp_path_factory.mktemp("broken"))


def test_the_subset_is_right_race_free_and_the_same_in_another_order(rows):
    problems = {f"{row['name']} sm_{row['target']} {row['dtype']}": row["problems"] for row in rows}
    assert not any(problems.values()), problems
    assert not any(row["stopped"] for row in rows)


def test_the_subset_has_every_part_and_dtype_and_four_targets(rows):
    assert {row["target"] for row in rows} == {80, 89, 90, 120}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    assert {row["name"].split(":")[0] for row in rows} == {"local", "global", "decode"}


@pytest.mark.parametrize("part", ["local", "global", "decode"])
def test_any_two_settings_that_can_meet_do(part):
    """No target, dtype, rule or projection is left out by another; the seed is the row's number."""
    from emulated_grid import FACTORS, settings

    factors = {name: FACTORS[part][name] for name in ("target", "dtype", "rule", "projection") if name in FACTORS[part]}
    rows = [vars(row.case) | {"target": row.target, "dtype": row.dtype} for row in settings([part])]
    for first, second in combinations(factors, 2):
        met = {(row[first], row[second]) for row in rows}
        assert met == set(product(factors[first], factors[second]))
    assert [row["seed"] for row in rows] == list(range(len(rows)))


def test_an_old_triton_gets_one_message(monkeypatch):
    from emulator.launch import emulate

    monkeypatch.setattr(triton, "__version__", "3.4.0")
    with pytest.raises(RuntimeError, match="needs triton 3.6 or newer, this is 3.4.0; update triton"):
        with emulate(90):
            pass


@pytest.mark.parametrize("target", ["80", "90"])
def test_the_whole_kernel_is_right(mutants, target):
    """Factors of bf16 and a state that is rounded to it: 2^-9 an operation."""
    assert mutants[target]["races"] == 0
    assert mutants[target]["error"] < 0.005


@pytest.mark.parametrize(
    "target, name",
    [("80", "barrier"), ("80", "factor"), ("90", "barrier"), ("90", "proxy fence"), ("90", "swizzle")],
)
def test_what_is_broken_shows(mutants, target, name):
    """Each mutant races, or its result is another."""
    found = mutants[target]["mutants"][name]
    assert found
    unseen = [place for place, (races, changed) in enumerate(found) if not races and not changed]
    assert not unseen, f"mutants {unseen} of {len(found)} are not seen"


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]
    chosen = {f.__name__: f for f in (run_subset, break_kernels)}[sys.argv[1]]
    Path(sys.argv[2]).write_text(json.dumps(chosen()))
