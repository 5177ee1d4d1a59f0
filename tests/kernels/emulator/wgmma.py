"""Products of a warpgroup, four warps: wgmma.mma_async and what orders it.

A product is issued, and done when its warps wait for it; only then the second factor, and maybe the first, is read from
shared memory. Meanwhile no instruction may read its results (`Threads.accumulators`), nor write its factors there
(`SharedMemory.begin_product`); the registers of its first factor are taken when it is issued.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .errors import EmulationError
from .exchange import whole_warps
from .matrix import WIDEN, a_places, accumulator_places, entries
from .memory import SharedMemory
from .ptx import Instruction, elements
from .table import Run, instruction
from .threads import WARP, Layout, Mask, Threads

GROUP_WARPS = 4
CHUNK = 16  # bytes that swizzling moves as one
_FORM = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|8)\.f32\.(bf16|f16|tf32)\.(bf16|f16|tf32)")


@dataclass(frozen=True)
class Descriptor:
    """A matrix in shared memory: where it starts, bytes between its repeating blocks, and how it is swizzled.

    leading, stride  bytes between blocks along the contiguous and the other axis.
    pitch            bytes of a row of a block: 128, 64 or 32, a row is swizzled as a whole.
    """

    start: int
    leading: int
    stride: int
    pitch: int

    @classmethod
    def decode(cls, bits: int, ins: Instruction) -> Descriptor:
        mode, base_offset = bits >> 62, (bits >> 49) & 7
        if mode == 0 or base_offset:
            raise ins.unsupported(f"has the descriptor {bits:#x}, of a layout that is not emulated")
        start, leading, stride = (((bits >> place) & 0x3FFF) << 4 for place in (0, 16, 32))
        return cls(start, leading, stride, {1: 128, 2: 64, 3: 32}[mode])

    def chunks(self, rows: int, transposed: bool) -> np.ndarray:
        """Addresses of the 16-byte chunks of a matrix whose rows have 32 bytes, the depth of one product.

        [rows, 2] if the depth is contiguous; `transposed`, if the rows' axis is: [16, rows / 8], entries of 2 bytes.
        """
        if transposed:
            depth, across = np.arange(16)[:, None], CHUNK * np.arange(rows // 8)[None, :]
            linear = self.start + depth // 8 * self.stride + depth % 8 * self.pitch
            linear = linear + across % self.pitch + across // self.pitch * self.leading
        else:
            row, part = np.arange(rows)[:, None], np.arange(2)[None, :]
            linear = self.start + row // 8 * self.stride + row % 8 * self.pitch + CHUNK * part
        return linear ^ ((linear >> 7) % (self.pitch // CHUNK) * CHUNK)


def _load(memory: SharedMemory, chunks: np.ndarray, transposed: bool, kind: str) -> np.ndarray:
    """The matrix [rows, depth] in float32."""
    entry = np.uint32 if kind == "tf32" else np.uint16
    found = memory.data.view(entry).reshape(-1, CHUNK // np.dtype(entry).itemsize)[chunks // CHUNK]
    matrix = WIDEN[kind](found.reshape(len(chunks), -1))
    return matrix.T if transposed else matrix


@instruction("wgmma.mma_async")
def _multiply(ins: Instruction, layout: Layout) -> Run:
    """[64, K] × [K, N] + [64, N] in float32; K is 16, of tf32 8. The first factor is in registers or shared memory."""
    form = _FORM.fullmatch(ins.opcode)
    if form is None or form.group(3) != form.group(4) or (form.group(2) == "8") != (form.group(3) == "tf32"):
        raise ins.unsupported()
    width, kind = int(form.group(1)), form.group(3)
    in_registers = ins.operands[1].startswith("{")
    results = [layout.register(name) for name in elements(ins.operands[0])]
    layout.written.extend(results)
    keep, *flags = ins.operands[3:]
    numbers = [layout.immediate(flag) for flag in flags]
    transposed = [bool(x) for x in numbers[2:]] or [False] * (1 if in_registers else 2)
    if numbers[:2] != [1, 1] or len(transposed) != (1 if in_registers else 2) or len(results) != width // 2:
        raise ins.unsupported("has signs or transpositions that are not emulated")
    read_keep = layout.reader(keep, np.bool_)
    descriptors = [layout.reader(operand, np.uint64) for operand in ins.operands[1 + in_registers : 3]]
    factor = layout.readers(ins.operands[1], np.uint32) if in_registers else []
    rows, columns = _group_places(accumulator_places(len(results)))
    a_rows, a_columns = _group_places(a_places(kind))

    def run(threads: Threads, mask: Mask) -> None:
        if not whole_warps(threads, mask, ins).all() or threads.size % (GROUP_WARPS * WARP):
            raise EmulationError(f"{ins}: four warps must run it together")
        groups = threads.size // (GROUP_WARPS * WARP)
        kept = _uniform(read_keep(threads), groups, ins)
        sources = [_uniform(read(threads), groups, ins) for read in descriptors]
        if in_registers:
            left = np.empty((groups, 64, 8 if kind == "tf32" else 16), np.float32)
            left[:, a_rows, a_columns] = entries(threads, factor, kind).reshape(groups, *a_rows.shape)
        memory, warps = threads.block.shared, threads.warp_numbers.reshape(groups, GROUP_WARPS)
        chunks = [
            [Descriptor.decode(int(bits), ins).chunks(size, flag) for bits in source]
            for source, size, flag in zip(sources, (64, width)[-len(sources) :], transposed, strict=True)
        ]
        read = [
            (memory.begin_product(one.reshape(-1), CHUNK, group, ins), group)
            for factor in chunks
            for one, group in zip(factor, warps, strict=True)
        ]
        for slot in results:
            if slot not in threads.accumulators:
                before = threads.read(slot) if kept.any() else np.zeros(threads.size, np.uint32)
                threads.accumulators[slot], threads.values[slot] = before, None

        def finish() -> None:
            total = np.empty((groups, 64, width), np.float32)
            before = np.stack([threads.accumulators[slot].view(np.float32) for slot in results], 1)
            total[:, rows, columns] = before.reshape(groups, *rows.shape)
            total[~kept] = 0
            for group in range(groups):
                a, b = (left[group], None) if in_registers else (None, None)
                loaded = [
                    _load(memory, factor[group], flag, kind) for factor, flag in zip(chunks, transposed, strict=True)
                ]
                a, b = (a, loaded[0]) if in_registers else loaded
                total[group] += a @ b.T
            after = total[:, rows, columns].reshape(threads.size, len(results))
            for place, slot in enumerate(results):
                threads.accumulators[slot] = np.ascontiguousarray(after[:, place]).view(np.uint32)
            for cells, group in read:
                memory.end_product(cells, group, ins)

        threads.products[-1].append((finish, results))

    return run


def _group_places(places: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Places of a warp in 16 rows → those of four warps in 64, one under the other, [4, 32, …]."""
    rows, columns = np.broadcast_arrays(*places)
    below = 16 * np.arange(GROUP_WARPS).reshape(-1, *[1] * rows.ndim)
    return rows + below, np.broadcast_to(columns, (GROUP_WARPS, *columns.shape))


