"""Every kind of memory call on every kind of GPU, by the emulator. No GPU is needed.

    python tests/kernels/emulated_grid.py                                  # the grid: a quarter of an hour on two cores
    python tests/kernels/emulated_grid.py --write                          # and put its table into EMULATED.md
    python tests/kernels/emulated_grid.py --subset                         # what the tests run
    python tests/kernels/emulated_grid.py --targets 90 --dtypes bf16 --only global --json
    python tests/kernels/emulated_grid.py --write --rows rows.json --minutes 10    # what is finished; again: the rest

A row is a call of `backend="triton"` on CPU tensors: each launch is compiled to PTX for a target, which the emulator
runs twice, once with all warps in lockstep and once with warps in another order and blocks backwards. The local and
global memory go forward and backward, with random upstream gradients of the outputs and the end states; the decode step
goes over some tokens. Rows are chosen so that any two settings (a rule and a target, a projection and a dtype, …) that
can meet do so in some row.

Errors are those against the reference in float64, on the same inputs, in the norm of each tensor; a row passes if each
tensor's is at most `allowed`, nothing races and another order changes no byte. The exit status is 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))

from emulator.errors import EmulationError, Unsupported  # noqa: E402
from emulator.launch import Emulation, emulate, recording  # noqa: E402
from emulator.machine import ORDERS  # noqa: E402
from memory_cases import MEMORIES, PROJECTIONS, RULES, Case, Result, call, make_inputs, pick, summarize  # noqa: E402
from test_decode import decode, named  # noqa: E402
from torch import Tensor  # noqa: E402

TABLE = Path(__file__).parents[1] / "benchmarks" / "EMULATED.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = (80, 89, 90, 120, 100)
PARTS = ("local", "global", "decode")

# What the products of a kernel round their factors to (fp32: three tf32 products, 21 bits), and how often more than one
# such rounding an entry may be off: the torch backend with inputs and parameters rounded once is the measure of what
# the memory makes of a rounding; a kernel rounds some ten times on the way. A wrong term is above `LIMIT`.
ROUNDING = {"bf16": 2.0**-9, "fp16": 2.0**-12, "fp32": 2.0**-21}
AMPLIFIED = 8
LIMIT = 0.05


@dataclass(frozen=True)
class Setting:
    """A row: `case` on `target`, with q, k, v in `dtype`; `part` is one of PARTS; `cut`: the call is cut before it."""

    part: str
    case: Case
    target: int
    dtype: str
    cut: int | None = None
    order: str = "descending"

    def __str__(self) -> str:
        case = self.case
        sizes = f"D={case.head_dim} M={case.hidden if case.memory == 'mlp' else case.head_dim} C={case.chunk_size}"
        words = [str(case).removeprefix("local-").removeprefix("global-"), sizes, f"T={case.length}"]
        words += [] if self.cut is None else [f"cut at {self.cut}"]
        words += [] if case.start is None else [f"from {', '.join(map(str, case.start))}"]
        words += [] if case.lengths is None else [f"packed {', '.join(map(str, case.lengths))}"]
        return f"{self.part}: {' '.join(words)}"


@dataclass
class Row:
    """What came of a setting. `stopped`: why it came to no end; `errors`: tensor → (error, that of rounding alone)."""

    name: str
    target: int
    dtype: str
    stopped: str | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    races: int = 0
    same_bytes: int = 0
    ties: int = 0
    differences: int = 0
    launches: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


# -- Which rows --------------------------------------------------------------------------------------------------------

FACTORS: dict[str, dict[str, tuple]] = {
    "local": {
        "target": TARGETS, "dtype": tuple(DTYPES), "rule": RULES, "projection": PROJECTIONS, "memory": MEMORIES,
        "head_dim": (16, 32, 64, 128), "chunk_size": (8, 16, 20, 64, 3), "norm": (True, False), "bias": (True, False),
        "shape": ("whole", "cut", "start", "packed"),
    },
    "global": {
        "target": TARGETS, "dtype": tuple(DTYPES), "rule": RULES[:4], "memory": MEMORIES, "head_dim": (16, 32, 64, 128),
        "chunk_size": (8, 32, 20), "norm": (True, False), "bias": (True, False), "shape": ("whole", "start"),
    },
    "decode": {
        "target": TARGETS, "dtype": tuple(DTYPES), "rule": RULES, "projection": PROJECTIONS, "memory": MEMORIES,
        "head_dim": (16, 64), "norm": (True, False), "bias": (True, False), "shape": ("start",),
    },
}  # fmt: skip


def pairwise(part: str) -> list[dict]:
    """Choices of a part's factors such that any two that can meet do so: each the best of some random ones."""
    factors = FACTORS[part]
    generator = torch.Generator().manual_seed(0)

    def draw(fixed: dict) -> dict:
        drawn = {
            name: values[int(torch.randint(len(values), (), generator=generator))] for name, values in factors.items()
        }
        return drawn | fixed

    def pairs(choice: dict) -> set:
        return set(combinations(sorted(choice.items(), key=lambda item: item[0]), 2))

    def candidates(pair: tuple) -> Iterator[dict]:
        for _ in range(40):
            if fits(part, choice := draw(dict(pair))):
                yield choice

    missing = {
        pair
        for (a, of_a), (b, of_b) in combinations(sorted(factors.items()), 2)
        for pair in product([(a, x) for x in of_a], [(b, x) for x in of_b])
    }
    chosen = []
    for pair in sorted(missing, key=str):
        if pair in missing and (found := list(candidates(pair))):
            chosen.append(max(found, key=lambda choice: len(pairs(choice) & missing)))
            missing -= pairs(chosen[-1])
    return chosen


