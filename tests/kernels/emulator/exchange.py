"""Instructions by which threads exchange values: shuffles, loads and stores, atomics, copies, barriers, fences."""

from __future__ import annotations

import re

import numpy as np

from .errors import EmulationError
from .memory import Memory
from .ptx import Instruction, elements
from .table import Run, allow, instruction
from .threads import PARAMETER_SPACE, TYPES, WARP, Layout, Mask, Threads, Vector, Writer, bits_of

_SPACES = ("global", "shared", "param")
_CACHE_HINTS = ("ca", "cg", "cs", "wt", "nc", "L1::evict_first", "L1::evict_last", "L1::no_allocate")


def _space(ins: Instruction) -> str:
    found = [part for part in ins.parts for space in _SPACES if part in (space, f"{space}::cta")]
    if len(found) != 1:
        raise ins.unsupported("names no state space that is emulated")
    return found[0].removesuffix("::cta")


def memory_of(threads: Threads, space: str) -> Memory:
    return threads.block.shared if space == "shared" else threads.block.global_memory


def _count(ins: Instruction) -> int:
    """2 of ld.v2."""
    return next((int(part[1:]) for part in ins.parts if re.fullmatch(r"v\d", part)), 1)


def access_width(ins: Instruction) -> tuple[str, int] | None:
    """("shared", 2): the narrowest access of an instruction to global or shared memory, None if there is none."""
    if ins.parts[0] in ("ld", "st", "atom", "red") and _space(ins) != "param":
        return _space(ins), np.dtype(TYPES[ins.parts[-1]]).itemsize
    return None


def _selected(threads: Threads, mask: Mask, vector: Vector) -> Vector:
    return vector if mask is None else vector[mask]


def _spread(threads: Threads, mask: Mask, values: np.ndarray) -> np.ndarray:
    """Values of the selected threads → of all threads; the others' are not looked at."""
    if mask is None:
        return values
    spread = np.zeros((threads.size, *values.shape[1:]), values.dtype)
    spread[mask] = values
    return spread


def _put(layout: Layout, operand: str, kind: type) -> Writer:
    """A writer of values of `kind`, which may be narrower than the register: extended by its sign, or zeros."""
    write = layout.writer(operand)
    if operand == "_":
        return write
    register = layout.kinds[layout.register(operand)]
    if np.dtype(register).itemsize == np.dtype(kind).itemsize:
        return write
    return lambda threads, value, mask: write(threads, value.astype(register), mask)


# -- Loads, stores, atomics --------------------------------------------------------------------------------------------


@instruction("ld")
def _load(ins: Instruction, layout: Layout) -> Run:
    allow(ins, *_SPACES, "shared::cta", *_CACHE_HINTS, "v2", "v4", "v8", "relaxed", "volatile", "gpu", "cta")
    kind, space, count = TYPES[ins.parts[-1]], _space(ins), _count(ins)
    writes = [_put(layout, name, kind) for name in elements(ins.operands[0])]
    if len(writes) != count:
        raise ins.unsupported()
    address = layout.address(ins.operands[1])
    if space == "param":
        return _load_parameter(ins, kind, address, writes)

    def run(threads: Threads, mask: Mask) -> None:
        where, warps = _selected(threads, mask, address(threads)), _selected(threads, mask, threads.warps)
        values = _spread(threads, mask, memory_of(threads, space).read(where, kind, count, warps, ins))
        for place, write in enumerate(writes):
            write(threads, np.ascontiguousarray(values[:, place]), mask)

    return run


def _load_parameter(ins: Instruction, kind: type, address, writes: list[Writer]) -> Run:
    if len(writes) != 1:
        raise ins.unsupported()
    (write,) = writes

    def run(threads: Threads, mask: Mask) -> None:
        where = address(threads)
        number, offset = where >> PARAMETER_SPACE, where & ((1 << PARAMETER_SPACE) - 1)
        values = threads.block.parameters
        if (number != number[0]).any() or offset.any() or not 1 <= number[0] <= len(values):
            raise EmulationError(f"{ins}: the address is of no parameter")
        bits = int(values[number[0] - 1]) & ((1 << 8 * np.dtype(kind).itemsize) - 1)
        write(threads, np.full(threads.size, bits, bits_of(kind)).view(kind), mask)

    return run


