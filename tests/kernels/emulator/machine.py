"""Running a compiled kernel: a block in lockstep or warp after warp, and a grid of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import exchange, matrix, scalar, wgmma  # noqa: F401  (they fill the table of instructions)
from .errors import EmulationError
from .memory import GlobalMemory, SharedMemory
from .ptx import Instruction, Program, parse
from .table import Run, compile_instruction
from .threads import WARP, Layout, Mask, Reader, Threads

# Which warps run next between two barriers: from the numbers of the units, see `ORDERS`. None: all in lockstep.
Order = Callable[[int], Sequence[int]]

ORDERS: dict[str, Callable[[], Order | None]] = {
    "lockstep": lambda: None,
    "ascending": lambda: range,
    "descending": lambda: lambda units: range(units)[::-1],
    "random": lambda: np.random.default_rng(0).permutation,
}


@dataclass(frozen=True)
class Step:
    """An instruction, ready to run.

    run      None for the instructions that steer: bra, ret, bar.sync.
    written  slots of its results.
    target   where a branch goes.
    """

    ins: Instruction
    run: Run | None
    guard: Reader | None
    written: tuple[int, ...]
    target: int = -1

    def mask(self, threads: Threads) -> Mask:
        """Threads that run it; None: all."""
        if self.guard is None:
            return None
        mask = self.guard(threads)
        mask = ~mask if self.ins.negated else mask
        return None if mask.all() else mask


class Kernel:
    """A program whose instructions are compiled to functions.

    Raises:
        Unsupported: if one of its instructions is not emulated.
    """

    def __init__(self, ptx: str) -> None:
        self.program: Program = parse(ptx)
        if self.program.threads % WARP:
            raise EmulationError(f"a block of {self.program.threads} threads is no whole number of warps")
        self.layout = Layout(self.program)
        self.steps = [self._compile(ins) for ins in self.program.instructions]

    def _compile(self, ins: Instruction) -> Step:
        guard = None if ins.predicate is None else self.layout.reader(ins.predicate, np.bool_)
        if ins.opcode in ("bra", "bra.uni"):
            return Step(ins, None, guard, (), self.program.labels[ins.operands[0]])
        if ins.opcode in ("ret", "exit"):
            return Step(ins, None, guard, ())
        if ins.opcode in ("bar.sync", "barrier.sync"):
            if ins.operands != ("0",) or guard is not None:
                raise ins.unsupported("is no barrier of the whole block, which is not emulated")
            return Step(ins, None, None, ())
        self.layout.written = []
        run = compile_instruction(ins, self.layout)
        return Step(ins, run, guard, tuple(self.layout.written))

    @property
    def warps(self) -> int:
        return self.program.threads // WARP

    @cached_property
    def has_products(self) -> bool:
        """Whether warps run in groups of four."""
        return any(step.ins.opcode.startswith("wgmma") for step in self.steps)

    @cached_property
    def cells(self) -> dict[str, int]:
        """Bytes of the narrowest access to each memory (rows of matrices and copies of 16 bytes are wider)."""
        narrowest = {"shared": 4, "global": 4}
        for step in self.steps:
            if (found := exchange.access_width(step.ins)) is not None:
                space, width = found
                narrowest[space] = min(narrowest[space], width)
        return narrowest


class Block:
    """One block of a launch. `Threads` and the instructions look at its memories and parameters."""

    def __init__(self, kernel: Kernel, launch: Launch, place: tuple[int, int, int], order: Order | None) -> None:
        self.kernel, self.order = kernel, order
        self.parameters, self.global_memory = launch.parameters, launch.memory
        self.shared = SharedMemory(
            launch.shared_bytes, kernel.cells["shared"], kernel.warps, launch.memory.report, kernel.has_products
        )
        special = {f"%tid.{axis}": 0 for axis in "yz"}
        special |= {"%ntid.x": kernel.program.threads, "%ntid.y": 1, "%ntid.z": 1}
        special |= {f"%ctaid.{axis}": number for axis, number in zip("xyz", place, strict=True)}
        special |= {f"%nctaid.{axis}": number for axis, number in zip("xyz", launch.grid, strict=True)}
        together = kernel.warps if order is None else wgmma.GROUP_WARPS if kernel.has_products else 1
        self.units = [Threads(first, together, kernel.layout, special) for first in range(0, kernel.warps, together)]
        for unit in self.units:
            unit.block = self

    def run(self) -> None:
        """To its end.

        Raises:
            EmulationError: what an instruction raises; where threads of a unit part; where warps do not meet at one
                barrier.
        """
        places = [0] * len(self.units)
        while True:
            for number in [0] if self.order is None else self.order(len(self.units)):
                places[number] = self._run_to_barrier(self.units[number], places[number])
            if len(set(places)) != 1:
                raise EmulationError("the warps of a block do not meet at one barrier")
            self.shared.barrier()
            self.global_memory.barrier()
            if places[0] == len(self.kernel.steps):
                return

    def _run_to_barrier(self, threads: Threads, place: int) -> int:
        """Run some warps from an instruction on, and return the one after the barrier, or the end."""
        steps = self.kernel.steps
        while place < len(steps):
            step = steps[place]
            mask = step.mask(threads)
            place += 1
            if mask is not None and not mask.any():
                threads.leave(step.written)
            elif step.run is not None:
                step.run(threads, mask)
            elif mask is not None:
                raise EmulationError(f"{step.ins}: some threads of a unit go another way, which is not emulated")
            elif step.target >= 0:
                place = step.target
            elif step.ins.opcode in ("ret", "exit"):
                return len(steps)
            else:
                return place
        return place


@dataclass
class Launch:
    """What a kernel is launched with.

    parameters  bits in the order of the kernel's parameters; addresses are those of `memory`.
    """

    grid: tuple[int, int, int]
    parameters: list[int]
    memory: GlobalMemory
    shared_bytes: int

    def run(self, kernel: Kernel, order: str = "lockstep", backwards: bool = False) -> None:
        """All blocks one after the other, in the order of their numbers or `backwards`, warps as `ORDERS[order]` says.

        Raises:
            EmulationError: what the kernel does wrong, naming it and the block.
        """
        places = list(enumerate(self._places()))
        with np.errstate(all="ignore"):
            for number, place in places[::-1] if backwards else places:
                self.memory.begin_block(number)
                try:
                    Block(kernel, self, place, ORDERS[order]()).run()
                except EmulationError as error:
                    raise type(error)(f"{kernel.program.name}, block {place}: {error}") from error

    def _places(self) -> Iterator[tuple[int, int, int]]:
        width, height, depth = self.grid
        return ((x, y, z) for z in range(depth) for y in range(height) for x in range(width))
