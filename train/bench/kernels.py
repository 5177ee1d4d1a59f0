"""`tnt bench kernels`: a correctness gate, then times of the memory operations beside what else there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.costs import FORWARD
from ..common.machine import describe_machine, describe_versions
from ..common.timing import MISSING, NOT_RUN, OK, Outcome, attempt
from .arguments import KernelBenchArguments
from .contenders import Case, Contender, Work, make_contenders, projection_of
from .gate import Gate, GateResult
from .predicted import summarize_predictions
from .report import detail_table, length_table, list_reasons, name_of, save_kernel_plot, speed
from .rows import CsvLog, KernelRow, timing_fields
from .session import Session
from .timing import Timing, input_sets, measure

HEADLINE_LENGTH = 32768  # of the detailed tables; the longest length where it is not measured
LEGEND = """\
torch, triton: local_memory with that backend; fla: chunk_ttt_linear, given each shard as a row; flash, cudnn: causal
attention; titans: NeuralMemory, a whole layer with its projections and gates. Extra MiB: peak beyond the inputs.
"""


def run_kernels(args: KernelBenchArguments) -> int:
    """Run the benchmark, print its report, and return the exit status: 1 if a backend failed the gate, else 0.

    Args:
        args: resolved, see `KernelBenchArguments.resolve`.
    """
    bench = KernelBench(args)
    print(bench.describe(), flush=True)
    rows: list[KernelRow] = []
    args.output.claim(args.results)
    with CsvLog(args.output_dir / "kernels.csv", KernelRow) as log:
        try:
            for row in bench.rows():
                rows.append(row)
                log.write(row)
                if row.status != NOT_RUN:
                    print(f"  {name_of(row)} T={row.length} {row.mode}: {speed(row)}", flush=True)
        finally:
            if rows:  # what was measured before an interruption is reported, too
                print(f"\n{bench.report(rows)}", flush=True)
    return 1 if bench.gate.failed else 0


class Measured(NamedTuple):
    """A time, and what is to be said of it: a peer may diverge on random inputs, which does not change its time."""

    timing: Timing
    remark: str


class KernelBench:
    """One run: what is measured, in which order, and what came of it."""

    def __init__(self, args: KernelBenchArguments):
        self.args, self.device = args, torch.device(args.device)
        self.session = Session(args.time_limit, args.case_seconds)
        self.machine, self.versions = describe_machine(self.device), describe_versions()
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.gate = Gate(args, self.generator)
        self.contenders = {contender.name: contender for contender in make_contenders(args)}
        self.headline_length = HEADLINE_LENGTH if HEADLINE_LENGTH in args.lengths else max(args.lengths)
        self._missing: dict[str, Outcome] = {}

    def cases(self) -> Iterator[Case]:
        """The first chunk size first, ours before the peers; attention, which has no chunks, once."""
        for i, chunk_size in enumerate(self.args.chunk_sizes):
            for contender in self.contenders.values():
                chunkless = contender.memories == (None,)
                if chunkless and i > 0:
                    continue
                for memory in contender.memories:
                    if memory is not None and memory not in self.args.memories:
                        continue
                    for length in self.args.lengths:
                        for mode in self.args.modes:
                            yield Case(contender.name, memory, None if chunkless else chunk_size, length, mode)

    def rows(self) -> Iterator[KernelRow]:
        for case in self.cases():
            outcome = self._missing.get(case.contender)
            if outcome is None:
                series = (case.contender, case.memory, case.chunk_size, case.mode)
                outcome = self.session.run(series, case.length, lambda case=case: self._check_and_time(case))
                if outcome.status == OK:
                    self.session.remember(series, case.length, outcome.value.timing.median)
                elif outcome.status == MISSING:
                    self._missing[case.contender] = outcome
            yield self._row(case, outcome)

    def _check_and_time(self, case: Case) -> Outcome:
        contender = self.contenders[case.contender]
        if self.args.device not in contender.devices:
            return Outcome(MISSING, f"runs on {' and '.join(contender.devices)} only, not on {self.args.device}")
        if contender.is_ours:
            gate = self.gate.check(case.contender, case.memory, case.chunk_size)
            if gate.status != OK:
                return Outcome(gate.status, gate.reason)
        return attempt(lambda: self._measure(case, contender), self.device)

    def _measure(self, case: Case, contender: Contender) -> Measured:
        works = [contender.prepare(case, self.args, self.generator)]
        size = sum(t.numel() * t.element_size() for t in [*works[0].leaves, works[0].upstream])
        for _ in range(input_sets(size, self.device) - 1):
            works.append(contender.prepare(case, self.args, self.generator))
        run = _forward if case.mode == FORWARD else _forward_and_backward
        remark = _find_not_finite(run(works[0]))
        if remark and contender.is_ours:
            raise FloatingPointError(remark)
        return Measured(measure(_rotate(run, works), self.device, self.args.case_seconds), remark)

    def _row(self, case: Case, outcome: Outcome) -> KernelRow:
        args, contender = self.args, self.contenders[case.contender]
        resets = contender.is_ours or contender.name == "fla"
        gate = self.gate.results.get((case.contender, case.memory, case.chunk_size), GateResult(NOT_RUN))
        figures, reason = {}, outcome.reason
        if outcome.status == OK:
            timing, reason = outcome.value
            figures = timing_fields(timing, args.tokens)
            figures |= _cost_fields(contender.costs(case, args), args.tokens * args.heads, timing)
        return KernelRow(
            contender=case.contender, memory=case.memory, mode=case.mode, chunk_size=case.chunk_size,
            length=case.length, batch=args.tokens // case.length, status=outcome.status, reason=reason,
            heads=args.heads, head_dim=args.head_dim, expansion=args.expansion if case.memory == "mlp" else None,
            shard_length=(args.shard_length or None) if resets else None,
            qk_projection=projection_of(args, case.memory) if contender.is_ours else None, dtype=args.dtype,
            machine=self.machine, versions=self.versions,
            gate_error=gate.error, gate_tensor=gate.tensor, **figures,
        )  # fmt: skip

    def describe(self) -> str:
        args = self.args
        return (
            f"machine   {self.machine}; {self.versions}\n"
            f"shape     {args.tokens} tokens a call, H={args.heads} D={args.head_dim} expansion={args.expansion} "
            f"shard={args.shard_length or 'never'} projection={args.qk_projection} (linear: none) {args.dtype}\n"
            f"results   {args.output_dir}, seed {args.seed}\n"
        )

    def report(self, rows: list[KernelRow]) -> str:
        """Tables, reasons and gate, as printed; the plot is written on the way."""
        args = self.args
        save_kernel_plot(args.output_dir / "kernels.png", rows, args.chunk_sizes[0], self.headline_length)
        parts = [self.describe()]
        for mode in args.modes:
            mine = [row for row in rows if row.mode == mode]
            if mine:
                parts.append(f"tokens/s, {mode}\n{length_table(mine, name_of)}\n")
        first_chunk = (None, args.chunk_sizes[0])
        headline = [row for row in rows if row.length == self.headline_length and row.chunk_size in first_chunk]
        for mode in args.modes:
            table = detail_table([row for row in headline if row.mode == mode])
            parts.append(f"T={self.headline_length}, {mode}\n{table}\n")
        parts.append(LEGEND)
        reasons = list_reasons(rows, name_of)
        parts += [f"{reasons}\n"] if reasons else []
        parts += [self.gate.summary() + "\n"] if self.gate.results else []
        parts += [summarize_predictions(rows, args.device) + "\n"] if args.quick else []
        return "\n".join(parts).rstrip()


def _forward(work: Work) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (work.forward(),)


def _forward_and_backward(work: Work) -> tuple[Tensor | None, ...]:
    o = work.forward()
    return o.detach(), *torch.autograd.grad(o, work.leaves, work.upstream.to(o.dtype), allow_unused=True)


def _rotate(run: Callable[[Work], object], works: list[Work]) -> Callable[[int], object]:
    return lambda i: run(works[i % len(works)])


def _find_not_finite(results: tuple[Tensor | None, ...]) -> str:
    for i, result in enumerate(results):
        if result is not None and not torch.isfinite(result).all():
            return "its output is not finite" if i == 0 else "a gradient of it is not finite"
    return ""


def _cost_fields(costs: tuple[int | None, int | None], tokens_and_heads: int, timing: Timing) -> dict[str, float]:
    operations, moved = costs
    if operations is None:
        return {}
    operations, moved = operations * tokens_and_heads, moved * tokens_and_heads
    return {
        "operations": operations,
        "operations_per_second": operations / timing.median,
        "bytes_moved": moved,
        "bytes_per_second": moved / timing.median,
    }
