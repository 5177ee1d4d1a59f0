"""From recorded calls to predicted seconds: kernels are compiled, disassembled and run in the model of an SM."""

from __future__ import annotations

import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from recording import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass, sm_model
from .card import Card
from .recording import KernelCall, TorchCall
from .ttir import Program, Work


@dataclass(frozen=True)
class Speed:
    """Cycles of a block: of the hot loop's body (0 without a loop), and of everything else once; with so many on an SM.

    stalls: what a warp waits for in the hot loop, or in the whole kernel if nothing loops, as shares of its time.
    """

    loop: float
    once: float
    stalls: dict[str, float]


@dataclass
class Binary:
    """A compiled kernel. speeds: by blocks on an SM. error: why there is none."""

    registers: int = 0
    shared: int = 0
    blocks: int = 1
    instructions: dict[str, int] = field(default_factory=dict)
    speeds: dict[int, Speed] = field(default_factory=dict)
    ttir: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Timing:
    """A predicted call. cycles: of the hot loop's body, "a tile"; trips: how often a program runs it; moved: bytes."""

    name: str
    operator: str
    seconds: float
    moved: int
    operations: int
    kernel: bool
    bound: str  # "latency", "memory" or "products"
    warps: int = 0
    blocks: int = 0
    cycles: float = 0.0
    trips: int = 0
    programs: int = 0
    waves: int = 0
    stalls: dict[str, float] = field(default_factory=dict)