def _uniform(values: np.ndarray, groups: int, ins: Instruction) -> np.ndarray:
    """One value a warpgroup, [groups].

    Raises:
        EmulationError: if its threads have different ones.
    """
    values = values.reshape(groups, -1)
    if (values != values[:, :1]).any():
        raise EmulationError(f"{ins}: the threads of a warpgroup must have the same descriptor and scale")
    return values[:, 0]


@instruction("wgmma.fence.sync.aligned")
def _fence(ins: Instruction, layout: Layout) -> Run:
    """Orders registers before products that use them. Compilers emit it; that it is there is not checked."""
    return lambda threads, mask: None


@instruction("wgmma.commit_group.sync.aligned")
def _commit(ins: Instruction, layout: Layout) -> Run:
    return lambda threads, mask: threads.products.append([])


@instruction("wgmma.wait_group.sync.aligned")
def _wait(ins: Instruction, layout: Layout) -> Run:
    """For all committed groups but the last n."""
    pending = layout.immediate(ins.operands[0])

    def run(threads: Threads, mask: Mask) -> None:
        for _ in range(len(threads.products) - 1 - pending):
            for finish, _ in threads.products.pop(0):
                finish()
        in_flight = {slot for group in threads.products for _, results in group for slot in results}
        for slot in threads.accumulators.keys() - in_flight:
            threads.values[slot] = threads.accumulators.pop(slot)

    return run
