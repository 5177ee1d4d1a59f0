"""Time and memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from ..common.machine import OtherProcesses
from ..common.timing import synchronize

FEWEST_REPEATS = 3
SLOW_CALL_SECONDS = 5.0  # a call longer than this is timed once
CALLS_BEFORE = 9  # at most, until a call is timed


class Timing(NamedTuple):
    """Seconds of one call: median, lowest and highest of `repeats`; and peak memory in bytes, None where unknown.

    The peak is what one call needs beyond what was allocated before it (`peak_extra_bytes`), and with it
    (`peak_bytes`), as torch's allocator counts; what is timed in turns is held all at once. `cpus_used_by_others`: see
    `machine.OtherProcesses`.
    """

    median: float
    lowest: float
    highest: float
    repeats: int
    peak_extra_bytes: int | None
    peak_bytes: int | None
    cpus_used_by_others: float | None

    @classmethod
    def of(
        cls,
        times: Sequence[float],
        peak_extra_bytes: int | None,
        peak_bytes: int | None = None,
        cpus_used_by_others: float | None = None,
    ) -> Timing:
        middle, lowest, highest = statistics.median(times), min(times), max(times)
        return cls(middle, lowest, highest, len(times), peak_extra_bytes, peak_bytes, cpus_used_by_others)

    def fields(self, tokens: int) -> dict[str, Any]:
        """Those of a `Row`, for a call of so many tokens."""
        return {
            "repeats": self.repeats,
            "ms_median": 1e3 * self.median,
            "ms_lowest": 1e3 * self.lowest,
            "ms_highest": 1e3 * self.highest,
            "tokens_per_second": tokens / self.median,
            "peak_extra_bytes": self.peak_extra_bytes,
            "peak_bytes": self.peak_bytes,
            "cpus_used_by_others": self.cpus_used_by_others,
        }


class Work(NamedTuple):
    """A call that is ready to be timed, and the fields of a row that follow from its timing."""

    call: Callable[[], object]
    figures: Callable[[Timing], dict[str, Any]]


class Stopwatch:
    """Times `call` for about `seconds` of repeats, after one call that compiles and one that gives the peak memory.

    On a GPU `triton.testing.do_bench` does it, which empties the L2 cache before each call; on a CPU
    `torch.utils.benchmark`, which takes short calls in blocks and gives the mean of each. A call of more than a third
    of `seconds` is timed by the clock, three times or once a turn, or once if it takes longer than `SLOW_CALL_SECONDS`.
    """

    def __init__(self, call: Callable[[], object], device: torch.device, seconds: float):
        self.call, self.device, self.seconds = call, device, seconds
        call()
        synchronize(device)
        before = 0
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.others = OtherProcesses()
        self.first = _clock(call, device)
        self.peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        self.peak_extra = None if self.peak is None else self.peak - before
        self.times: list[float] = []

    def take_turn(self, turns: int = 1) -> None:
        """Time the call for one of so many turns."""
        if self.first > SLOW_CALL_SECONDS:
            return
        if FEWEST_REPEATS * self.first > self.seconds:
            repeats = max(1, (FEWEST_REPEATS - 1) // turns)
            self.times += [_clock(self.call, self.device) for _ in range(repeats)]
        else:
            time_calls = _time_on_gpu if self.device.type == "cuda" else _time_on_cpu
            self.times += time_calls(self.call, self.seconds / turns)

    def read(self) -> Timing:
        """What was timed so far."""
        slow = FEWEST_REPEATS * self.first > self.seconds
        times = [self.first, *self.times] if slow or not self.times else self.times
        return Timing.of(times, self.peak_extra, self.peak, self.others.cpus())


def expected_seconds(call: float, seconds: float, turns: int = 1) -> float:
    """What a `Stopwatch` will take at most for calls of `call` seconds, compilation not counted."""
    if call > SLOW_CALL_SECONDS:
        return 2 * call
    if FEWEST_REPEATS * call > seconds:
        return (2 + max(FEWEST_REPEATS - 1, turns)) * call
    return CALLS_BEFORE * turns * call + seconds


def _clock(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def _time_on_gpu(call: Callable[[], object], seconds: float) -> list[float]:
    from triton.testing import do_bench  # triton is not there on every machine without a GPU

    return [ms / 1e3 for ms in do_bench(call, warmup=0, rep=1e3 * seconds, return_mode="all")]


def _time_on_cpu(call: Callable[[], object], seconds: float) -> list[float]:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds).times
