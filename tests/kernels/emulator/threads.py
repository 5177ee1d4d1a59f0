"""Registers of some warps of a block, as vectors over their threads, and how operands are read and written.

Each operand, immediates and special registers included, has a slot in a list of vectors. Registers hold bits, so their
vectors are unsigned integers (a predicate is a bool), and an operand is a view of them as the instruction's type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from .errors import EmulationError, Unsupported
from .ptx import Program, address_parts, elements

WARP = 32
Vector = np.ndarray
Mask = np.ndarray | None  # threads that an instruction runs for; None: all

TYPES: dict[str, type] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(dtype: type) -> type:
    """The unsigned type of the same width."""
    return np.bool_ if dtype is np.bool_ else _BITS[np.dtype(dtype).itemsize]


class Threads:
    """The registers of the warps `first` to `first + count - 1` of a block.

    lanes, warps   of each thread.
    values         by slot; None: no thread has written it yet.
    accumulators   by slot: results of matrix products in flight (see wgmma.py), which no instruction may read.
    """

    def __init__(self, first: int, count: int, layout: Layout, special: dict[str, int]) -> None:
        self.size = count * WARP
        numbers = np.arange(first * WARP, first * WARP + self.size)
        self.lanes, self.warps = numbers % WARP, numbers // WARP
        self.warp_numbers = np.arange(first, first + count)
        self.every = np.arange(self.size)
        self.values: list[Vector | None] = [None] * len(layout.names)
        self.layout = layout
        self.accumulators: dict[int, Vector] = {}
        self.products: list[list[Callable[[], None]]] = [[]]
        self.copies: list[list[tuple]] = [[]]
        for slot, (kind, value) in layout.constants.items():
            self.values[slot] = np.full(self.size, value, kind)
        special = special | {"%tid.x": numbers, "%laneid": self.lanes}
        for slot, name in layout.special.items():
            self.values[slot] = np.full(self.size, special[name], np.uint32)

    def read(self, slot: int) -> Vector:
        """The bits in a slot.

        Raises:
            EmulationError: where nothing was written, or a product that is in flight will be.
        """
        value = self.values[slot]
        if value is None:
            name = self.layout.names[slot]
            if slot in self.accumulators:
                raise EmulationError(f"{name} is read before the wgmma.wait_group of the product that writes it")
            raise EmulationError(f"{name} is read, but no thread has written it")
        return value

    def write(self, slot: int, value: Vector, mask: Mask) -> None:
        """Put bits where `mask` is true.

        A register that some threads write first is undefined in the others, which PTX allows: a masked load without a
        value for the rest leaves it so, and the rest computes on, to results that nobody stores. As in memory, what is
        undefined is all ones, a NaN of every float type.
        """
        if slot in self.accumulators:
            raise EmulationError(f"{self.layout.names[slot]} is written while a product in flight writes it")
        if mask is None:
            self.values[slot] = value
            return
        before = self.values[slot]
        self.values[slot] = np.where(mask, value, undefined(value.dtype) if before is None else before)

    def leave(self, slots: Sequence[int]) -> None:
        """What an instruction that no thread runs does to its results: undefined, if nothing was there."""
        for slot in slots:
            if self.values[slot] is None and slot not in self.accumulators:
                kind = self.layout.kinds[slot]
                self.values[slot] = np.full(self.size, undefined(kind), kind)


def undefined(kind: np.dtype | type) -> np.generic:
    """All bits one."""
    kind = np.dtype(kind)
    return kind.type(True) if kind == np.bool_ else kind.type(np.iinfo(kind).max)


Reader = Callable[[Threads], Vector]
Writer = Callable[[Threads, Vector, Mask], None]

_SPECIAL = re.compile(r"%(?:tid\.[xyz]|ntid\.[xyz]|ctaid\.[xyz]|nctaid\.[xyz]|laneid)")
PARAMETER_SPACE = 16  # the address of a parameter: (index + 1) << 16, which fits into 32 bits


class Layout:
    """The slots of a program's operands."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: list[str] = []
        self.kinds: list[type] = []
        self.constants: dict[int, tuple[type, int]] = {}
        self.special: dict[int, str] = {}
        self.written: list[int] = []  # slots that the instruction being compiled writes
        self._slots: dict[tuple[str, type], int] = {}

    def _slot(self, name: str, kind: type) -> int:
        key = (name, kind)
        if key not in self._slots:
            self._slots[key] = len(self.names)
            self.names.append(name)
            self.kinds.append(kind)
        return self._slots[key]

    def register(self, name: str) -> int:
        """The slot of a declared register."""
        declared = self.program.register_type(name)
        if declared is None:
            raise Unsupported(f"{name!r} is not emulated where a register is expected")
        return self._slot(name, bits_of(TYPES[declared]))

    def reader(self, operand: str, dtype: type) -> Reader:
        """A function that returns an operand as a vector of `dtype`; a wider register's low bits are taken."""
        kind = bits_of(dtype)
        if self.program.register_type(operand) is not None:
            slot = self.register(operand)
            stored = self.kinds[slot]
        else:
            slot, stored = self._constant(operand, dtype), kind
        if (stored is np.bool_) != (kind is np.bool_) or np.dtype(stored).itemsize < np.dtype(kind).itemsize:
            raise Unsupported(f"{operand} has {np.dtype(stored)} where {np.dtype(dtype)} is expected")
        if stored is not kind:
            return lambda threads: threads.read(slot).astype(kind).view(dtype)
        if dtype is kind:
            return lambda threads: threads.read(slot)
        return lambda threads: threads.read(slot).view(dtype)

    def lenient_reader(self, operand: str, dtype: type) -> Reader:
        """A reader to which a register that nobody has written is undefined, all ones, instead of an error."""
        read = self.reader(operand, dtype)
        if self.program.register_type(operand) is None:
            return read
        slot = self.register(operand)

        def read_or_undefined(threads: Threads) -> Vector:
            if threads.values[slot] is None and slot not in threads.accumulators:
                return np.full(threads.size, undefined(bits_of(dtype))).view(dtype)
            return read(threads)

        return read_or_undefined

    def _constant(self, operand: str, dtype: type) -> int:
        if _SPECIAL.fullmatch(operand):
            slot = self._slot(operand, np.uint32)
            self.special[slot] = operand
            return slot
        slot = self._slot(operand, bits_of(dtype))
        self.constants[slot] = bits_of(dtype), self.immediate(operand, dtype)
        return slot

    def immediate(self, operand: str, dtype: type = np.int64) -> int:
        """The bits of a literal, of the address of shared memory (0) or of a parameter."""
        if operand == "global_smem":
            return 0
        if parameter := re.fullmatch(rf"{re.escape(self.program.name)}_param_(\d+)", operand):
            return (int(parameter.group(1)) + 1) << PARAMETER_SPACE
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return int(operand[2:], 16)
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            raise Unsupported(f"the operand {operand!r} is not emulated")
        value = int(operand.removesuffix("U"), 0)
        return int(bool(value)) if dtype is np.bool_ else value & ((1 << 8 * np.dtype(dtype).itemsize) - 1)

    def writer(self, operand: str) -> Writer:
        """A function that writes a vector of the register's width; "_" takes anything."""
        if operand == "_":
            return lambda threads, value, mask: None
        slot = self.register(operand)
        kind = self.kinds[slot]
        width = np.dtype(kind).itemsize
        self.written.append(slot)

        def write(threads: Threads, value: Vector, mask: Mask) -> None:
            if value.dtype.itemsize != width:
                raise Unsupported(f"{operand} has {8 * width} bits, the result {8 * value.dtype.itemsize}")
            threads.write(slot, value.view(kind), mask)

        return write

    def readers(self, operand: str, dtype: type) -> list[Reader]:
        return [self.reader(name, dtype) for name in elements(operand)]

    def writers(self, operand: str) -> list[Writer]:
        return [self.writer(name) for name in elements(operand)]

    def address(self, operand: str) -> Reader:
        """A function that returns an operand in brackets as byte addresses, int64."""
        base, offset = address_parts(operand)
        declared = self.program.register_type(base)
        read = self.reader(base, np.uint32 if declared is not None and TYPES[declared] is np.uint32 else np.uint64)
        return lambda threads: read(threads).astype(np.int64) + offset