def blocks_on(card: Card, binary_blocks: int, programs: int) -> int:
    """Blocks that share an SM: no more than fit, nor than there are for each SM."""
    return min(binary_blocks, -(-programs // card.multiprocessors))


# -- Binaries ----------------------------------------------------------------------------------------------------------


def compile_all(calls: Iterable[KernelCall], card: Card, processes: int) -> dict[str, Binary]:
    """The binary of every kernel, by `Launch.key`, with the speeds that its calls need; progress goes to stderr."""
    launches: dict[str, Launch] = {}
    programs: dict[str, set[int]] = {}
    for call in calls:
        launches.setdefault(call.launch.key, call.launch)
        programs.setdefault(call.launch.key, set()).add(math.prod(call.grid))
    jobs = [(launch, sorted(programs[key]), card) for key, launch in launches.items()]
    # Forked, because a kernel that is defined in a script cannot be pickled; the children only compile and count.
    global _jobs
    _jobs = jobs
    binaries: dict[str, Binary] = {}
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for index, binary in pool.imap_unordered(_work, range(len(jobs))):
            launch = jobs[index][0]
            binaries[launch.key] = binary
            outcome = binary.error.splitlines()[0] if binary.error else f"{binary.registers} registers"
            print(f"[{len(binaries)}/{len(jobs)}] {launch.name}: {outcome}", file=sys.stderr)
    return binaries


_jobs: Sequence[tuple[Launch, list[int], Card]] = ()


def _work(index: int) -> tuple[int, Binary]:
    return index, make_binary(*_jobs[index])


def make_binary(launch: Launch, programs: Sequence[int], card: Card) -> Binary:
    """Compile a launch, from the cache if it is there. What the compiler says against it is returned, not raised."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        target = GPUTarget("cuda", launch.target, 32)
        compiled = triton.compile(source, target=target, options=launch.options.__dict__)
    except Exception as error:  # whatever a compiler's passes raise is the result for this kernel
        lines = str(error).strip().splitlines()  # a kernel's source comes first, what is wrong with it last
        return Binary(error=f"{type(error).__name__}: {lines[-1] if lines else ''}")
    cubin, shared, warps = compiled.asm["cubin"], compiled.metadata.shared, launch.options.num_warps
    registers = read_registers(cubin)
    blocks = card.blocks_of(registers, warps, shared)
    listing = sass.parse(sass.disassemble(cubin))
    hot = listing.hot_loop()
    body = listing.straight(hot or ())
    rest = listing.straight(i for i in range(len(listing.instructions)) if hot is None or i not in hot)
    speeds = {}
    for count in {blocks_on(card, blocks, n) for n in programs}:
        loop = sm_model.estimate(body, warps=warps, blocks=count)
        once = sm_model.estimate(rest, warps=warps, blocks=count, loop=False)
        speeds[count] = Speed(loop.cycles, once.cycles, loop.stalls if body else once.stalls)
    kinds = dict(sass.count_kinds(body or rest))
    return Binary(registers, shared, blocks, kinds, speeds, compiled.asm["ttir"])


def read_registers(cubin: bytes) -> int:
    """Registers of a thread, by the cuobjdump that comes with triton."""
    with tempfile.TemporaryDirectory(prefix="registers-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(map(int, re.findall(r"REG:(\d+)", report)))


# -- Times -------------------------------------------------------------------------------------------------------------


class Predictor:
    """Times of calls, from their binaries; what programs do is worked out once for equal arguments."""

    def __init__(self, card: Card, binaries: dict[str, Binary]):
        self.card, self.binaries = card, binaries
        self._programs: dict[str, Program] = {}
        self._work: dict[tuple[str, tuple[int, int, int], str], Work] = {}

    def predict(self, calls: Sequence[KernelCall | TorchCall]) -> list[Timing]:
        """One timing a call; of the launches of an autotuner the fastest.

        Raises:
            ValueError: a kernel does not compile, or its loops cannot be told from its arguments.
        """
        timings: list[Timing] = []
        tuned: dict[int, list[KernelCall]] = {}
        for call in calls:
            if isinstance(call, TorchCall):
                timings.append(self._torch(call))
            elif call.tuning is None:
                timings.append(self._kernel(call))
            else:
                tuned.setdefault(call.tuning, []).append(call)
        return timings + [self._fastest(found) for found in tuned.values()]

    def _fastest(self, calls: list[KernelCall]) -> Timing:
        """What an autotuner keeps; it leaves out what does not compile."""
        compiled = [call for call in calls if self.binaries[call.launch.key].error is None]
        return min((self._kernel(call) for call in compiled or calls), key=lambda timing: timing.seconds)

    def _kernel(self, call: KernelCall) -> Timing:
        binary, card = self.binaries[call.launch.key], self.card
        if binary.error is not None:
            raise ValueError(f"{call.launch.name} does not compile: {binary.error}")
        work, programs = self._work_of(call, binary), math.prod(call.grid)
        blocks = blocks_on(card, binary.blocks, programs)
        waves = -(-programs // (card.multiprocessors * blocks))
        speed, moved = binary.speeds[blocks], programs * (work.read + work.written)
        latency = waves * (work.trips * speed.loop + speed.once) / card.clock
        memory = moved / card.bandwidth
        return Timing(
            call.launch.name, call.operator, card.launch + max(latency, memory), moved, programs * work.operations,
            True, "memory" if memory > latency else "latency", call.launch.options.num_warps, blocks,
            speed.loop if work.trips else speed.once, work.trips or 1, programs, waves, speed.stalls,
        )  # fmt: skip

    def _work_of(self, call: KernelCall, binary: Binary) -> Work:
        key = (call.launch.key, call.grid, repr(call.arguments))
        known = self._work.get(key)
        if known is None:
            if call.launch.key not in self._programs:
                self._programs[call.launch.key] = Program(binary.ttir)
            known = self._work[key] = self._programs[call.launch.key].run(call.arguments, call.grid)
        return known

    def _torch(self, call: TorchCall) -> Timing:
        rate = self.card.fp32 if call.dtype in (torch.float32, torch.float64) else self.card.bf16
        products, memory = call.operations / rate, call.moved / self.card.bandwidth
        seconds = self.card.launch + max(products, memory)
        bound = "products" if products > memory else "memory"
        return Timing(call.name, call.operator, seconds, call.moved, call.operations, False, bound)
