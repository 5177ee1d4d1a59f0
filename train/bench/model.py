"""`tnt bench model`: whole training steps of TNT and Titans models beside a Llama of the same size.

A step is forward, cross-entropy of random tokens, backward and AdamW, on the same number of tokens at every length (the
paper's figure 4 and table 4). The Llama has the TNT model's width, layers, heads and vocabulary; its feed-forward width
is chosen so that it has as many parameters. The Titans model is the TNT model with one local memory that is never
reset, momentum and forget gate, and neither global memory nor projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from transformers import PreTrainedModel

from modeling_tnt import TNTForCausalLM
from modeling_tnt.kernels import choose_backend

from ..common.machine import describe_machine, describe_versions
from ..common.models import build_llama
from ..common.pictures import COLORS, picture
from ..common.timing import NOT_RUN, OK, Outcome, attempt
from .arguments import ModelBenchArguments
from .crossover import LLAMA, summarize_crossovers
from .report import align, describe_rows, draw_speeds, length_table, list_reasons, speed
from .rows import CsvLog, ModelRow, timing_fields
from .session import Session
from .timing import Timing, measure

GIB = 2**30
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Contestant:
    """A model to be trained: its name, how it is built, and its local chunk size (None for the Llama)."""

    name: str
    chunk_size: int | None
    build: Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Step:
    """What a measured training step left behind."""

    timing: Timing
    parameters: int
    loss: float


def run_model(args: ModelBenchArguments) -> int:
    """Run the benchmark, print its report, and return the exit status 0.

    Args:
        args: resolved, see `ModelBenchArguments.resolve`.
    """
    bench = ModelBench(args)
    print(bench.describe(), flush=True)
    rows: list[ModelRow] = []
    args.output.claim(args.results)
    with CsvLog(args.output_dir / "model.csv", ModelRow) as log:
        try:
            for row in bench.rows():
                rows.append(row)
                log.write(row)
                if row.status != NOT_RUN:
                    print(f"  {row.contender} T={row.length}: {speed(row)}", flush=True)
        finally:
            if rows:  # what was measured before an interruption is reported, too
                print(f"\n{bench.report(rows)}", flush=True)
    return 0


class ModelBench:
    """One run: which models are trained, at which lengths, and what came of it."""

    def __init__(self, args: ModelBenchArguments):
        self.args, self.device = args, torch.device(args.device)
        self.session = Session(args.time_limit, args.case_seconds)
        self.machine, self.versions = describe_machine(self.device), describe_versions()
        self.config = args.tnt_config(args.chunk_sizes[0])

    def contestants(self) -> list[Contestant]:
        """The Llama first, since all are compared with it; Titans, which has most steps in sequence, last."""
        args = self.args
        found = [Contestant(LLAMA, None, lambda: build_llama(self.config, max(args.lengths)))]
        for chunk_size in args.chunk_sizes:
            config = args.tnt_config(chunk_size)
            found.append(Contestant(f"tnt C={chunk_size}", chunk_size, lambda config=config: TNTForCausalLM(config)))
        if args.titans_chunk_size:
            titans_config, name = args.titans_config(), f"titans C={args.titans_chunk_size}"
            found.append(Contestant(name, args.titans_chunk_size, lambda: TNTForCausalLM(titans_config)))
        return found

    def rows(self) -> Iterator[ModelRow]:
        for contestant in self.contestants():
            for length in self.args.lengths:
                outcome = self.session.run(
                    contestant.name,
                    length,
                    lambda c=contestant, n=length: attempt(lambda: self._measure(c, n), self.device),
                )
                if outcome.status == OK:
                    self.session.remember(contestant.name, length, outcome.value.timing.median)
                yield self._row(contestant, length, outcome)

    def _measure(self, contestant: Contestant, length: int) -> Step:
        args = self.args
        torch.manual_seed(args.seed)
        with self.device:  # weights are drawn where they are needed, which takes no time on a GPU
            model = contestant.build()
        model.to(torch.bfloat16 if args.precision == "bf16" else torch.float32)
        model.train()
        run: Callable[..., object] = model
        if args.compile_llama and contestant.name == LLAMA:
            run = torch.compile(model)
        optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=self.device.type == "cuda")
        batches = [self._draw_tokens(length) for _ in range(2)]
        losses: list[Tensor] = [torch.zeros(())]

        def step(i: int) -> None:
            tokens = batches[i % len(batches)]
            with self._autocast(), sdpa_kernel(ATTENTION_KERNELS[args.attention]):
                loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[0] = loss.detach()

        timing = measure(step, self.device, args.case_seconds)
        loss = losses[0].item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return Step(timing, model.num_parameters(), loss)

    def _draw_tokens(self, length: int) -> Tensor:
        shape = (self.args.tokens // length, length)
        return torch.randint(self.config.vocab_size, shape, device=self.device)

    def _autocast(self) -> AbstractContextManager:
        if self.args.precision == "autocast-bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _row(self, contestant: Contestant, length: int, outcome: Outcome) -> ModelRow:
        args, figures = self.args, {}
        if outcome.status == OK:
            figures = timing_fields(outcome.value.timing, args.tokens)
            figures |= {"parameters": outcome.value.parameters, "loss": outcome.value.loss}
        is_llama = contestant.name == LLAMA
        return ModelRow(
            contender=contestant.name, chunk_size=contestant.chunk_size, length=length, batch=args.tokens // length,
            status=outcome.status, reason=outcome.reason, dtype=args.precision, machine=self.machine,
            versions=self.versions, backend="" if is_llama else self._backend(),
            attention=args.attention if is_llama else "", compiled=is_llama and args.compile_llama, **figures,
        )  # fmt: skip

    def _backend(self) -> str:
        return choose_backend(self.device.type).name if self.args.backend == "auto" else self.args.backend

    def describe(self) -> str:
        args = self.args
        chosen = f" ({choose_backend(self.device.type).reason})" if args.backend == "auto" else ""
        compiled = ", compiled" if args.compile_llama else ""
        return (
            f"machine   {self.machine}; {self.versions}\n"
            f"models    {args.preset}, backend {self._backend()}{chosen}\n"
            f"          Llama of the same size, {args.attention} attention{compiled}\n"
            f"steps     forward, backward, AdamW on {args.tokens} random tokens, {args.precision}\n"
            f"results   {args.output_dir}, seed {args.seed}\n"
        )

    def report(self, rows: list[ModelRow]) -> str:
        """Tables, crossovers and reasons, as printed; the plot is written on the way."""
        save_model_plot(self.args.output_dir / "model.png", rows, self.args.preset)
        parts = [
            self.describe(),
            f"tokens/s\n{length_table(rows, _name)}\n",
            f"step, ms\n{length_table(rows, _name, _milliseconds)}\n",
        ]
        if any(row.peak_bytes is not None for row in rows):
            parts.append(f"peak memory, GiB\n{length_table(rows, _name, _peak)}\n")
        parts.append(f"parameters\n{_parameter_table(rows)}\n")
        reasons = list_reasons(rows, _name)
        parts += [f"{reasons}\n"] if reasons else []
        parts.append(summarize_crossovers(rows))
        return "\n".join(parts)


def save_model_plot(path: Path, rows: Sequence[ModelRow], preset: str) -> None:
    """A PNG of tokens per second over the length."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status == OK:
            lines.setdefault(row.contender, {})[row.length] = row.tokens_per_second
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(row.contender for row in rows))}
    with picture(path, f"Training steps of {preset}, medians: {describe_rows(rows)}", height=4.5) as figure:
        draw_speeds(figure.subplots(), lines, colors, "tokens in a row")


def _name(row: ModelRow) -> str:
    return row.contender


def _milliseconds(row: ModelRow) -> str:
    return f"{row.ms_median:.4g} ({row.ms_lowest:.4g}-{row.ms_highest:.4g})" if row.status == OK else speed(row)


def _peak(row: ModelRow) -> str:
    return f"{row.peak_bytes / GIB:.1f}" if row.peak_bytes is not None else speed(row)


def _parameter_table(rows: Sequence[ModelRow]) -> str:
    counts = {row.contender: row.parameters for row in rows if row.parameters is not None}
    return align([[name, f"{count:,}"] for name, count in counts.items()]) if counts else "nothing was measured"
