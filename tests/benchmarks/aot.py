"""Registers, spills and shared memory of every Triton kernel at the shapes of the presets. No GPU is needed.

    python tests/benchmarks/aot.py                                                       # print the table
    python tests/benchmarks/aot.py --write                                               # and put it into AOT.md
    python tests/benchmarks/aot.py --presets tnt-150m --dtypes bf16 --targets 90 --kernels forward

recording.py writes down what the presets launch. Each distinct launch is compiled, in parallel, for every target, and
the assembler's report is read.

The exit status is 1 if something does not compile, needs more shared or tensor memory than a block of the target may
have, is a mere trap, or spills more than `SPILL_LIMITS` says.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from recording import (
    DTYPES,
    PHASES,
    PRESETS,
    SHARED_LIMITS,
    TARGETS,
    Case,
    Launch,
    check_triton,
    collect,
)
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_tnt.kernels.fused.limits import TENSOR_MEMORY_COLUMNS

TABLE = Path(__file__).with_name("AOT.md")

# Bytes that a thread of a kernel may spill (the assembler's "spill stores") at any preset, by dtype and
# target; others: 0.
# What was seen and a twentieth more: a guard against growth, not an aim.
SPILL_LIMITS: dict[str, dict[tuple[str, int], int]] = {
    "backward_kernel": {
        ("bf16", 80): 4176,
        ("bf16", 90): 4152,
        ("bf16", 100): 4472,
        ("fp32", 80): 13472,
        ("fp32", 90): 6744,
        ("fp32", 100): 2448,
    },
    "forward_kernel": {
        ("bf16", 80): 3056,
        ("bf16", 90): 2520,
        ("bf16", 100): 2672,
        ("fp32", 80): 3728,
        ("fp32", 90): 1608,
        ("fp32", 100): 1544,
    },
    "projection_kernel": {("bf16", 80): 48, ("fp32", 80): 2168, ("fp32", 90): 824, ("fp32", 100): 296},
    "projection_keys_kernel": {("bf16", 80): 248, ("bf16", 90): 64, ("fp32", 80): 6184, ("fp32", 90): 3016},
    "projection_queries_kernel": {("bf16", 80): 48, ("fp32", 80): 2264, ("fp32", 90): 824},
    "recompute_kernel": {
        ("bf16", 80): 448,
        ("bf16", 90): 108,
        ("bf16", 100): 96,
        ("fp32", 80): 624,
        ("fp32", 90): 416,
        ("fp32", 100): 456,
    },
}
# The same for binaries that only training with long chunks needs: they hold the anchor beside the state.
LONG_CHUNK_SPILL_LIMITS: dict[str, dict[tuple[str, int], int]] = {
    "backward_kernel": {
        ("bf16", 80): 6320,
        ("bf16", 90): 11928,
        ("bf16", 100): 4200,
        ("fp32", 80): 18772,
        ("fp32", 90): 2616,
        ("fp32", 100): 2044,
    },
    "forward_kernel": {
        ("bf16", 80): 984,
        ("bf16", 90): 2160,
        ("bf16", 100): 1208,
        ("fp32", 80): 3872,
        ("fp32", 90): 48,
        ("fp32", 100): 72,
    },
    "recompute_kernel": {("bf16", 80): 440, ("bf16", 90): 1664, ("bf16", 100): 1232, ("fp32", 80): 912},
}
# The same for what the kernels are made for: training `tnt-150m` in bf16 on sm_90 and newer.
# Forward and recompute have 4 warps there, so that two blocks share a multiprocessor.
PRESET_SPILL_LIMITS = {"forward_kernel": 916, "recompute_kernel": 228, "backward_kernel": 1100}

# A kernel that loads and stores anything has more; what the assembler knows to fail is a single trap, with 4.
FEWEST_REGISTERS = 8

# Seconds that a binary may take to compile: a user waits as long at the first launch.
TIME_LIMIT = 300.0

# -- Compiling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a binary takes: registers and bytes of a thread, shared bytes and tensor memory columns of a block; or why
    there is none."""

    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    seconds: float = 0.0
    error: str | None = None


