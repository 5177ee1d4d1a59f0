"""`tnt bench kernels`: a correctness gate, then times of the memory operations beside what else there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.pictures import COLORS, picture, short_count
from ..common.timing import MISSING, OK, Outcome, Refused
from .arguments import MEMORY_BACKENDS, KernelBenchArguments
from .contenders import Case, make_contenders, projection_of
from .gate import Gate
from .harness import Bench, run
from .measure import Timing, Work
from .predicted import summarize_predictions
from .report import MIB, align, describe_rows, draw_speeds, length_table, speed, spread
from .rows import KernelRow

HEADLINE_LENGTH = 32768  # of the detailed tables; where it is not measured, the longest length
LEGEND = f"""\
{", ".join(MEMORY_BACKENDS)}: local_memory with that backend; fla: chunk_ttt_linear, given each shard as a row; flash,
cudnn: causal attention; titans: NeuralMemory, a whole layer with its projections and gates. Extra MiB: peak beyond the
inputs."""


def run_kernels(arguments: KernelBenchArguments) -> int:
    return run(KernelBench, arguments)


class KernelBench(Bench):
    """Backends, which pass a gate and are timed in turns, and peers, on the same number of tokens at every length."""

    row_class = KernelRow

    def __init__(self, args: KernelBenchArguments):
        super().__init__(args)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.gate = Gate(args, self.generator)
        self.contenders = {contender.name: contender for contender in make_contenders(args)}
        self.headline_length = HEADLINE_LENGTH if HEADLINE_LENGTH in args.lengths else max(args.lengths)
        self._missing: dict[str, Outcome] = {}

    @property
    def failed(self) -> bool:
        return self.gate.failed

    def groups(self) -> Iterator[list[Case]]:
        """What is timed in turns: all backends, or one peer, on one case. The first chunk size first, ours before the
        peers; attention, which has no chunks, once."""
        rivals = [self.args.backends, *([name] for name, one in self.contenders.items() if not one.is_ours)]
        for i, chunk_size in enumerate(self.args.chunk_sizes):
            for names in rivals:
                memories = self.contenders[names[0]].memories
                memories = [m for m in memories if m in self.args.memories or (m is None and i == 0)]
                for memory, length, mode in product(memories, self.args.lengths, self.args.modes):
                    yield [Case(name, memory, chunk_size if memory else None, length, mode) for name in names]

    def rows(self) -> Iterator[KernelRow]:
        for group in self.groups():
            begun = [case for case in group if case.contender not in self._missing]
            outcomes = self.attempt_in_turns(
                {_series(case): partial(self._prepare, case) for case in begun}, group[0].length
            )
            for case in group:
                outcome = outcomes.get(_series(case)) or self._missing[case.contender]
                if outcome.status == MISSING:
                    self._missing[case.contender] = outcome
                yield self._row(case, outcome)

    def _prepare(self, case: Case) -> Work:
        """Inputs of a case whose contender has passed the gate. Raises `Refused`, or FloatingPointError for ours."""
        args, contender = self.args, self.contenders[case.contender]
        if args.device not in contender.devices:
            reason = f"runs on {' and '.join(contender.devices)} only, not on {args.device}"
            raise Refused(MISSING, reason)
        if contender.is_ours:
            self.gate.demand(case.contender, case.memory, case.chunk_size)
        work = contender.prepare(case, args, self.generator)
        call = partial(work.run, case.mode)
        remark = _find_not_finite(call())
        if remark and contender.is_ours:
            raise FloatingPointError(remark)
        # A peer may diverge on random inputs, which does not change its time.
        return Work(call, lambda timing: {"reason": remark} | self._figures(case, timing))

    def _figures(self, case: Case, timing: Timing) -> dict[str, Any]:
        args = self.args
        figures = timing.fields(args.tokens)
        costs = self.contenders[case.contender].costs(case, args)
        if costs is not None:
            operations, moved = (count * args.tokens * args.heads for count in costs)
            figures |= {"operations": operations, "operations_per_second": operations / timing.median}
            figures |= {"bytes_moved": moved, "bytes_per_second": moved / timing.median}
        return figures

    def _row(self, case: Case, outcome: Outcome) -> KernelRow:
        args, contender = self.args, self.contenders[case.contender]
        resets = contender.is_ours or contender.name == "fla"
        gate = self.gate.results.get((case.contender, case.memory, case.chunk_size))
        return self.row(
            outcome, contender=case.contender, memory=case.memory, mode=case.mode, chunk_size=case.chunk_size,
            length=case.length, batch=args.tokens // case.length, heads=args.heads, head_dim=args.head_dim,
            expansion=args.expansion if case.memory == "mlp" else None,
            shard_length=(args.shard_length or None) if resets else None,
            qk_projection=projection_of(args, case.memory) if contender.is_ours else None, dtype=args.dtype,
            gate_error=gate and gate.error, gate_tensor=gate.tensor if gate else "",
        )  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- report

    def facts(self) -> list[str]:
        args = self.args
        return [
            f"shape     {args.tokens} tokens a call, H={args.heads} D={args.head_dim} expansion={args.expansion} "
            f"shard={args.shard_length or 'never'} projection={args.qk_projection} (linear: none) {args.dtype}"
        ]

    def line(self, row: KernelRow) -> str:
        return f"{row.name} T={row.length} {row.mode}: {speed(row)}"

    def tables(self, rows: Sequence[KernelRow]) -> list[str]:
        modes = list(dict.fromkeys(row.mode for row in rows))
        first_chunk = (None, self.args.chunk_sizes[0])
        headline = [row for row in rows if row.length == self.headline_length and row.chunk_size in first_chunk]
        return [
            *(f"tokens/s, {mode}\n{length_table([row for row in rows if row.mode == mode])}" for mode in modes),
            *(
                f"T={self.headline_length}, {mode}\n{detail_table([row for row in headline if row.mode == mode])}"
                for mode in modes
            ),
            LEGEND,
        ]

    def conclusions(self, rows: Sequence[KernelRow]) -> list[str]:
        predictions = summarize_predictions(rows, self.args.device) if self.args.quick else ""
        return [self.gate.summary() if self.gate.results else "", predictions]

    def draw(self, path: Path, rows: Sequence[KernelRow]) -> None:
        save_kernel_plot(path, rows, self.args.chunk_sizes[0], self.headline_length)


def detail_table(rows: Sequence[KernelRow]) -> str:
    """Time, spread, rates and memory of each row that was measured."""
    head = ["", "ms (lowest-highest)", "tokens/s", "TFLOP/s", "GB/s", "extra MiB"]
    lines = [
        [
            row.name,
            spread(row),
            speed(row),
            _number(row.operations_per_second, lambda x: f"{x / 1e12:.3g}"),
            _number(row.bytes_per_second, lambda x: f"{x / 1e9:.3g}"),
            _number(row.peak_extra_bytes, lambda x: f"{x / MIB:,.0f}"),
        ]
        for row in rows
        if row.status == OK
    ]
    return align([head, *lines]) if lines else "nothing was measured"


def save_kernel_plot(path: Path, rows: Sequence[KernelRow], headline_chunk: int, headline_length: int) -> None:
    """A PNG of tokens per second: by length at one chunk size, and below by chunk size at one length."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    colors = {n: COLORS[i % len(COLORS)] for i, n in enumerate(dict.fromkeys(row.curve for row in rows))}
    with picture(path, f"Speed of one memory operation, medians: {describe_rows(rows)}", height=7) as figure:
        panels = figure.subplots(2, len(modes), squeeze=False)
        for (by_length, by_chunk), mode in zip(panels.T, modes, strict=True):
            mine = [row for row in rows if row.mode == mode and row.status == OK]
            lines: dict[str, dict[int, float]] = {}
            for row in mine:
                if row.chunk_size in (None, headline_chunk):
                    lines.setdefault(row.curve, {})[row.length] = row.tokens_per_second
            draw_speeds(by_length, lines, colors, "tokens in a row")
            by_length.set_title(f"{mode}, chunks of {headline_chunk}")
            lines, chunkless = {}, {}
            for row in mine:
                if row.length == headline_length and row.chunk_size is not None:
                    lines.setdefault(row.curve, {})[row.chunk_size] = row.tokens_per_second
                elif row.length == headline_length:
                    chunkless[row.curve] = row.tokens_per_second
            for name, value in chunkless.items():
                by_chunk.axhline(value, color=colors[name], linestyle="--", label=f"{name} (has no chunks)")
            draw_speeds(by_chunk, lines, colors, "tokens in a chunk")
            by_chunk.set_title(f"{mode}, rows of {short_count(headline_length)} tokens")


def _series(case: Case) -> tuple[str, str | None, int | None, str]:
    """What cases that differ in their length share."""
    return case.contender, case.memory, case.chunk_size, case.mode


def _find_not_finite(results: tuple[Tensor | None, ...]) -> str:
    for i, result in enumerate(results):
        if result is not None and not torch.isfinite(result).all():
            return "its output is not finite" if i == 0 else "a gradient of it is not finite"
    return ""


def _number(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)
