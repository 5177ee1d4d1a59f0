"""Processes that share a sequence, for `tnt bench context-parallel`: started, asked and ended by the benchmark.

The benchmark asks some of them at a time, and those that are not asked wait without using a CPU. A process that fails,
ends or says nothing for too long ends all: nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from modeling_tnt import TNTConfig, TNTForCausalLM

from ..common.timing import synchronize
from .arguments import WEIGHT_DTYPES, in_precision
from .context_model import Link, PartTimes
from .context_trace import FIRST, THREE, trace_step

LAST_WORDS = 2.0  # seconds in which the other ranks may say what they have seen when one has failed
SMALL, LARGE = 64, 2**20  # bytes of the messages by which a link is known
ROUND_TRIPS = 20


class RankError(RuntimeError):
    """A rank has failed, has ended, or says nothing; all have been ended."""


@dataclass(frozen=True)
class Setup:
    """What every rank needs to know. `configs`: of the models, by the backend's name; `timeout`: seconds."""

    configs: dict[str, TNTConfig]
    ranks: int
    device: str
    threads: int
    precision: str
    batch_size: int
    seed: int
    timeout: float


class StepFigures(NamedTuple):
    """Of one rank in one step."""

    seconds: float
    sent_bytes: int
    waited_seconds: float
    loss: float


class Ranks:
    """The processes. A call returns what each of the first `ranks` of them answers, or raises `RankError`."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self._folder = tempfile.TemporaryDirectory(prefix="context-parallel-")
        context = mp.get_context("spawn")
        self._processes, self._pipes = [], []
        self._cpu_seconds = [0.0] * setup.ranks
        for rank in range(setup.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, setup, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is seen here
            self._processes.append(process)
            self._pipes.append(ours)

    def start(self) -> None:
        """Wait until all of them are ready."""
        self._collect(range(self.setup.ranks))

    def step(self, ranks: int, backend: str, length: int) -> list[StepFigures]:
        """A training step on rows of so many tokens, shared by the first `ranks`."""
        return self._call(ranks, "step", backend, length, ranks)

    def trace(
        self, ranks: int, backend: str, part: int, rank: int, names: Sequence[str], repeats: int
    ) -> list[PartTimes]:
        """Of parts of so many tokens that the first `ranks` read at the same time, each alone: see `trace_step`."""
        return self._call(ranks, "trace", backend, part, rank, names, repeats, ranks)

    def link(self) -> Link:
        """Between the first two."""
        return self._call(2, "link")[0]

    def cpu_seconds(self) -> float:
        """That those which still run had used when they last answered."""
        return sum(s for s, process in zip(self._cpu_seconds, self._processes, strict=True) if process.is_alive())

    def close(self) -> None:
        """End all: those that wait for a question by themselves, others by force."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        self._end(wait=LAST_WORDS)

    def _call(self, ranks: int, name: str, *args: Any) -> list[Any]:
        for rank in range(ranks):
            with suppress(OSError):  # one that has ended is found by `_collect`
                self._pipes[rank].send((name, args))
        return self._collect(range(ranks))

    def _collect(self, ranks: Sequence[int]) -> list[Any]:
        answers, failures = {}, {}
        until = time.monotonic() + self.setup.timeout
        while len(answers) + len(failures) < len(ranks):
            waiting = {self._pipes[r]: r for r in ranks if r not in answers and r not in failures}
            ready = connection.wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                break
            for rank in (waiting[pipe] for pipe in ready):
                failure = self._receive(rank, answers)
                if failure is not None:
                    failures[rank] = failure
                    until = min(until, time.monotonic() + LAST_WORDS)
        if len(answers) == len(ranks):
            return [answers[rank] for rank in ranks]
        silent = [r for r in ranks if r not in answers and r not in failures]
        if not failures:
            failures = dict.fromkeys(silent, f"says nothing for {self.setup.timeout:g} s; see --rank-timeout")
        self._end(wait=0.0)
        raise RankError("; ".join(f"rank {rank}: {failures[rank]}" for rank in _causes_first(failures)))

    def _receive(self, rank: int, answers: dict[int, Any]) -> str | None:
        """Keep the rank's answer, or return why there is none."""
        try:
            failure, answer, self._cpu_seconds[rank] = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(LAST_WORDS)
            return f"{ENDED} with exit code {self._processes[rank].exitcode}"
        if failure is None:
            answers[rank] = answer
        return failure

    def _end(self, wait: float) -> None:
        until = time.monotonic() + wait
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


ENDED = "ended"


def _causes_first(failures: dict[int, str]) -> list[int]:
    """A rank that ended before one that failed, and one that lost another last."""
    return sorted(failures, key=lambda rank: ("ContextParallelError" in failures[rank], ENDED not in failures[rank]))