def measure(launch: Launch, time_limit: float) -> Usage:
    """Compile one launch, in the main thread. Error messages of the compiler are returned, not raised."""
    start = time.perf_counter()
    log = io.StringIO()
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a binary from the cache has no log
        try:
            with _alarm(time_limit):
                target = GPUTarget("cuda", launch.target, 32)
                compiled = triton.compile(source, target=target, options=launch.options.__dict__)
        except Exception as error:
            return Usage(error=_explain(error), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Usage(
        **_assembler_report(log.getvalue()),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,  # None before sm_100
        seconds=seconds,
    )


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs within, when it takes longer: the assembler may need an hour to place spills."""

    def stop(signum, frame):
        raise TimeoutError(f"compiling took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _explain(error: BaseException) -> str:
    """The message of the error and of what caused it: that of the helper in which it happened comes last."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {str(error).strip()}")
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def _assembler_report(log: str) -> dict[str, int]:
    """Sums over the functions of a binary (there is one, unless a helper is not inlined)."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frames or not registers:
        raise RuntimeError(f"the assembler did not report its use of resources; it said:\n{log}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    return {"registers": max(map(int, registers)), "stack": stack, "spill_stores": stores, "spill_loads": loads}


def measure_all(
    launches: Sequence[Launch], processes: int | None = None, time_limit: float = TIME_LIMIT
) -> list[Usage]:
    """Compile launches in parallel, each from scratch and in at most `time_limit` seconds; progress goes to stderr."""
    usages: dict[int, Usage] = {}
    # Forked, because a kernel that is defined in a script cannot be pickled; the children only compile.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="aot-") as cache:
        with context.Pool(processes or os.cpu_count(), _start_worker, (cache, launches, time_limit)) as pool:
            for index, usage in pool.imap_unordered(_measure_by_index, range(len(launches))):
                usages[index] = usage
                outcome = "failed" if usage.error else f"{usage.registers} registers, {usage.spill_stores} B spilled"
                place = f"[{len(usages)}/{len(launches)}] {launches[index].name} sm_{launches[index].target}"
                print(f"{place}: {outcome}, {usage.seconds:.1f} s", file=sys.stderr)
    return [usages[index] for index in range(len(launches))]


_work: tuple[Sequence[Launch], float] = ((), 0.0)  # of a worker: the launches and the time limit


def _start_worker(cache: str, launches: Sequence[Launch], time_limit: float) -> None:
    global _work
    knobs.cache.dir = cache
    _work = launches, time_limit


def _measure_by_index(index: int) -> tuple[int, Usage]:
    launches, time_limit = _work
    return index, measure(launches[index], time_limit)


# -- Judging and printing ----------------------------------------------------------------------------------------------


def spill_limit(case: Case) -> int:
    """Bytes that the case's binary may spill."""
    name, target = case.launch.name, case.launch.target
    if name in PRESET_SPILL_LIMITS and target >= 90 and ("tnt-150m", "bf16", "train") in case.users:
        return PRESET_SPILL_LIMITS[name]
    only_long_chunks = name in LONG_CHUNK_SPILL_LIMITS and {phase for *_, phase in case.users} == {"train long chunks"}
    limits = LONG_CHUNK_SPILL_LIMITS if only_long_chunks else SPILL_LIMITS
    return max(limits.get(name, {}).get((dtype, target), 0) for _, dtype, _ in case.users)


def find_problems(cases: Iterable[Case], usages: Iterable[Usage]) -> list[str]:
    """One sentence for each binary that does not compile, or takes more than it may."""
    problems = []
    for case, usage in zip(cases, usages, strict=True):
        launch = case.launch
        what = f"{launch.name} on sm_{launch.target} for {_users_text(case)}: {_text(launch.constexprs())}"
        most, shared_limit = spill_limit(case), SHARED_LIMITS[launch.target]
        if usage.error is not None:
            problems.append(f"{what} does not compile:\n{usage.error}")
        if usage.spill_stores > most:
            problems.append(f"{what} spills {usage.spill_stores} B a thread, of which {most} are allowed")
        if usage.shared > shared_limit:
            problems.append(f"{what} needs {usage.shared} B of shared memory, of which a block has {shared_limit}")
        if usage.tensor_memory > TENSOR_MEMORY_COLUMNS:
            problems.append(
                f"{what} needs {usage.tensor_memory} columns of tensor memory, of which a block has "
                f"{TENSOR_MEMORY_COLUMNS}"
            )
        if usage.error is None and usage.registers < FEWEST_REGISTERS:
            problems.append(f"{what} has {usage.registers} registers: the compiler made a trap of it")
    return problems


_INTRODUCTION = """\
# What the kernels take, by target

Made by `python tests/benchmarks/aot.py --write` with triton {triton}, without a GPU: every kernel that the presets
launch, compiled ahead of time. For each variant of a kernel stands what needs it (training has weights in float32, bf16
under autocast) and its constants: flags that are false and arguments that are None are left out.

Registers and spills are those of a thread: bytes that the spilling instructions store / load, each counted once however
often it runs, and the bytes of the stack. Shared memory is that of a block, beside what the target allows; tensor
memory is the columns of a block, which has {columns} on sm_100 and none before.
"""
_COLUMNS = (
    "variant", "dtype", "target", "warps", "stages", "registers", "spills, B", "stack, B", "shared, B", "of",
    "tensor memory",
)  # fmt: skip
_NAMING_COLUMNS = 5  # those that do not need the compiler


def render(cases: Sequence[Case], usages: Sequence[Usage], refused: Sequence[str] = ()) -> str:
    """The table as Markdown, and at its end what the kernels refuse."""
    parts = [_INTRODUCTION.format(triton=triton.__version__, columns=TENSOR_MEMORY_COLUMNS)]
    pairs = list(zip(cases, usages, strict=True))
    parts += [
        _render_kernel(name, [pair for pair in pairs if pair[0].launch.name == name])
        for name in sorted({case.launch.name for case in cases})
    ]
    if refused:
        parts.append("\n".join(["## Not run by these kernels", "", *(f"- {line}" for line in refused)]) + "\n")
    return "\n".join(parts)


