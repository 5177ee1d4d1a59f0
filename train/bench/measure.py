"""Time and memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..common.timing import synchronize

MOST_REPEATS = 50
FEWEST_REPEATS = 3
SLOW_CALL_SECONDS = 5.0  # a call longer than this is timed once


class Timing(NamedTuple):
    """Seconds of one call: median, lowest and highest of `repeats`; and peak memory in bytes, None where unknown.

    The peak is what one call needs beyond what was allocated before it (`peak_extra_bytes`), and with it
    (`peak_bytes`), as torch's allocator counts.
    """

    median: float
    lowest: float
    highest: float
    repeats: int
    peak_extra_bytes: int | None
    peak_bytes: int | None

    @classmethod
    def of(cls, times: Sequence[float], peak_extra_bytes: int | None, peak_bytes: int | None = None) -> Timing:
        return cls(statistics.median(times), min(times), max(times), len(times), peak_extra_bytes, peak_bytes)

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
        }


def measure(call: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Time `call()`, i counting the calls, for about `seconds` of repeats after two calls that warm up.

    On a GPU each call stands between two events on its stream, so that only the end of all repeats is waited for. The
    first call compiles and fills caches, the second one gives the number of repeats and the peak memory.
    """
    call()
    synchronize(device)
    before = 0
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    estimate = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    times = [estimate]
    if estimate <= SLOW_CALL_SECONDS:
        repeats = min(MOST_REPEATS, max(FEWEST_REPEATS, round(seconds / max(estimate, 1e-9))))
        times = _time_on_gpu(call, repeats) if device.type == "cuda" else _time_on_cpu(call, repeats)
    extra = None if peak is None else peak - before
    return Timing.of(times, extra, peak)


def expected_seconds(call: float, seconds: float) -> float:
    """What `measure` will take for calls of `call` seconds, compilation not counted."""
    return 2 * call if call > SLOW_CALL_SECONDS else 2 * call + max(FEWEST_REPEATS * call, seconds)


def _time_on_gpu(call: Callable[[], object], repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _time_on_cpu(call: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets of inputs to rotate, so that a call does not find its inputs in the cache: twice the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(8, -(-2 * cache // bytes_per_set)))
