"""Global and shared memory of an emulated kernel, and the report of accesses that nothing orders.

Memory is followed in cells: as many bytes as the narrowest access of the kernel to that memory has. Accesses are
aligned to their width, so a cell is touched as a whole or not at all, and the report is what one by bytes would be.

Of each cell the warps are known that read it, wrote it, and changed it atomically since the last barrier. Accesses of
two warps, one of which writes, are a race, unless both write the same bytes, which is counted apart: whatever their
order, the result is the same. What a warp does within itself is in the order of its instructions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .errors import EmulationError
from .ptx import Instruction
from .threads import bits_of

_NOBODY, _SEVERAL = -1, -2


@dataclass
class RaceReport:
    """Cells with unordered accesses, by (kernel, memory, what, instruction at which it was seen).

    races       accesses of two warps, or blocks.
    same_bytes  writes of two warps, or blocks, that leave the same bytes in any order.
    ties        different bytes from lanes of one warp in one instruction: one of them stays, PTX does not say which. In
                a sum over lanes the compiler may fuse one lane's product with the sum, and lanes then differ by a
                rounding.
    """

    races: Counter = field(default_factory=Counter)
    same_bytes: Counter = field(default_factory=Counter)
    ties: Counter = field(default_factory=Counter)
    kernel: str = ""

    def add(self, memory: str, what: str, ins: Instruction, cells: np.ndarray, kind: str = "races") -> None:
        """Count the true entries of `cells`."""
        if number := int(np.count_nonzero(cells)):
            getattr(self, kind)[self.kernel, memory, what, f"{ins.index}: {ins}"] += number


class Memory:
    """Bytes, read and written by vectors of threads; addresses count from 0.

    Args:
        name: for messages.
        data: uint8, of a multiple of 16 bytes.
        cell: bytes of a cell.
        warps: of a block.
    """

    def __init__(self, name: str, data: np.ndarray, cell: int, warps: int, report: RaceReport) -> None:
        self.name, self.data, self.cell, self.report = name, data, cell, report
        self.cells = data.view(bits_of(np.dtype(f"u{cell}").type))
        words = -(-warps // 8)
        # A byte a warp: they are set one by one, without a loop over warps, and looked at eight at a time.
        self._flags = {kind: np.zeros((len(self.cells), 8 * words), np.uint8) for kind in ("read", "write", "atomic")}
        own = np.zeros((warps, 8 * words), np.uint8)
        own[np.arange(warps), np.arange(warps)] = 255
        self._others = ~own.view(np.uint64)
        self._touched: list[tuple[str, np.ndarray]] = []
        self._has_atomics = False

    # -- Accesses ------------------------------------------------------------------------------------------------------

    def read(self, address: np.ndarray, kind: type, count: int, warps: np.ndarray, ins: Instruction) -> np.ndarray:
        """Of each thread [n]: `count` values of `kind`, [n, count]."""
        size = np.dtype(kind).itemsize
        self.check(address, size * count, ins)
        self.note_read(self.cells_of(address, size * count), warps, ins)
        return self.data.view(kind)[(address // size)[:, None] + np.arange(count)]

    def write(self, address: np.ndarray, values: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        """Of each thread [n]: values [n, count]."""
        size = values.itemsize * values.shape[1]
        self.check(address, size, ins)
        self.note_write(self.cells_of(address, size), np.ascontiguousarray(values).view(self.cells.dtype), warps, ins)

    def check(self, address: np.ndarray, size: int, ins: Instruction) -> None:
        """Raises:
        EmulationError: where an access is out of bounds or not aligned to its size.
        """
        if not len(address):
            return
        if (address % size).any():
            raise EmulationError(
                f"{ins}: a {self.name} address is no multiple of {size}: {address[address % size > 0][0]}"
            )
        if address.min() < 0 or address.max() + size > len(self.data):
            outside = address[(address < 0) | (address + size > len(self.data))][0]
            raise EmulationError(f"{ins}: out of bounds of {self.name} memory: byte {outside} of {len(self.data)}")

    def cells_of(self, address: np.ndarray, size: int) -> np.ndarray:
        """Numbers [n, size // cell] of the cells of accesses of `size` bytes."""
        return (address // self.cell)[:, None] + np.arange(size // self.cell)

    # -- Races ---------------------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """What comes is ordered after what was."""
        for kind, cells in self._touched:
            self._flags[kind][cells] = 0
        self._touched.clear()

    def note_read(self, cells: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        cells, owners = self._flat(cells, warps)
        self._report_touched("write", "read of what another warp writes", cells, owners, ins)
        self._report_touched("atomic", "read of what another warp changes atomically", cells, owners, ins)
        self._touch("read", cells, owners)

    def note_write(self, cells: np.ndarray, values: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        """Write values [n, cells of an access] and look for races."""
        cells, owners = self._flat(cells, warps)
        values = values.reshape(-1)
        self._report_touched("read", "write of what another warp reads", cells, owners, ins)
        self._report_touched("atomic", "write of what another warp changes atomically", cells, owners, ins)
        earlier = self._touched_by_others("write", cells, owners)
        differs = earlier & (self.cells[cells] != values)
        self.cells[cells] = values
        lost = self.cells[cells] != values  # another thread wrote last, in this instruction
        self._touch("write", cells, owners)
        several = self._touched_by_others("write", cells, owners)
        self.report.add(self.name, "two warps write different bytes", ins, differs | (lost & several))
        self.report.add(self.name, "lanes write different bytes", ins, lost & ~several, "ties")
        same = several & ~differs
        if lost.any():
            same &= ~np.isin(cells, cells[lost])
        self.report.add(self.name, "several warps write the same bytes", ins, same, "same_bytes")

    def note_atomic(self, cells: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        cells, owners = self._flat(cells, warps)
        self._report_touched("read", "atomic change of what another warp reads", cells, owners, ins)
        self._report_touched("write", "atomic change of what another warp writes", cells, owners, ins)
        self._touch("atomic", cells, owners)
        self._has_atomics = True

    @staticmethod
    def _flat(cells: np.ndarray, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return cells.reshape(-1), np.repeat(warps, cells.shape[1])

    def _touched_by_others(self, kind: str, cells: np.ndarray, owners: np.ndarray) -> np.ndarray:
        flags = self._flags[kind].view(np.uint64)
        return (flags[cells] & self._others[owners]).any(1)

    def _report_touched(self, kind: str, what: str, cells: np.ndarray, owners: np.ndarray, ins: Instruction) -> None:
        if kind == "atomic" and not self._has_atomics:
            return
        self.report.add(self.name, what, ins, self._touched_by_others(kind, cells, owners))

    def _touch(self, kind: str, cells: np.ndarray, owners: np.ndarray) -> None:
        self._flags[kind][cells, owners] = 1
        self._touched.append((kind, cells))


class SharedMemory(Memory):
    """Of one block, all ones (NaN of every float type) at its start.

    Two kinds of accesses go on after their instruction: a copy (cp.async) arrives until the thread waits for it, and a
    product (wgmma) reads until the warps wait for it. Meanwhile nobody may read, or write, what arrives, nor write what
    is being read. A product reads past the caches of ordinary accesses (the async proxy): what a thread has stored must
    be fenced by that thread before.
    """

    def __init__(self, size: int, cell: int, warps: int, report: RaceReport, fences: bool) -> None:
        super().__init__("shared", np.full(-(-max(size, 16) // 16) * 16, 255, np.uint8), cell, warps, report)
        self._arriving = np.zeros(len(self.cells), np.int16)
        self._being_read = np.zeros(len(self.cells), np.int16)
        self._copies = self._products = 0
        self._unfenced = np.full(len(self.cells), _NOBODY, np.int16) if fences else None

    def note_read(self, cells, warps, ins):
        if self._copies:
            self.report.add(self.name, "read of what a copy still brings", ins, self._arriving[cells])
        super().note_read(cells, warps, ins)

    def note_write(self, cells, values, warps, ins):
        if self._copies:
            self.report.add(self.name, "write where a copy still arrives", ins, self._arriving[cells])
        if self._products:
            self.report.add(self.name, "write of what a product still reads", ins, self._being_read[cells])
        super().note_write(cells, values, warps, ins)
        if self._unfenced is not None:
            self._unfenced[cells] = warps[:, None]

    def begin_copy(self, address: np.ndarray, size: int, warps: np.ndarray, ins: Instruction) -> None:
        """From here on the copy may write: to what others read or write since the last barrier, it is a race."""
        self.check(address, size, ins)
        cells, owners = self._flat(self.cells_of(address, size), warps)
        self._report_touched("read", "copy to what another warp reads", cells, owners, ins)
        self._report_touched("write", "copy to what another warp writes", cells, owners, ins)
        self._touch("write", cells, owners)
        np.add.at(self._arriving, cells, 1)
        self._copies += 1

    def end_copy(self, address: np.ndarray, values: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        """The bytes [n, size] are there."""
        np.add.at(self._arriving, self.cells_of(address, values.shape[1]), -1)
        self._copies -= 1
        self.write(address, values, warps, ins)

    def begin_product(self, address: np.ndarray, size: int, warps: np.ndarray, ins: Instruction) -> np.ndarray:
        """The product of these warps starts to read `size` bytes at each address; returns their cells [n]."""
        self.check(address, size, ins)
        cells = self.cells_of(address, size).reshape(-1)
        if self._unfenced is not None:
            unfenced = self._unfenced[cells] != _NOBODY
            self.report.add(self.name, "product reads what no fence.proxy.async follows", ins, unfenced)
        self._being_read[cells] += 1
        self._products += 1
        self._note_product(cells, warps, ins)
        return cells

    def end_product(self, cells: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        """It has read them, at the latest now."""
        self._being_read[cells] -= 1
        self._products -= 1
        self._note_product(cells, warps, ins)

    def _note_product(self, cells: np.ndarray, warps: np.ndarray, ins: Instruction) -> None:
        """All four warps read all."""
        for warp in warps:
            self.note_read(cells[:, None], np.full(len(cells), warp), ins)

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by these warps."""
        if self._unfenced is not None:
            self._unfenced[np.isin(self._unfenced, warps)] = _NOBODY


class GlobalMemory(Memory):
    """Of one launch: tensors with illegal bytes between them. Blocks of a launch are not ordered at all."""

    GAP = 512

    def __init__(self, tensors: dict[str, np.ndarray], cell: int, warps: int, report: RaceReport) -> None:
        """tensors: name → bytes, copied."""
        self.places: dict[str, int] = {}
        end = self.GAP
        for name, content in tensors.items():
            self.places[name] = end
            end += -(-content.size // self.GAP) * self.GAP + self.GAP
        data, self._legal = np.full(end, 255, np.uint8), np.zeros(end, bool)
        super().__init__("global", data, cell, warps, report)
        self._sizes = {name: content.size for name, content in tensors.items()}
        for name, content in tensors.items():
            data[self.places[name] : self.places[name] + content.size] = content
            self._legal[self.places[name] : self.places[name] + content.size] = True
        self._blocks = {kind: np.full(len(self.cells), _NOBODY, np.int32) for kind in self._flags}
        self._block = 0

    def content(self, name: str) -> np.ndarray:
        """The bytes of a tensor, now."""
        return self.data[self.places[name] : self.places[name] + self._sizes[name]]

    def begin_block(self, number: int) -> None:
        self.barrier()
        self._block = number

    def check(self, address, size, ins):
        super().check(address, size, ins)
        legal = self._legal[address] & self._legal[address + size - 1]
        if not legal.all():
            outside = int(address[~legal][0])
            raise EmulationError(f"{ins}: out of bounds of global memory: {self._where(outside)}, {size} bytes")

    def _where(self, address: int) -> str:
        """Which tensor an illegal address is nearest to."""
        name = min(
            self.places, key=lambda n: max(self.places[n] - address, address - self.places[n] - self._sizes[n] + 1)
        )
        return f"byte {address - self.places[name]} of {name}, which has {self._sizes[name]}"

    def note_read(self, cells, warps, ins):
        super().note_read(cells, warps, ins)
        self._note_block("read", ("write", "atomic"), cells.reshape(-1), ins)

    def note_write(self, cells, values, warps, ins):
        flat = cells.reshape(-1)
        differs = self.cells[flat] != values.reshape(-1)
        super().note_write(cells, values, warps, ins)
        self._note_block("write", ("read", "atomic"), flat, ins)
        others = self._of_other_blocks("write", flat)
        self.report.add(self.name, "two blocks write different bytes", ins, others & differs)
        self.report.add(self.name, "several blocks write the same bytes", ins, others & ~differs, "same_bytes")
        self._stamp("write", flat)

    def note_atomic(self, cells, warps, ins):
        super().note_atomic(cells, warps, ins)
        self._note_block("atomic", ("read", "write"), cells.reshape(-1), ins)

    def _note_block(self, kind: str, against: tuple[str, ...], cells: np.ndarray, ins: Instruction) -> None:
        for other in against:
            seen = self._of_other_blocks(other, cells)
            self.report.add(self.name, f"{kind} by one block, {other} by another", ins, seen)
        if kind != "write":
            self._stamp(kind, cells)

    def _of_other_blocks(self, kind: str, cells: np.ndarray) -> np.ndarray:
        before = self._blocks[kind][cells]
        return (before != _NOBODY) & (before != self._block)

    def _stamp(self, kind: str, cells: np.ndarray) -> None:
        self._blocks[kind][cells] = np.where(self._of_other_blocks(kind, cells), _SEVERAL, self._block)
