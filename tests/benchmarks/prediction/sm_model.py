"""A model of one multiprocessor (SM) of Hopper that runs the instructions of a kernel in order. Estimates only.

A warp issues an instruction when what it reads is there, its scheduler is free and the unit takes another one. Results
arrive after a fixed latency, copies to shared memory when their group is waited for. Loads, stores and shuffles pass a
pipe that the four schedulers of an SM share. A barrier is passed when all warps of the block have come. The schedulers
are taken to behave alike, so one is run, with the warps that fall to it. Caches, bank conflicts and the order in which
a real scheduler picks warps are not modelled.

Numbers are cycles, from published microbenchmarks of Volta to Hopper and rounded; none is fitted to these kernels.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import Instruction, wgmma_columns, words

SCHEDULERS = 4
LATENCY = {
    "FLOAT": 4, "INTEGER": 5, "PERMUTE": 5, "CONVERT": 5, "UNIFORM": 8, "HMMA": 33, "LDSM": 33, "LDS": 30, "SHFL": 24,
    "MUFU": 22, "LDL": 35, "LDG": 650, "COPY": 650,
}  # fmt: skip
OTHER_LATENCY = 4
# Cycles until a unit takes the next instruction of its kind from one scheduler.
INTERVAL = {
    "INTEGER": 1.5, "PERMUTE": 2, "CONVERT": 2, "UNIFORM": 2, "HMMA": 6.4, "MUFU": 8, "SHFL": 2, "LDS": 2, "STS": 2,
    "LDSM": 4, "STSM": 4, "LDL": 2, "STL": 2, "LDG": 4, "STG": 4, "COPY": 4,
}  # fmt: skip
WIDE_SHARED_LOAD = 4  # more for 16 bytes a thread
BARRIER = 18
FENCE = 20
WGMMA_LEAST, WGMMA_BASE, WGMMA_PER_COLUMN = 60, 30, 0.5
BLOCK_SKEW = 700  # by how much blocks on one SM are out of step
REPEATS, WARM_UP = 6, 2


@dataclass(frozen=True)
class Estimate:
    """cycles of one pass of a block; instructions a warp issues in it; by reason, the share of a warp's time."""

    cycles: float
    instructions: int
    stalls: dict[str, float]


class _Warp:
    def __init__(self, block: int, start: float):
        self.block, self.time = block, start
        self.position = self.passes = 0
        self.ready: dict[str, tuple[float, str]] = {}  # of a register: when it may be read, and who writes it
        self.products_end = 0.0  # of the asynchronous products
        self.copies_end = 0.0  # of the asynchronous copies that are in no group yet
        self.groups: list[float] = []  # the ends of the groups of copies, in order
        self.issued = 0.0  # when it issued last
        self.arrived: float | None = None  # at a barrier
        self.ends: list[float] = []  # of each pass