def fits(part: str, choice: dict) -> bool:
    """Whether the state stays on the chip (`modeling_tnt.kernels.fused.limits`), and the row ends in a minute or so."""
    if part != "local":
        return choice["head_dim"] < 128 or choice["memory"] == "linear"
    matrix = choice["head_dim"] ** 2
    if choice["memory"] == "mlp":
        if choice["head_dim"] == 128:
            return False
        matrix *= 2
    momentum, multi = choice["rule"] in ("momentum", "both"), choice["chunk_size"] > 16 or choice["shape"] != "whole"
    width = 2 if choice["dtype"] == "bf16" else 4  # gradients that are operands are float32 with fp16
    copies = 1 + momentum + multi
    if copies * matrix > {2: 65536, 4: 16384}[width]:
        return False
    rows = 32 * choice["head_dim"]
    return ((copies + 1 + momentum) * matrix + rows) * width <= recording.SHARED_LIMITS[choice["target"]]


def settings(parts: Sequence[str] = PARTS) -> list[Setting]:
    """The grid."""
    orders = list(ORDERS)[1:]
    found = []
    for part in parts:
        for number, choice in enumerate(pairwise(part)):
            choice = dict(choice)
            target, dtype, shape = choice.pop("target"), choice.pop("dtype"), choice.pop("shape")
            case = _sized(part, Case(**choice, dtype=torch.float32, seed=number, heads=1 + number % 2), shape)
            cut = case.chunk_size + 3 if shape == "cut" else None
            found.append(Setting(part, case, target, dtype, cut, orders[number % len(orders)]))
    return found


def _sized(part: str, case: Case, shape: str) -> Case:
    """A case of two chunks and a bit, as small as it shows all that its sizes may bring."""
    C = case.chunk_size
    case = case.with_(hidden=max(case.head_dim, 32), batch=1, length=2 * C + 5, shard_length=2 * C)
    if part == "decode":
        return case.with_(start=(8, 3, 15), batch=3, length=2, heads=1, shard_length=8)
    if part == "global":
        case = case.with_(is_global=True, shard_length=None, projection="none")
    if case.head_dim == 128 or C == 64:
        case = case.with_(heads=1, length=C + 5)
    if shape == "start":
        return case.with_(start=(C + 1, 0), batch=2, heads=1, length=C + 2)
    if shape == "packed":
        return case.with_(lengths=(5, 0, C + 1), length=C + 6, heads=1)
    return case


_SMALL = Case(head_dim=16, hidden=16, heads=1, batch=1, length=13, chunk_size=8, shard_length=8, dtype=torch.float32)
SUBSET = (
    Setting("local", _SMALL.with_(rule="both", projection="shard_normalized"), 80, "bf16", order="random"),
    Setting("local", _SMALL.with_(memory="linear", rule="token_scale", projection="chunk"), 120, "fp16"),
    Setting("local", _SMALL.with_(memory="linear", head_dim=64, chunk_size=16, shard_length=16, length=9), 90, "bf16"),
    Setting("global", _SMALL.with_(is_global=True, rule="both", shard_length=None), 89, "fp32"),
    Setting("decode", _SMALL.with_(rule="both", start=(8, 3), batch=2, length=1, chunk_size=4), 90, "fp32"),
)


# -- Running a row -----------------------------------------------------------------------------------------------------