def _render_kernel(name: str, pairs: Sequence[tuple[Case, Usage]]) -> str:
    in_common, texts = _variants([case for case, _ in pairs])
    number = {text: i for i, text in enumerate(sorted(set(texts)), start=1)}
    rows = []
    for (case, usage), text in zip(pairs, texts, strict=True):
        launch, dtypes = case.launch, _dtypes(case)
        naming = [number[text], dtypes, f"sm_{launch.target}", launch.options.num_warps, launch.options.num_stages]
        rows.append((number[text], dtypes, launch.target, _line(naming + _usage_cells(launch, usage))))
    alignment = ["---"] * _NAMING_COLUMNS + ["---:"] * (len(_COLUMNS) - _NAMING_COLUMNS)
    lines = [f"## {name}", "", f"In every variant: {in_common or 'no constants'}", ""]
    lines += [f"{i}. {text}" for text, i in number.items()]
    lines += ["", _line(_COLUMNS), _line(alignment), *(line for *_, line in sorted(rows))]
    return "\n".join(lines) + "\n"


def names(markdown: str) -> list[str]:
    """What a table is about, without what was measured: the variants of each kernel and the first cells of its rows.

    A table is stale when this differs from that of a new one, which can be rendered without compiling.
    """
    lines = markdown[markdown.index("## ") :].splitlines()
    return ["|".join(line.split("|")[: _NAMING_COLUMNS + 1]) for line in lines]


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _usage_cells(launch: Launch, usage: Usage) -> list[Any]:
    if usage.error is not None:
        return ["fails", "", "", "", "", ""]
    spills = f"{usage.spill_stores} / {usage.spill_loads}"
    return [usage.registers, spills, usage.stack, usage.shared, SHARED_LIMITS[launch.target], usage.tensor_memory]


def _variants(cases: Sequence[Case]) -> tuple[str, list[str]]:
    """The constants that all launches of a kernel share, and for each launch its users and the constants that differ.

    Launches that nothing else would tell apart get those types of their arguments, too, that do.
    """
    constants = [case.launch.constexprs() for case in cases]
    in_common = set.intersection(*(set(c.items()) for c in constants))
    texts = [f"{_users_text(case)}: {_text(c, in_common)}" for case, c in zip(cases, constants, strict=True)]
    twins: dict[tuple[str, int, str], dict[int, dict[str, str]]] = {}
    for i, (case, text) in enumerate(zip(cases, texts, strict=True)):
        twins.setdefault((text, case.launch.target, _dtypes(case)), {})[i] = case.launch.types()
    for types in twins.values():
        same = set.intersection(*(set(t.items()) for t in types.values()))
        for i, of_launch in types.items():
            texts[i] = f"{texts[i].strip()} {_text(of_launch, same)}".strip()
    return _text(constants[0], set(constants[0].items()) - in_common), texts


def _text(pairs: dict[str, str], without: Iterable[tuple[str, str]] = ()) -> str:
    """ "D=64 MLP": flags by their name alone, without those that are false and without arguments that are None."""
    shown = {name: value for name, value in pairs.items() if value not in ("False", "None")}
    return " ".join(
        name if value == "True" else f"{name}={value}" for name, value in shown.items() if (name, value) not in without
    )


def _users_text(case: Case) -> str:
    """ "tiny (train), tnt-150m (train, decode)", in the order of PRESETS and PHASES."""
    phases = {p: [f for f in PHASES if any((p, f) == (u[0], u[2]) for u in case.users)] for p in PRESETS}
    return ", ".join(f"{preset} ({', '.join(found)})" for preset, found in phases.items() if found)


def _dtypes(case: Case) -> str:
    return ", ".join(sorted({dtype for _, dtype, _ in case.users}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--targets", nargs="+", type=int, choices=SHARED_LIMITS, default=list(TARGETS))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--kernels", nargs="+", metavar="PART", help="only kernels with a PART in their name")
    parser.add_argument(
        "--processes", type=int, help="compile this many kernels at once (default: the cores there are)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, metavar="S", help="per binary (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}; needs the whole table")
    args = parser.parse_args(argv)
    try:
        check_triton()
    except RuntimeError as error:
        parser.error(str(error))
    whole = (set(PRESETS), set(DTYPES), set(TARGETS), set(PHASES), None)
    asked = (set(args.presets), set(args.dtypes), set(args.targets), set(args.phases), args.kernels)
    if args.write and asked != whole:
        parser.error("--write writes the whole table; leave out --presets, --dtypes, --targets, --phases and --kernels")
    start = time.perf_counter()
    cases, refused = collect(args.presets, args.dtypes, args.targets, args.phases)
    if args.kernels is not None:
        cases = [case for case in cases if any(part in case.launch.name for part in args.kernels)]
    print(f"{len(cases)} binaries, recorded in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    usages = measure_all([case.launch for case in cases], args.processes, args.time_limit)
    print(f"compiled, after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    table, problems = render(cases, usages, refused), find_problems(cases, usages)
    print(table)
    if args.write:
        TABLE.write_text(table, encoding="utf-8")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