class _Scheduler:
    """One of the four, with its warps."""

    def __init__(self, program: Sequence[Instruction], warps: int, blocks: int, passes: int):
        self.program, self.passes = program, passes
        self.warps_of_block = max(1, warps // SCHEDULERS)
        count = -(-warps * blocks // (SCHEDULERS * self.warps_of_block))  # small blocks share the schedulers
        skew = BLOCK_SKEW if passes > 1 else 0
        self.warps = [_Warp(block, block * skew) for block in range(count) for _ in range(self.warps_of_block)]
        self.sharers = min(SCHEDULERS, warps * blocks)
        self.free = self.pipe_free = 0.0
        self.unit_free: defaultdict[str, float] = defaultdict(float)
        self.waiting: defaultdict[int, list[_Warp]] = defaultdict(list)
        self.stalls: Counter[str] = Counter()

    def run(self) -> None:
        if not self.program:
            return
        while True:
            ready = [w for w in self.warps if w.passes < self.passes and w.arrived is None]
            if not ready:
                return
            # The warp that can issue first; of equals the one that has waited longest.
            time, warp, reason = min((self._earliest(w) for w in ready), key=lambda x: (x[0], x[1].issued))
            self._issue(warp, time, reason)

    def _earliest(self, warp: _Warp) -> tuple[float, _Warp, str]:
        instruction = self.program[warp.position]
        time, reason = warp.time, "issue"
        for name in (*instruction.reads, *instruction.writes):
            written = warp.ready.get(name)
            if written is not None and written[0] > time:
                time, reason = written
        if instruction.opcode.startswith("WARPGROUP.DEPBAR") and warp.products_end > time:
            time, reason = warp.products_end, "HGMMA"
        if instruction.opcode.startswith("DEPBAR"):
            left = int(re.search(r"SB\d, 0x([0-9a-f]+)", instruction.text).group(1), 16)
            end = max(warp.groups[: len(warp.groups) - left], default=0.0)
            time, reason = (end, "COPY") if end > time else (time, reason)
        return max(time, self.free, self.unit_free[instruction.kind]), warp, reason

    def _issue(self, warp: _Warp, time: float, reason: str) -> None:
        instruction = self.program[warp.position]
        self._note(warp, reason, time - warp.time)
        self.free = time + 1
        self.unit_free[instruction.kind] = time + INTERVAL.get(instruction.kind, 1)
        latency = self._latency(warp, instruction, time)
        for name in instruction.writes:
            warp.ready[name] = (time + latency, instruction.kind)
        if instruction.kind == "COPY":
            warp.copies_end = max(warp.copies_end, time + latency)
        elif instruction.opcode == "LDGDEPBAR":
            warp.groups.append(warp.copies_end)
        warp.issued = time
        warp.time = time + (FENCE if instruction.kind == "FENCE" else 1)
        if instruction.kind == "BAR":
            self._arrive(warp, time)
        warp.position += 1
        if warp.position == len(self.program):
            warp.position, warp.passes = 0, warp.passes + 1
            warp.ends.append(warp.time)

    def _latency(self, warp: _Warp, instruction: Instruction, time: float) -> float:
        if instruction.kind == "HGMMA":
            columns = wgmma_columns(instruction.opcode)
            length = max(WGMMA_LEAST, WGMMA_BASE + WGMMA_PER_COLUMN * columns * self.warps_of_block)
            warp.products_end = max(warp.products_end, time) + length
            return warp.products_end - time
        latency = LATENCY.get(instruction.kind, OTHER_LATENCY) + self._pass_pipe(instruction, time)
        return latency + (WIDE_SHARED_LOAD if instruction.kind == "LDS" and words(instruction.opcode) == 4 else 0)

    def _pass_pipe(self, instruction: Instruction, time: float) -> float:
        """Cycles that an instruction waits for the pipe of memory and shuffles."""
        length = pipe_cycles(instruction)
        if not length:
            return 0.0
        start = max(self.pipe_free, time)
        self.pipe_free = start + self.sharers * length
        return start - time

    def _arrive(self, warp: _Warp, time: float) -> None:
        waiting = self.waiting[warp.block]
        waiting.append(warp)
        warp.arrived = time
        if len(waiting) < self.warps_of_block:
            return
        release = max(w.arrived for w in waiting) + BARRIER
        for w in waiting:
            self._note(w, "BAR", release - w.arrived)
            w.time, w.arrived = release, None
            if w.ends and w.position == 0:  # the barrier ends a pass
                w.ends[-1] = release
        waiting.clear()

    def _note(self, warp: _Warp, reason: str, cycles: float) -> None:
        if warp.passes >= WARM_UP or self.passes == 1:
            self.stalls[reason] += cycles


def pipe_cycles(instruction: Instruction) -> int:
    """Cycles of the shared pipe that a warp's instruction takes."""
    if instruction.kind in ("LDSM", "STSM"):
        return 4 if words(instruction.opcode) == 4 else 2
    if instruction.kind in ("LDS", "STS", "LDL", "STL", "LDG", "STG", "COPY"):
        return words(instruction.opcode)
    return 1 if instruction.kind == "SHFL" else 0


def estimate(program: Sequence[Instruction], *, warps: int, blocks: int = 1, loop: bool = True) -> Estimate:
    """Cycles of a block for one pass through `program`, while `blocks` blocks of `warps` warps are on the SM.

    Args:
        loop: the program is the body of a loop: of several passes, the later ones count. Else it is run once.
    """
    passes = REPEATS if loop else 1
    core = _Scheduler(program, warps, blocks, passes)
    core.run()
    total = sum(core.stalls.values()) or 1.0
    stalls = {reason: cycles / total for reason, cycles in core.stalls.most_common()}
    if not program:
        return Estimate(0.0, 0, {})
    if not loop:
        return Estimate(max(w.ends[0] for w in core.warps), len(program), stalls)
    steady = [(w.ends[-1] - w.ends[WARM_UP - 1]) / (passes - WARM_UP) for w in core.warps]
    return Estimate(sum(steady) / len(steady), len(program), stalls)
