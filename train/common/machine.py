"""What a result was measured on, in words, and how much of its CPUs was not the measurement's own."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "titans-pytorch")
PROC_STAT = Path("/proc/stat")
LOOK_SECONDS = 0.5
SHORTEST_WINDOW = 0.4  # seconds; below it the kernel's ticks, 10 ms a CPU, are too coarse
TOLERATED_CPUS = 0.1
TOLERATED_SHARE = 0.05  # of the CPUs that the measurement leaves free: it shares caches and memory with them


def describe_machine(device: torch.device, threads: int | None = None) -> str:
    """The GPU's name, or the processor's and the number of threads, by default those that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads() if threads is None else threads
    return f"{platform.processor() or platform.machine()} CPU, {threads} threads"


def describe_versions() -> str:
    """Versions of what has a part in the times, "torch 2.13.0, triton 3.7.1, …"; what is not installed is left out."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


class OtherProcesses:
    """What the processes besides this one do to the CPUs, from the making of this object on.

    helpers: CPU seconds that children which still run have used so far, where they work for this process.
    """

    def __init__(self, helpers: Callable[[], float] = lambda: 0.0) -> None:
        self._helpers = helpers
        self._began = self._read()

    def cpus(self) -> float | None:
        """How many CPUs they kept busy, as a mean since the beginning; waiting for a hypervisor counts as being busy.

        Children that still run are others unless they are helpers, those that were waited for are not. Where the kernel
        does not count its CPUs' time it is the load of the last minute less this process' own; where it has no load
        either, and for less than SHORTEST_WINDOW, None.
        """
        now, began = self._read(), self._began
        seconds = now.clock - began.clock
        if seconds < SHORTEST_WINDOW:
            return None
        own = (now.own - began.own) / seconds
        ticks = now.ticks - began.ticks
        if ticks > 0:
            return max(0.0, count_cpus() * (now.busy - began.busy) / ticks - own)
        if hasattr(os, "getloadavg"):
            return max(0.0, os.getloadavg()[0] - own)
        return None

    def _read(self) -> _Times:
        times = _read_times()
        return times._replace(own=times.own + self._helpers())


def look_around() -> float | None:
    """How many CPUs other processes keep busy while this one sleeps for LOOK_SECONDS; None where that is unknown."""
    others = OtherProcesses()
    time.sleep(LOOK_SECONDS)
    return others.cpus()


def describe_others(cpus: float | None, threads: int, worst: float | None = None) -> str:
    """What other processes use beside a measurement with so many threads, and what to do if that is too much.

    Args:
        cpus: that they kept busy; None: unknown, and the sentence is empty.
        worst: the same in that one of several measurements in which it was the most.
    """
    if cpus is None:
        return ""
    count = count_cpus()
    most = "" if worst is None else f" ({worst:.1f} in the worst measurement)"
    sentence = f"{cpus:.1f} of {count} CPUs busy with other processes{most}"
    if max(cpus, worst or 0.0) <= TOLERATED_CPUS + TOLERATED_SHARE * max(0, count - threads):
        return sentence
    return f"{sentence}: these times are too long and spread; run again on an idle machine"


def advise_threads(cpus: float | None, threads: int) -> str:
    """What to do if other processes keep so many CPUs busy that some of so many threads find none: the threads of an
    operation wait for the last of them, at thousands of operations a step. Empty where nothing is to be done."""
    free = count_cpus() - round(cpus or 0.0)
    if threads <= max(1, free):
        return ""
    return (
        f"other processes keep {cpus:.1f} of {count_cpus()} CPUs busy, and {threads} threads wait for them at every "
        f"operation: set OMP_NUM_THREADS={max(1, free)}, which is faster then"
    )


def count_cpus() -> int:
    """The CPUs that this process may use."""
    return len(_usable_cpus())


class _Times(NamedTuple):
    """Seconds by the clock and of this process; ticks of the CPUs that it may use, 0 where the kernel counts none."""

    clock: float
    own: float
    busy: int
    ticks: int


def _read_times() -> _Times:
    children = os.times()
    own = time.process_time() + children.children_user + children.children_system
    return _Times(time.perf_counter(), own, *_read_cpu_ticks())


def _read_cpu_ticks() -> tuple[int, int]:
    """What Linux counts of the CPUs that this process may use: busy ticks, and all; zeros elsewhere."""
    try:
        text = PROC_STAT.read_text(encoding="ascii")
    except OSError:
        return 0, 0
    busy = ticks = 0
    usable = _usable_cpus()
    for number, counts in re.findall(r"^cpu(\d+) ([\d ]+)$", text, re.M):
        if int(number) in usable:
            # user, nice, system, idle, iowait, irq, softirq, steal; guests, which follow, are part of the users.
            kinds = [int(count) for count in counts.split()][:8]
            ticks += sum(kinds)
            busy += sum(kinds) - sum(kinds[3:5])
    return busy, ticks


def _usable_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
