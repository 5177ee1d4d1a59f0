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
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from transformers import PreTrainedModel

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.kernels import choose_backend

from ..common.models import build_llama
from ..common.pictures import COLORS, picture, short_count
from ..common.timing import OK, Outcome
from ..loop.optim import FUSED_DEVICES
from .arguments import WEIGHT_DTYPES, ModelBenchArguments, in_precision
from .harness import Bench, run
from .measure import Timing, Work
from .report import GIB, align, describe_rows, draw_speeds, length_table, speed, spread
from .rows import ModelRow, name_with_backend

LLAMA = "llama"
ATTENTION_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Candidate(NamedTuple):
    """A model to be trained: its name, local chunk size and backend (None and "" for the Llama), how it is built."""

    name: str
    chunk_size: int | None
    backend: str
    build: Callable[[], PreTrainedModel]


def run_model(arguments: ModelBenchArguments) -> int:
    return run(ModelBench, arguments)


class ModelBench(Bench):
    """Training steps of every model at every length, a model's backends in turns."""

    row_class = ModelRow

    def __init__(self, args: ModelBenchArguments):
        super().__init__(args)
        self.config = args.tnt_config(args.chunk_sizes[0], args.backends[0])

    def candidates(self) -> list[list[Candidate]]:
        """The Llama first, since all are compared with it; Titans, which has most steps in sequence, last. In a list of
        their own those that differ in their backend only."""
        args = self.args
        found = [[Candidate(LLAMA, None, "", partial(build_llama, self.config, max(args.lengths)))]]
        for chunk_size in args.chunk_sizes:
            found.append(self._with_each_backend("tnt", chunk_size, partial(args.tnt_config, chunk_size)))
        if args.titans_chunk_size:
            found.append(self._with_each_backend("titans", args.titans_chunk_size, args.titans_config))
        return found

    def _with_each_backend(self, kind: str, chunk_size: int, config: Callable[[str], TNTConfig]) -> list[Candidate]:
        return [
            Candidate(
                f"{name_with_backend(kind, backend, self.args.backends)} C={chunk_size}", chunk_size, backend,
                partial(TNTForCausalLM, config(backend)),
            )
            for backend in self.args.backends
        ]  # fmt: skip

    def rows(self) -> Iterator[ModelRow]:
        for candidates, length in product(self.candidates(), self.args.lengths):
            preparations = {one.name: partial(self._prepare, one, length) for one in candidates}
            outcomes = self.attempt_in_turns(preparations, length)
            for one in candidates:
                yield self._row(one, length, outcomes[one.name])

    def _prepare(self, candidate: Candidate, length: int) -> Work:
        """A step of a fresh model on random tokens; its figures raise FloatingPointError for a loss not finite."""
        args = self.args
        torch.manual_seed(args.seed)
        with self.device:  # weights are drawn where they are needed, which takes no time on a GPU
            model = candidate.build()
        model.to(WEIGHT_DTYPES[args.precision])
        model.train()
        forward: Callable[..., Any] = model
        if args.compile_llama and candidate.name == LLAMA:
            forward = torch.compile(model)
        optimizer = AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=self.device.type in FUSED_DEVICES)
        shape = (args.tokens // length, length)
        batches = cycle([torch.randint(self.config.vocab_size, shape, device=self.device) for _ in range(2)])
        losses: list[Tensor] = [torch.zeros(())]

        def step() -> None:
            tokens = next(batches)
            with in_precision(args.precision, args.device), self._attention(candidate):
                loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[0] = loss.detach()

        def figures(timing: Timing) -> dict[str, Any]:
            loss = losses[0].item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
            return timing.fields(args.tokens) | {"parameters": model.num_parameters(), "loss": loss}

        return Work(step, figures)

    def _attention(self, candidate: Candidate) -> AbstractContextManager:
        """A hybrid's has masks, of persistent tokens and segments, which these kernels do not take."""
        return sdpa_kernel(ATTENTION_KERNELS[self.args.attention]) if candidate.name == LLAMA else nullcontext()

    def _row(self, candidate: Candidate, length: int, outcome: Outcome) -> ModelRow:
        args, is_llama = self.args, candidate.name == LLAMA
        backend = "" if is_llama else self._chosen(candidate.backend)
        return self.row(
            outcome, contender=candidate.name, chunk_size=candidate.chunk_size, length=length,
            batch=args.tokens // length, dtype=args.precision, backend=backend,
            attention=args.attention if is_llama else "", compiled=is_llama and args.compile_llama,
        )  # fmt: skip

    def _chosen(self, backend: str) -> str:
        return choose_backend(self.device.type).name if backend == "auto" else backend

    # ----------------------------------------------------------------------------------------------------------- report

    def facts(self) -> list[str]:
        args = self.args
        chosen = f" (auto: {choose_backend(self.device.type).reason})" if "auto" in args.backends else ""
        compiled = ", compiled" if args.compile_llama else ""
        return [
            f"models    {args.preset}, backend {', '.join(map(self._chosen, args.backends))}{chosen}",
            f"          Llama of the same size, {args.attention} attention{compiled}",
            f"steps     forward, backward, AdamW on {args.tokens} random tokens, {args.precision}",
        ]

    def line(self, row: ModelRow) -> str:
        return f"{row.contender} T={row.length}: {speed(row)}"

    def tables(self, rows: Sequence[ModelRow]) -> list[str]:
        has_peaks = any(row.peak_bytes is not None for row in rows)
        return [
            f"tokens/s\n{length_table(rows)}",
            f"step, ms\n{length_table(rows, lambda row: spread(row, digits=4))}",
            f"peak memory, GiB\n{length_table(rows, _peak)}" if has_peaks else "",
            f"parameters\n{_parameter_table(rows)}",
        ]

    def conclusions(self, rows: Sequence[ModelRow]) -> list[str]:
        return [summarize_crossovers(rows)]

    def draw(self, path: Path, rows: Sequence[ModelRow]) -> None:
        save_model_plot(path, rows, self.args.preset)


def find_crossover(ours: dict[int, float], other: dict[int, float]) -> float | str | None:
    """From which length on `ours` is faster than `other` (tokens per second by length).

    Returns:
        The length, interpolated between the two lengths that it lies between (both axes logarithmic); "always" when
        it is faster at every length at which both were timed; None when it is not at the longest, or there is none.
    """
    lengths = sorted(set(ours) & set(other))
    gains = [math.log(ours[T] / other[T]) for T in lengths]
    if not gains or gains[-1] <= 0:
        return None
    last_slower = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last_slower is None:
        return "always"
    low, high = gains[last_slower], gains[last_slower + 1]
    share = -low / (high - low)
    return lengths[last_slower] ** (1 - share) * lengths[last_slower + 1] ** share


def summarize_crossovers(rows: Sequence[ModelRow]) -> str:
    """For each of our models, from which length on its training steps are faster than the Llama's."""
    speeds: dict[str, dict[int, float]] = {row.contender: {} for row in rows}
    for row in rows:
        if row.status == OK:
            speeds[row.contender][row.length] = row.tokens_per_second
    llama = speeds.pop(LLAMA, {})
    lines = [f"  {name:<14} {_describe_crossover(ours, llama)}" for name, ours in speeds.items()]
    return "\n".join(["faster than the Llama from a length of", *lines])


def _describe_crossover(ours: dict[int, float], llama: dict[int, float]) -> str:
    shared = sorted(set(ours) & set(llama))
    if not shared:
        return "not measured: no length at which both were timed"
    found = find_crossover(ours, llama)
    longest = shared[-1]
    ratio = f"{ours[longest] / llama[longest]:.2f} times the Llama's tokens/s at {short_count(longest)}"
    if found is None:
        return f"none up to {short_count(longest)} ({ratio})"
    if found == "always":
        return f"{short_count(shared[0])} or less, the shortest that was timed ({ratio})"
    return f"{found:,.0f} tokens, interpolated ({ratio})"


def save_model_plot(path: Path, rows: Sequence[ModelRow], preset: str) -> None:
    """A PNG of tokens per second over the length."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.status == OK:
            lines.setdefault(row.contender, {})[row.length] = row.tokens_per_second
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(dict.fromkeys(row.contender for row in rows))}
    with picture(path, f"Training steps of {preset}, medians: {describe_rows(rows)}", height=4.5) as figure:
        draw_speeds(figure.subplots(), lines, colors, "tokens in a row")


def _peak(row: ModelRow) -> str:
    return f"{row.peak_bytes / GIB:.1f}" if row.peak_bytes is not None else speed(row)


def _parameter_table(rows: Sequence[ModelRow]) -> str:
    counts = {row.contender: row.parameters for row in rows if row.parameters is not None}
    return align([[name, f"{count:,}"] for name, count in counts.items()]) if counts else "nothing was measured"
