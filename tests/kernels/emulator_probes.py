"""Runs small kernels, written in PTX, for the tests of the emulator: threads that read and write tensors."""

from __future__ import annotations

import numpy as np
from emulator.machine import Kernel, Launch
from emulator.memory import GlobalMemory, RaceReport


def kernel_text(body: str, tensors: int = 1, threads: int = 32) -> str:
    """A kernel with the thread's number in %r0 and the address of its entry of 4 bytes in tensor i in %rd{i}."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 probe_param_{i}" for i in range(tensors))
    addresses = "\n".join(
        f"ld.param.b64 %rd{i}, [probe_param_{i}];\nmad.wide.u32 %rd{i}, %r0, 4, %rd{i};" for i in range(tensors)
    )
    return f"""
        .version 8.7
        .target sm_90a
        .address_size 64
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry probe({parameters})
        .reqntid {threads}
        {{
        .reg .pred %p<64>;
        .reg .b16 %rs<64>;
        .reg .b32 %r<512>;
        .reg .b64 %rd<64>;
        mov.u32 %r0, %tid.x;
        {addresses}
        {body}
        ret;
        }}
    """


def execute(
    body: str, *tensors: np.ndarray, threads: int = 32, shared: int = 0, blocks: int = 1, order: str = "lockstep"
) -> tuple[list[np.ndarray], RaceReport]:
    """The tensors after a launch, and the report."""
    kernel = Kernel(kernel_text(body, len(tensors), threads))
    report = RaceReport()
    named = {f"t{i}": np.ascontiguousarray(t).view(np.uint8).reshape(-1) for i, t in enumerate(tensors)}
    memory = GlobalMemory(named, kernel.cells["global"], kernel.warps, report)
    Launch((blocks, 1, 1), [memory.places[name] for name in named], memory, shared).run(kernel, order)
    after = [memory.content(name).view(t.dtype).reshape(t.shape) for name, t in zip(named, tensors, strict=True)]
    return after, report