def inputs(setting: Setting, dtype: torch.dtype, rounded: bool = False) -> dict[str, Tensor]:
    """Leaves in `dtype`, with q, k, v rounded to the setting's dtype and kept in it if `dtype` is float32.

    `rounded`: the weights are, too. Where projected queries are normalised, none is nearly orthogonal to its key (the
    first of a chunk would be projected to nearly nothing). Step sizes are those of chunks of up to 8 tokens, divided
    among the tokens of longer ones, whose sum would otherwise make the inner loop explode.
    """
    x = {name: t.detach().clone() for name, t in make_inputs(setting.case).items()}
    x["lr"] *= min(1.0, 8 / setting.case.chunk_size)
    if setting.case.projection.endswith("_normalized"):
        along = (x["q"] * x["k"]).sum(-1, keepdim=True)
        x["q"] += 2 * torch.where(along < 0, -1, 1) * x["k"]
    low = DTYPES[setting.dtype]
    for name in x:
        if name in ("q", "k", "v") or (rounded and name.startswith("params.w")):
            x[name] = x[name].to(low)
        if dtype == torch.float64 or name not in ("q", "k", "v"):
            x[name] = x[name].to(dtype)
    return {name: t.requires_grad_() for name, t in x.items()}


def evaluate(setting: Setting, backend: str, x: dict[str, Tensor]) -> Result:
    """Outputs, end states and gradients."""
    case = setting.case
    if setting.part == "decode":
        with torch.no_grad():
            if backend == "reference":
                return named(*call(case, backend, x))
            x = {name: t.detach() for name, t in x.items()}
            o, (state,) = decode([case], [x], backend)
            return named(o, state)
    if setting.cut is None:
        return summarize(*call(case, backend, x), x)
    outputs, state = [], None
    for tokens in (slice(0, setting.cut), slice(setting.cut, None)):
        o, state = call(case, backend, pick(x, slice(None), tokens), state=state)
        outputs.append(o)
    return summarize(torch.cat(outputs, 1), state, x)


def run(setting: Setting) -> Row:
    """Emulate a row and compare."""
    warnings.filterwarnings("ignore")
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN: an output never written shows
    start = time.process_time()
    row = Row(str(setting), setting.target, setting.dtype)
    orders = (("lockstep", False), (setting.order, True))
    want = evaluate(setting, "reference", inputs(setting, torch.float64))
    single = evaluate(setting, "torch", inputs(setting, torch.float32, rounded=True))
    emulation = Emulation(setting.target)
    try:
        with emulate(setting.target, orders) as emulation:
            got = evaluate(setting, "triton", inputs(setting, torch.float32))
    except Unsupported as error:
        row.stopped = f"stops at {_opcode(error)}"
    except (EmulationError, ValueError, RuntimeError) as error:
        row.stopped = str(error).splitlines()[0][:200]
        if not row.stopped.startswith(recording.REFUSAL):  # the backend's own rule: it has no room for the call there
            row.problems.append(row.stopped)
    else:
        row.errors = {n: (_error(got[n], t), _error(single[n], t)) for n, t in want.items() if n != "position"}
    report = emulation.report
    row.races, row.same_bytes, row.ties = (sum(c.values()) for c in (report.races, report.same_bytes, report.ties))
    row.differences, row.launches = (sum(c.values()) for c in (emulation.differences, emulation.launches))
    row.problems += [
        f"{name}: off by {error:.1e}, allowed {allowed(setting.dtype, alone):.1e}"
        for name, (error, alone) in row.errors.items()
        if not error <= allowed(setting.dtype, alone)  # also true for NaN
    ]
    row.problems += [f"{number} cells: {' '.join(key)}" for key, number in report.races.most_common(3)]
    row.problems += [f"{kernel} differs in the order {order}" for kernel, order in emulation.differences]
    row.seconds = time.process_time() - start
    return row


def _opcode(error: Unsupported) -> str:
    """Of a message "kernel, block: opcode is not emulated: …"."""
    return str(error).split(" is ")[0].split(" has ")[0].split(": ")[-1]


def allowed(dtype: str, alone: float) -> float:
    """The relative error that a tensor may have, from what rounding alone gives."""
    return min(AMPLIFIED * max(alone, 2 * ROUNDING[dtype]), LIMIT)


def _error(got: Tensor, want: Tensor) -> float:
    """Relative, in the norm; a tensor counts as no smaller than 1e-4 an entry."""
    size = max(want.double().norm().item(), 1e-4 * want.numel() ** 0.5)
    return ((got.double() - want.double()).norm() / size).item() if want.numel() else 0.0


# -- The table ---------------------------------------------------------------------------------------------------------

_INTRODUCTION = """\
# The kernels, emulated

Made by `python tests/kernels/emulated_grid.py --write` with triton {triton}, without a GPU: each launch compiled to
PTX for its target, and that PTX run on a CPU (`tests/kernels/emulator`), with all warps in lockstep and again with
warps in another order and blocks backwards.

Errors are relative, in the norm, against the reference in float64: of the output, and the worst of the end states and
of the gradients. "Rounding alone" is the worst of all tensors where float32 computes with q, k, v and weights rounded
once to the dtype. Races are cells of memory that two warps or blocks touch without an order, one of them writing; "same
bytes" are cells that several warps write with equal bytes, which is harmless; "ties" those that lanes of one warp write
in one instruction with different bytes, of which one stays (lanes of a sum that the compiler has fused with a product
differ by a rounding). "Order" counts launches whose results another order of warps or blocks changes. `stops at` names
an instruction that the emulator does not know; a call that the backend refuses by its own rule has the reason.
"""
_COLUMNS = (
    "call", "target", "dtype", "output", "end states", "gradients", "worst gradient", "rounding alone", "races",
    "same bytes", "ties", "order", "launches",
)  # fmt: skip


