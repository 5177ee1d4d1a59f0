"""Launches of Triton kernels on CPU tensors, compiled for a GPU and emulated.

    with emulate(90) as emulation:
        o, state = local_memory(q, k, v, lr, params, backend="triton", …)
    assert not emulation.report.races

Needs triton 3.6 or newer and no TRITON_INTERPRET. Kernels are compiled to PTX only, into a folder of Triton's cache.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from modeling_tnt.kernels.fused.limits import assume_device

from .errors import EmulationError, Unsupported
from .machine import Kernel, Launch
from .memory import GlobalMemory, RaceReport

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import recording  # noqa: E402  (a script beside the tests, in no package)

OLDEST_TRITON = (3, 6)


@dataclass
class Emulation:
    """What was run.

    orders       (order of warps, whether blocks ran backwards) of each run of a launch; the first one counts.
    launches     by name of the kernel.
    differences  (kernel, order): launches whose results another order changed.
    kernels      by `Launch.key`: what was compiled, with the bytes of shared memory of its blocks.
    """

    target: int
    orders: Sequence[tuple[str, bool]] = (("lockstep", False),)
    report: RaceReport = field(default_factory=RaceReport)
    launches: Counter = field(default_factory=Counter)
    differences: Counter = field(default_factory=Counter)
    kernels: dict[str, tuple[Kernel, int]] = field(default_factory=dict)

    def run(self, recorded: recording.Launch, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Compile and run one launch; its tensors hold the results afterwards."""
        if recorded.key not in self.kernels:
            ptx, shared_bytes = compile_to_ptx(recorded)
            self.kernels[recorded.key] = Kernel(ptx), shared_bytes
        kernel, shared_bytes = self.kernels[recorded.key]
        if shared_bytes > recording.SHARED_LIMITS[self.target]:
            raise EmulationError(f"{recorded.name} needs {shared_bytes} bytes of shared memory")
        self.report.kernel = recorded.name
        self.launches[recorded.name] += 1
        flat = [pair for name, value in arguments.items() for pair in _flatten(name, recorded.signature[name], value)]
        storages = _storages(flat)
        grid = (*grid, *(1 for _ in range(3 - len(grid))))
        memories = []
        for order, backwards in self.orders:
            report = RaceReport() if memories else self.report
            memory = GlobalMemory(
                {name: content for name, content in storages.values()}, kernel.cells["global"], kernel.warps, report
            )
            parameters = [_bits(value, kind, storages, memory) for _, kind, value in flat]
            parameters += [0] * (len(kernel.program.parameters) - len(parameters))  # scratch that is not used
            Launch(grid, parameters, memory, shared_bytes).run(kernel, order, backwards)
            memories.append(memory)
            if not np.array_equal(memory.data, memories[0].data):
                self.differences[recorded.name, f"{order}{', blocks backwards' * backwards}"] += 1
        for name, content in storages.values():
            content[:] = memories[0].content(name)


def _flatten(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, type, value) of the arguments that are no constants; a tuple has several."""
    if isinstance(kind, tuple):
        for place, (one, part) in enumerate(zip(kind, value, strict=True)):
            yield from _flatten(f"{name}.{place}", one, part)
    elif kind != "constexpr":
        yield name, kind, value


def _storages(flat: list[tuple[str, str, Any]]) -> dict[int, tuple[str, np.ndarray]]:
    """Address of each storage → the name of the first argument in it, and its bytes."""
    found: dict[int, tuple[str, np.ndarray]] = {}
    for name, _, value in flat:
        if isinstance(value, torch.Tensor) and (storage := value.untyped_storage()).nbytes():
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            found.setdefault(storage.data_ptr(), (name, content))
    return found


def _bits(value: Any, kind: str, storages: dict[int, tuple[str, np.ndarray]], memory: GlobalMemory) -> int:
    """A parameter as an integer."""
    if isinstance(value, torch.Tensor):
        if not value.untyped_storage().nbytes():
            return 0
        name, _ = storages[value.untyped_storage().data_ptr()]
        return memory.places[name] + value.storage_offset() * value.element_size()
    if kind.startswith("fp"):
        if kind != "fp32":
            raise Unsupported(f"a parameter of type {kind} is not emulated")
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value)


def compile_to_ptx(launch: recording.Launch) -> tuple[str, int]:
    """PTX and bytes of shared memory, without the assembler, which would take most of the time.

    What is cached has an empty binary in it, so it has a folder of its own.
    """
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", launch.target, 32)
    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.cache.dir = str(Path(knobs.cache.dir) / "ptx_only")
        knobs.runtime.add_stages_inspection_hook = _skip_assembler
        found = triton.compile(source, target=target, options=launch.options.__dict__)
    return found.asm["ptx"], found.metadata.shared


def _skip_assembler(backend=None, stages=None, options=None, language=None, capability=None) -> tuple[str, str] | None:
    """Triton's hook into its stages. Called without arguments it returns a key of what it does, twice."""
    if stages is None:
        return "ptx_only", "ptx_only"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


@contextlib.contextmanager
def emulate(target: int, orders: Sequence[tuple[str, bool]] = (("lockstep", False),)) -> Iterator[Emulation]:
    """Within it, launches of Triton kernels on CPU tensors run as a GPU of compute capability `target` would run them.

    Args:
        target: 80, 89, 90, 100 or 120.
        orders: (a key of `machine.ORDERS`, whether blocks run backwards): each launch runs once for each; results are
            those of the first, and `Emulation.differences` has the launches where another's are not the same bytes.

    Raises:
        RuntimeError: if triton is older than 3.6, or TRITON_INTERPRET is set.
        EmulationError: from a launch: what the kernel does wrong or the emulator does not know.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        raise RuntimeError(f"the emulator needs triton 3.6 or newer, this is {triton.__version__}; update triton")
    emulation = Emulation(target, orders)
    with recording.record(target) as launches, assume_device(divmod(target, 10), recording.SHARED_LIMITS[target]):
        bind = JITFunction.run

        def run(self, *args, grid, warmup, **kwargs):
            bind(self, *args, grid=grid, warmup=warmup, **kwargs)
            named = {name: value for name, value in kwargs.items() if name in self.arg_names}
            bound = self.signature.bind(*args, **named)
            bound.apply_defaults()
            emulation.run(launches.pop(), grid(bound.arguments) if callable(grid) else grid, bound.arguments)

        JITFunction.run = run
        try:
            yield emulation
        finally:
            JITFunction.run = bind
