"""Matrices held by a warp: ldmatrix, stmatrix, mma.sync.

In PTX's terms lane 4g + t belongs to group g and has place t in it; a register of 32 bits holds two entries of 16 bits,
neighbours in a row, or one of 32.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .exchange import memory_of, whole_warps
from .floats import from_bfloat16, from_float16, from_tf32
from .ptx import Instruction, elements
from .table import Run, instruction
from .threads import WARP, Layout, Mask, Reader, Threads, Vector

GROUP, PLACE = np.arange(WARP) // 4, np.arange(WARP) % 4
WIDEN: dict[str, Callable[[Vector], Vector]] = {"bf16": from_bfloat16, "f16": from_float16, "tf32": from_tf32}


def entries(threads: Threads, reads: list[Reader], kind: str) -> np.ndarray:
    """The entries in some registers as float32: [warps, 32, registers, entries of one]."""
    bits = np.stack([read(threads) for read in reads], 1)
    halves = bits if kind == "tf32" else bits.view(np.uint16)
    return WIDEN[kind](np.ascontiguousarray(halves)).reshape(-1, WARP, len(reads), 1 if kind == "tf32" else 2)


def a_places(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [32, 4 registers, entries] of the first factor, [16, 16] or, of tf32, [16, 8]."""
    register = np.arange(4)[None, :, None]
    rows = GROUP[:, None, None] + 8 * (register % 2)
    if kind == "tf32":
        return rows, PLACE[:, None, None] + 4 * (register // 2)
    columns = 2 * PLACE[:, None, None] + 8 * (register // 2) + np.arange(2)
    return np.broadcast_to(rows, columns.shape), columns


def b_places(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [32, 2 registers, entries] of the second factor, [16, 8] or, of tf32, [8, 8]."""
    register = np.arange(2)[None, :, None]
    if kind == "tf32":
        rows = PLACE[:, None, None] + 4 * register
    else:
        rows = 2 * PLACE[:, None, None] + 8 * register + np.arange(2)
    return rows, np.broadcast_to(GROUP[:, None, None], rows.shape)


def accumulator_places(registers: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [32, registers] of an accumulator, [16, 8] for each four registers, side by side."""
    register = np.arange(registers)[None, :]
    rows = GROUP[:, None] + 8 * (register // 2 % 2)
    return rows, 2 * PLACE[:, None] + register % 2 + 8 * (register // 4)


# -- ldmatrix, stmatrix ------------------------------------------------------------------------------------------------


@instruction("ldmatrix", "stmatrix")
def _move_matrices(ins: Instruction, layout: Layout) -> Run:
    """One, two or four 8×8 matrices of 16-bit entries. Lanes 8i to 8i + 7 give the addresses of the i-th one's rows."""
    form = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", ins.opcode)
    if form is None:
        raise ins.unsupported()
    load, count, transposed = form.group(1) == "ld", int(form.group(2)), form.group(3) is not None
    registers, where = ins.operands if load else ins.operands[::-1]
    if len(elements(registers)) != count:
        raise ins.unsupported()
    address = layout.address(where)
    # The entries of a lane: row g and columns 2t, 2t + 1, or the transposed places.
    rows, columns = np.broadcast_arrays(GROUP[:, None], 2 * PLACE[:, None] + np.arange(2))
    if transposed:
        rows, columns = columns, rows

    def row_addresses(threads: Threads, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = address(threads).reshape(-1, WARP)[active][:, : 8 * count]
        return starts.reshape(-1), np.repeat(threads.warp_numbers[active], 8 * count)

    if load:
        writes = layout.writers(registers)

        def run(threads: Threads, mask: Mask) -> None:
            active = whole_warps(threads, mask, ins)
            starts, warps = row_addresses(threads, active)
            found = memory_of(threads, "shared").read(starts, np.uint64, 2, warps, ins)
            matrices = np.zeros((len(active), count, 8, 8), np.uint16)
            matrices[active] = found.view(np.uint16).reshape(-1, count, 8, 8)
            values = np.ascontiguousarray(matrices[:, :, rows, columns]).view(np.uint32)[..., 0]
            for place, write in enumerate(writes):
                write(threads, np.ascontiguousarray(values[:, place]).reshape(-1), mask)

        return run

    reads = layout.readers(registers, np.uint32)

    def run(threads: Threads, mask: Mask) -> None:
        active = whole_warps(threads, mask, ins)
        starts, warps = row_addresses(threads, active)
        values = np.stack([read(threads).reshape(-1, WARP) for read in reads], 1)[active]
        matrices = np.zeros((len(values), count, 8, 8), np.uint16)
        matrices[:, :, rows, columns] = values.view(np.uint16).reshape(*values.shape, 2)
        memory_of(threads, "shared").write(starts, matrices.view(np.uint64).reshape(-1, 2), warps, ins)

    return run


# -- mma.sync ----------------------------------------------------------------------------------------------------------

_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(bf16|f16|tf32)\.(bf16|f16|tf32)\.f32")


@instruction("mma.sync")
def _multiply(ins: Instruction, layout: Layout) -> Run:
    """[16, K] × [K, 8] + [16, 8] in float32; K is 16, of tf32 8."""
    form = _MMA.fullmatch(ins.opcode)
    if form is None or form.group(2) != form.group(3) or (form.group(1) == "8") != (form.group(2) == "tf32"):
        raise ins.unsupported()
    depth, kind = int(form.group(1)), form.group(2)
    writes = layout.writers(ins.operands[0])
    a, b = (layout.readers(operand, np.uint32) for operand in ins.operands[1:3])
    c = layout.readers(ins.operands[3], np.float32)
    if [len(x) for x in (writes, a, b, c)] != [4, 4, 2, 4]:
        raise ins.unsupported()
    a_at, b_at, c_at = a_places(kind), b_places(kind), accumulator_places()

    def run(threads: Threads, mask: Mask) -> None:
        whole_warps(threads, mask, ins)
        warps = threads.size // WARP
        left, right = np.empty((warps, 16, depth), np.float32), np.empty((warps, depth, 8), np.float32)
        total = np.empty((warps, 16, 8), np.float32)
        left[(slice(None), *a_at)] = entries(threads, a, kind)
        right[(slice(None), *b_at)] = entries(threads, b, kind)
        total[(slice(None), *c_at)] = np.stack([read(threads) for read in c], 1).reshape(warps, WARP, 4)
        result = (total + left @ right)[(slice(None), *c_at)]
        for place, write in enumerate(writes):
            write(threads, np.ascontiguousarray(result[:, :, place]).reshape(-1), mask)

    return run