# ------------------------------------------------------------------------------------------------------ in each process


def _serve(rank: int, setup: Setup, folder: str, pipe: connection.Connection) -> None:
    """Answer questions until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark ends its ranks itself
    try:
        worker = _Worker(rank, setup, folder)
        pipe.send((None, None, time.process_time()))
        while (question := pipe.recv()) is not None:
            name, args = question
            answer = getattr(worker, name)(*args)
            pipe.send((None, answer, time.process_time()))
        dist.destroy_process_group()
    except (EOFError, BrokenPipeError):  # the benchmark has ended
        pass
    except Exception as error:  # whatever it is, it is told to the one who asked
        lines = str(error).strip().splitlines()
        with suppress(OSError):
            pipe.send((f"{type(error).__name__}: {lines[0] if lines else ''}", None, time.process_time()))
        os._exit(1)  # not through destructors that may wait for a rank that is not there


class _Worker:
    """One rank, with a model for each backend, the same in all ranks."""

    def __init__(self, rank: int, setup: Setup, folder: str):
        self.rank, self.setup = rank, setup
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device, rank) if setup.device == "cuda" else torch.device(setup.device)
        if setup.device == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if setup.device == "cuda" else "gloo", init_method=(Path(folder) / "ranks").as_uri(), rank=rank,
            world_size=setup.ranks, timeout=timedelta(seconds=setup.timeout),
        )  # fmt: skip
        self.groups = {n: dist.new_group(range(n)) for n in range(2, setup.ranks + 1)}
        self.models = {backend: self._build(config) for backend, config in setup.configs.items()}
        self.kept: dict[tuple[str, int], dict[str, Tensor]] = {}

    def _build(self, config: TNTConfig) -> TNTForCausalLM:
        torch.manual_seed(self.setup.seed)
        with self.device:
            model = TNTForCausalLM(config)
        return model.to(WEIGHT_DTYPES[self.setup.precision]).train()

    def _draw(self, model: TNTForCausalLM, length: int) -> Tensor:
        """Tokens [batch_size, length], the same in every rank."""
        generator = torch.Generator().manual_seed(self.setup.seed + length)
        shape = (self.setup.batch_size, length)
        return torch.randint(model.config.vocab_size, shape, generator=generator).to(self.device)

    def _clock(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _meet(self, ranks: int) -> None:
        if ranks > 1:
            dist.barrier(self.groups[ranks])

    def _loss(self, model: TNTForCausalLM, tokens: Tensor) -> Tensor:
        with in_precision(self.setup.precision, self.setup.device):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def step(self, backend: str, length: int, ranks: int) -> StepFigures:
        model = self.models[backend]
        tokens = self._draw(model, length)
        model.zero_grad(set_to_none=True)
        if ranks > 1:
            model.enable_context_parallel(self.groups[ranks])
        context = model.context_parallel
        try:
            self._meet(ranks)
            began = self._clock()
            loss = self._loss(model, tokens)
            loss.backward()
            seconds = self._clock() - began
        finally:
            model.disable_context_parallel()
        sent, waited = (0, 0.0) if context is None else (context.sent_bytes, context.waited_seconds)
        return StepFigures(seconds, sent, waited, loss.item())

    def trace(self, backend: str, part: int, rank: int, names: Sequence[str], repeats: int, ranks: int) -> PartTimes:
        """That one of `repeats` whose whole time is the median, of a rank of three."""
        model = self.models[backend]
        tokens = self._draw(model, len(THREE) * part)
        kept = self.kept.setdefault((backend, part), {})

        def run(rank: int) -> PartTimes:
            model.zero_grad(set_to_none=True)
            return trace_step(model, partial(self._loss, model, tokens), part, rank, self._clock, kept, names)

        if not kept:
            run(FIRST)  # states for those behind it
        run(rank)
        self._meet(ranks)
        times = sorted((run(rank) for _ in range(repeats)), key=lambda t: t.total(model.config.num_hidden_layers))
        return times[(repeats - 1) // 2]

    def link(self) -> Link:
        """From the times of a small message and of a large one to the other rank and back."""
        small, large = (self._round_trip(size) / 2 for size in (SMALL, LARGE))
        return Link(small, (LARGE - SMALL) / (large - small) if large > small else LARGE / large)

    def _round_trip(self, size: int) -> float:
        """The fastest, in seconds: what else the machine does can only make it slower."""
        message, group = torch.zeros(size, dtype=torch.uint8, device=self.device), self.groups[2]
        times = []
        for _ in range(1 + ROUND_TRIPS):  # the first one connects the two
            self._meet(2)
            began = self._clock()
            for sender in (0, 1):
                (dist.send if self.rank == sender else dist.recv)(message, 1 - self.rank, group=group)
            times.append(self._clock() - began)
        return min(times[1:])