def render(rows: Sequence[Row], chosen: int) -> str:
    """The table as Markdown, of some of the `chosen` rows."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{' --- |' * 3}{' ---: |' * 3} --- |{' ---: |' * 6}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    ended, failed = [row for row in rows if row.stopped is None], [row for row in rows if row.problems]
    summary = [f"{len(rows)} of {chosen} calls were run; {len(ended)} came to their end, {len(failed)} failed:"]
    summary += ["", *(f"- {', '.join(_cells(row)[:3])}: {'; '.join(row.problems)}" for row in failed)]
    return "\n".join([_INTRODUCTION.format(triton=triton.__version__), *summary, "", *lines, ""])


def _cells(row: Row) -> list[str]:
    where = [row.name, f"sm_{row.target}", row.dtype]
    counts = [str(number) for number in (row.races, row.same_bytes, row.ties, row.differences, row.launches)]
    if row.stopped is not None:
        return [*where, row.stopped.replace("|", "/"), "", "", "", "", *counts]
    groups = {"o": {}, "state": {}, "grad": {}}
    for name, (error, _) in row.errors.items():
        groups[name.split(".")[0]][name] = error
    worst = [f"{max(group.values()):.1e}" if group else "" for group in groups.values()]
    gradient = max(groups["grad"], key=groups["grad"].get).removeprefix("grad.") if groups["grad"] else ""
    alone = max(alone for _, alone in row.errors.values())
    return [*where, *worst, gradient, f"{alone:.1e}", *counts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=TARGETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the grid")
    parser.add_argument("--subset", action="store_true", help="a few small rows: what the tests run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once (default: the cores there are)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="finished rows are kept there, and not run again")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no more rows are begun")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}; needs the whole grid")
    args = parser.parse_args(argv)
    if args.write and (args.subset or [*map(set, (args.targets, args.dtypes, args.only))] != [
        *map(set, (TARGETS, DTYPES, PARTS))
    ]):  # fmt: skip
        parser.error("--write writes the whole grid; leave out --subset, --targets, --dtypes and --only")
    chosen = [
        setting
        for setting in (SUBSET if args.subset else settings(args.only))
        if setting.target in args.targets and setting.dtype in args.dtypes and setting.part in args.only
    ]
    finished = _finish(chosen, _read(args.rows), args.jobs, 60 * args.minutes, args.rows)
    rows = [finished[_key(setting)] for setting in chosen if _key(setting) in finished]
    table = render(rows, len(chosen))
    print(json.dumps([vars(row) for row in rows], indent=1) if args.json else table)
    if args.write:
        TABLE.write_text(table, encoding="utf-8")
    return 1 if any(row.problems for row in rows) else 0


def _key(row: Setting | Row) -> tuple[str, int, str]:
    return (row.name if isinstance(row, Row) else str(row), row.target, row.dtype)


def _read(path: Path | None) -> dict[tuple, Row]:
    if path is None or not path.exists():
        return {}
    return {_key(row): row for row in (Row(**fields) for fields in json.loads(path.read_text(encoding="utf-8")))}


def _finish(
    chosen: Sequence[Setting], finished: dict[tuple, Row], jobs: int, seconds: float, path: Path | None
) -> dict[tuple, Row]:
    """The rows that are finished, and the others, run one after the other until the time is over."""
    start = time.monotonic()
    missing = [setting for setting in chosen if _key(setting) not in finished]
    missing.sort(key=lambda setting: setting.case.seed)  # the number within a part: parts take turns
    if not missing or seconds <= 0:
        return finished
    # An executor, not a pool, which would wait for ever for a process that the system has killed.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, setting) for setting in missing]):
            row = future.result()
            finished[_key(row)] = row
            outcome = row.stopped or f"{len(row.problems)} problems, {row.seconds:.0f} s"
            print(f"[{len(finished)}] {row.name} sm_{row.target} {row.dtype}: {outcome}", file=sys.stderr)
            for problem in row.problems:
                print(f"    {problem}", file=sys.stderr)
            if path is not None:
                path.write_text(json.dumps([vars(row) for row in finished.values()]), encoding="utf-8")
            if time.monotonic() - start > seconds:
                pool.shutdown(cancel_futures=True)
                break
    return finished


if __name__ == "__main__":
    sys.exit(main())