@instruction("st")
def _store(ins: Instruction, layout: Layout) -> Run:
    allow(ins, "global", "shared", "shared::cta", *_CACHE_HINTS, "v2", "v4", "v8", "relaxed", "volatile", "gpu", "cta")
    space, count = _space(ins), _count(ins)
    address = layout.address(ins.operands[0])
    reads = layout.readers(ins.operands[1], bits_of(TYPES[ins.parts[-1]]))
    if len(reads) != count:
        raise ins.unsupported()

    def run(threads: Threads, mask: Mask) -> None:
        where, warps = _selected(threads, mask, address(threads)), _selected(threads, mask, threads.warps)
        values = np.stack([_selected(threads, mask, read(threads)) for read in reads], 1)
        memory_of(threads, space).write(where, values, warps, ins)

    return run


_ATOMIC = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
}  # fmt: skip


@instruction("atom", "red")
def _atomic(ins: Instruction, layout: Layout) -> Run:
    """One thread after the other, in the order of their numbers; atom returns what was there before."""
    allow(ins, "global", "shared", "shared::cta", "gpu", "cta", "relaxed", "acq_rel", "v2", "v4", *_ATOMIC)
    kind, space, count = TYPES[ins.parts[-1]], _space(ins), _count(ins)
    (operation,) = [_ATOMIC[part] for part in ins.parts[1:] if part in _ATOMIC]
    operands = list(ins.operands)
    writes = layout.writers(operands.pop(0)) if ins.parts[0] == "atom" else []
    if len(operands) != 2:
        raise ins.unsupported()
    address, reads = layout.address(operands[0]), layout.readers(operands[1], kind)
    size = count * np.dtype(kind).itemsize

    def run(threads: Threads, mask: Mask) -> None:
        memory = memory_of(threads, space)
        where, warps = _selected(threads, mask, address(threads)), _selected(threads, mask, threads.warps)
        memory.check(where, size, ins)
        memory.note_atomic(memory.cells_of(where, size), warps, ins)
        operand = np.stack([_selected(threads, mask, read(threads)) for read in reads], 1)
        cells, before = memory.data.view(kind), np.empty_like(operand)
        for thread, place in enumerate(where // np.dtype(kind).itemsize):
            before[thread] = cells[place : place + count]
            cells[place : place + count] = operation(before[thread], operand[thread])
        for place, write in enumerate(writes):
            write(threads, np.ascontiguousarray(_spread(threads, mask, before)[:, place]), mask)

    return run


# -- Copies from global to shared memory -------------------------------------------------------------------------------


@instruction("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def _copy(ins: Instruction, layout: Layout) -> Run:
    """What follows the source's bytes up to the size is zeros. Nothing arrives before the thread waits for it."""
    if set(ins.parts[5:]) - {"L2::64B", "L2::128B", "L2::256B"}:
        raise ins.unsupported()
    size = layout.immediate(ins.operands[2])
    to_address, from_address = layout.address(ins.operands[0]), layout.address(ins.operands[1])
    filled = layout.reader(ins.operands[3] if len(ins.operands) > 3 else str(size), np.uint32)

    def run(threads: Threads, mask: Mask) -> None:
        where, source, length, warps = (
            _selected(threads, mask, x)
            for x in (to_address(threads), from_address(threads), filled(threads), threads.warps)
        )
        if ((length != 0) & (length != size)).any():
            raise ins.unsupported("copies a part of its bytes, which is not emulated")
        full = length == size
        values = np.zeros((len(where), size), np.uint8)
        whole = np.uint32 if size == 4 else np.uint64
        read = threads.block.global_memory.read(source[full], whole, size // np.dtype(whole).itemsize, warps[full], ins)
        values[full] = np.ascontiguousarray(read).view(np.uint8)
        threads.block.shared.begin_copy(where, size, warps, ins)
        threads.copies[-1].append((where, values, warps, ins))

    return run


@instruction("cp.async.commit_group")
def _commit_copies(ins: Instruction, layout: Layout) -> Run:
    return lambda threads, mask: threads.copies.append([])


@instruction("cp.async.wait_group")
def _wait_for_copies(ins: Instruction, layout: Layout) -> Run:
    """For all committed groups but the last n."""
    pending = layout.immediate(ins.operands[0])
    return lambda threads, mask: _finish_copies(threads, len(threads.copies) - 1 - pending)


@instruction("cp.async.wait_all")
def _wait_for_all_copies(ins: Instruction, layout: Layout) -> Run:
    def run(threads: Threads, mask: Mask) -> None:
        threads.copies.append([])
        _finish_copies(threads, len(threads.copies) - 1)

    return run


def _finish_copies(threads: Threads, groups: int) -> None:
    for _ in range(groups):
        for where, values, warps, ins in threads.copies.pop(0):
            threads.block.shared.end_copy(where, values, warps, ins)


# -- Shuffles, barriers, fences ----------------------------------------------------------------------------------------


@instruction("shfl.sync")
def _shuffle(ins: Instruction, layout: Layout) -> Run:
    """Each lane reads a value of another, in its segment and up to a bound, and learns whether there is such a lane."""
    way = ins.parts[2]
    if ins.parts[3:] != ("b32",) or way not in ("up", "down", "bfly", "idx"):
        raise ins.unsupported()
    target, *predicate = ins.operands[0].split("|")
    write = layout.writer(target.strip())
    write_predicate = layout.writer(predicate[0].strip()) if predicate else None
    value, by, bounds, members = (layout.reader(operand, np.uint32) for operand in ins.operands[1:])

    def run(threads: Threads, mask: Mask) -> None:
        lane, step = threads.lanes, by(threads).astype(np.int64) & 31
        bound, segment = bounds(threads).astype(np.int64) & 31, (bounds(threads).astype(np.int64) >> 8) & 31
        last = (lane & segment) | (bound & ~segment)
        source = {
            "up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": (lane & segment) | (step & ~segment),
        }[way]  # fmt: skip
        inside = source >= last if way == "up" else source <= last
        source = threads.every - lane + np.where(inside, source, lane)
        present = ((members(threads) >> lane.astype(np.uint32)) & np.uint32(1)).astype(bool)
        active = present if mask is None else present & mask
        missing = ~active[source] | ~present
        if (missing if mask is None else missing & mask).any():
            raise EmulationError(f"{ins}: a lane reads one that does not take part")
        write(threads, value(threads)[source], mask)
        if write_predicate is not None:
            write_predicate(threads, inside, mask)

    return run


@instruction("trap")
def _trap(ins: Instruction, layout: Layout) -> Run:
    """The compiler puts one in place of a kernel that asks for more tensor memory than there is."""

    def run(threads: Threads, mask: Mask) -> None:
        raise EmulationError("the kernel ends in a trap")

    return run


@instruction("bar.warp.sync")
def _warp_barrier(ins: Instruction, layout: Layout) -> Run:
    """Lanes of a warp run in lockstep here, and the report looks at whole warps."""
    return lambda threads, mask: None


@instruction("fence.acq_rel", "fence.sc", "membar")
def _memory_fence(ins: Instruction, layout: Layout) -> Run:
    """It orders what others may see, but waits for nobody."""
    return lambda threads, mask: None


@instruction("fence.proxy.async")
def _proxy_fence(ins: Instruction, layout: Layout) -> Run:
    if ins.opcode not in ("fence.proxy.async", "fence.proxy.async.shared::cta"):
        raise ins.unsupported()

    def run(threads: Threads, mask: Mask) -> None:
        fenced = threads.warp_numbers if mask is None else np.unique(threads.warps[mask])
        threads.block.shared.fence(fenced)

    return run


def whole_warps(threads: Threads, mask: Mask, ins: Instruction) -> np.ndarray:
    """Whether each warp runs the instruction.

    Raises:
        EmulationError: if some of its lanes do and others do not.
    """
    if mask is None:
        return np.ones(threads.size // WARP, bool)
    lanes = mask.reshape(-1, WARP)
    if (lanes.any(1) != lanes.all(1)).any():
        raise EmulationError(f"{ins}: all lanes of a warp must run it together")
    return lanes[:, 0]
