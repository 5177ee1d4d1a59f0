"""What one program of a kernel does: bytes that it asks for, products, how often its loops run.

Triton's first representation (TTIR) says what a program loads and stores in whole tiles, free of how threads share it.
Its scalars (sizes, bounds of loops, conditions) are computed here from the arguments of the launch; tensors are not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

_BITS = {"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "i1": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
_OPERATION = re.compile(r'(?:%([\w$.-]+)(?::(\d+))? = )?"?([a-z_]+\.[a-z_0-9.]+)"?(?:\s+|(?=\()|$)(.*)')
_VALUE = re.compile(r"%([\w$.-]+(?:#\d+)?)")
_SHAPE = re.compile(r"((?:\d+x)+)")
_ELEMENT = re.compile(r"\b(bf16|f16|f32|f64|i1|i8|i16|i32|i64)\b")


@dataclass(frozen=True)
class Pointer:
    """An address: the tensor's entries from its first one on, where they are known, and how many are before it."""

    values: Sequence[int] | None
    offset: int | None = 0


@dataclass
class Work:
    """Of one program: bytes read and written, operations of its products, and runs of the body of its hot loop.

    Masks are not looked at: a tile counts whole. Hot is the loop with most products, without any the one with most
    bytes, each counted for the innermost loop around it; trips is 0 where nothing loops.
    """

    read: int = 0
    written: int = 0
    operations: int = 0
    trips: int = 0


@dataclass
class _Op:
    name: str
    results: list[str]
    text: str
    regions: list[list[_Op]] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)


@dataclass
class _LoopCount:
    runs: int = 0
    operations: int = 0
    moved: int = 0


class Program:
    """A kernel's TTIR, parsed once and evaluated for the arguments of each launch."""

    def __init__(self, ttir: str):
        self.parameters: list[str] = []
        self.blocks: dict[str, tuple[list[str], list[_Op]]] = {"": ([], [])}
        self._parse(ttir)

    def run(self, arguments: Mapping[str, Any], grid: tuple[int, int, int]) -> Work:
        """The first program of a launch.

        Args:
            arguments: by the names of the kernel's parameters: ints, or `Pointer` for tensors; others are unknown.

        Raises:
            ValueError: how often a loop runs cannot be told from the arguments, or the kernel has an operation whose
                meaning for that is not known.
        """
        return _Evaluation(self, arguments, grid).run()

    def _parse(self, ttir: str) -> None:
        regions: list[list[_Op]] = []  # those that are open; the first is the current block
        skipping = 0  # within the function of a reduction or scan
        for line in ttir.splitlines():
            line = re.sub(r"\s*loc\(#?\w*\)$", "", line.strip())
            if line.startswith("tt.func"):
                self.parameters = re.findall(r"%([\w$.-]+): ", line)
                regions = [self.blocks[""][1]]
            elif not regions or not line or line.startswith("#"):
                continue
            elif line.endswith("({"):
                skipping += 1
            elif line.startswith("})"):
                skipping -= 1
            elif skipping:
                continue
            elif line.startswith("^"):
                label, _, rest = line.partition(":")
                name = re.match(r"\^\w+", label).group()
                self.blocks[name] = (re.findall(r"%([\w$.-]+): ", line.split("//")[0]), [])
                regions = [self.blocks[name][1]]
            elif line.startswith("} else {"):
                regions.pop()
                regions.append([])
                regions[-2][-1].regions.append(regions[-1])
            elif line.startswith("}"):
                regions.pop()
            else:
                op = _parse_op(line)
                if _matters(op, line):
                    regions[-1].append(op)
                if line.endswith("{"):
                    op.regions.append([])
                    regions.append(op.regions[0])


def _parse_op(line: str) -> _Op:
    found = _OPERATION.match(line)
    if found is None:
        raise ValueError(f"this line of a kernel's TTIR cannot be read: {line[:200]}")
    result, count, name, text = found.groups()
    results = [] if result is None else [f"{result}#{i}" for i in range(int(count))] if count else [result]
    return _Op(name, results, text, operands=_VALUE.findall(text))


_ALWAYS = ("scf.", "cf.", "tt.load", "tt.store", "tt.dot", "tt.atomic", "tt.descriptor_", "tt.return", "tt.call")


def _matters(op: _Op, line: str) -> bool:
    """Whether it moves data, multiplies, steers, or makes a scalar."""
    if op.name.startswith(_ALWAYS) or line.endswith("{"):
        return True
    return "tensor<" not in line


def _divide(a: int, b: int) -> int:
    """Towards zero, as machines do."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_BINARY: dict[str, Callable[[int, int], int]] = {
    "arith.addi": operator.add, "arith.subi": operator.sub, "arith.muli": operator.mul,
    "arith.divsi": _divide, "arith.divui": operator.floordiv, "arith.remui": operator.mod,
    "arith.remsi": lambda a, b: a - b * _divide(a, b), "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.minsi": min, "arith.maxsi": max, "arith.minui": min, "arith.maxui": max,
    "arith.andi": operator.and_, "arith.ori": operator.or_, "arith.xori": operator.xor,
    "arith.shli": operator.lshift, "arith.shrsi": operator.rshift, "arith.shrui": operator.rshift,
}  # fmt: skip
_SAME = frozenset({"arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast", "arith.index_castui"})
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt,
    "sge": operator.ge, "ult": operator.lt, "ule": operator.le, "ugt": operator.gt, "uge": operator.ge,
}  # fmt: skip


class _Evaluation:
    """One program; a value that is not known is None."""

    def __init__(self, program: Program, arguments: Mapping[str, Any], grid: tuple[int, int, int]):
        self.program, self.grid, self.work = program, grid, Work()
        self.values: dict[str, Any] = {name: arguments.get(name) for name in program.parameters}
        self.loops: dict[int, _LoopCount] = {}
        self.around: list[_LoopCount] = []

    def run(self) -> Work:
        block: str | None = ""
        while block is not None:
            block = self._run(self.program.blocks[block][1])
        hot = max(self.loops.values(), key=lambda loop: (loop.operations, loop.moved), default=_LoopCount())
        self.work.trips = hot.runs
        return self.work

    def _run(self, ops: list[_Op]) -> str | None:
        """Evaluate a block; returns the label of the next one, None at the end."""
        for op in ops:
            if op.name.startswith("cf."):
                return self._branch(op)
            if op.name == "tt.return":
                return None
            self._evaluate(op)
        return None

    def _evaluate(self, op: _Op) -> None:
        name = op.name
        if name == "scf.for":
            self._loop(op)
        elif name == "scf.if":
            self._choose(op)
        elif name in ("tt.load", "tt.descriptor_load"):
            self._move(_bytes(op), 0)
            if op.results:
                self.values[op.results[0]] = self._load(op)
        elif name in ("tt.store", "tt.descriptor_store"):
            self._move(0, _bytes(op))
        elif name.startswith("tt.atomic"):
            self._move(_bytes(op), _bytes(op))
        elif name.startswith("tt.dot"):
            self._multiply(op)
        elif op.regions or name in ("tt.call", "scf.while"):
            raise ValueError(f"how often a kernel runs its {name} cannot be told from its arguments")
        elif op.results:
            self.values[op.results[0]] = self._scalar(op)

    def _scalar(self, op: _Op) -> Any:
        name, values = op.name, [self.values.get(x) for x in op.operands]
        if name == "arith.constant":
            word = op.text.split(" ")[0]
            return {"true": 1, "false": 0}.get(word, int(word) if re.fullmatch(r"-?\d+", word) else None)
        if name == "tt.get_program_id":
            return 0
        if name == "tt.get_num_programs":
            return self.grid["xyz".index(op.text[0])]
        if not values or values[0] is None:
            return None
        if name in _SAME:
            return values[0]
        if name == "arith.select":
            return values[1 if values[0] else 2]
        if len(values) < 2 or values[1] is None:
            return None
        if name == "tt.addptr":
            pointer, offset = values
            return None if pointer.offset is None else Pointer(pointer.values, pointer.offset + offset)
        if name == "arith.cmpi":
            return int(_COMPARE[op.text.split(",")[0]](*values))
        return _BINARY[name](*values) if name in _BINARY else None

    def _load(self, op: _Op) -> int | None:
        """A scalar that is loaded from a tensor whose entries are known."""
        pointer = self.values.get(op.operands[0])
        if "tensor<" in op.text or not isinstance(pointer, Pointer) or pointer.values is None:
            return None
        return pointer.values[pointer.offset] if 0 <= pointer.offset < len(pointer.values) else None

    def _loop(self, op: _Op) -> None:
        index, *operands = op.operands
        begin, end, step = (self.values.get(x) for x in operands[:3])
        if None in (begin, end, step):
            raise ValueError(f"how often a loop of the kernel runs cannot be told from its arguments: {op.text[:100]}")
        carried = re.findall(r"%([\w$.-]+) = %([\w$.-]+(?:#\d+)?)", op.text.partition("iter_args")[2])
        state = [self.values.get(initial) for _, initial in carried]
        count = self.loops.setdefault(id(op), _LoopCount())
        self.around.append(count)
        for i in range(begin, end, step):
            count.runs += 1
            self.values[index] = i
            self.values |= zip((name for name, _ in carried), state, strict=True)
            state = self._yielded(op.regions[0])
        self.around.pop()
        self.values |= zip(op.results, state, strict=True)

    def _choose(self, op: _Op) -> None:
        """Both branches are known; a condition that is not is taken to hold."""
        condition = self.values.get(op.operands[0])
        branch = 0 if condition is None or condition else 1
        if branch < len(op.regions):
            self.values |= zip(op.results, self._yielded(op.regions[branch]), strict=False)

    def _yielded(self, ops: list[_Op]) -> list[Any]:
        """Evaluate a region; what its last operation yields."""
        for op in ops:
            if op.name == "scf.yield":
                return [self.values.get(x) for x in op.operands]
            self._evaluate(op)
        return []

    def _branch(self, op: _Op) -> str:
        targets = re.findall(r"(\^\w+)(?:\(([^)]*)\))?", op.text)
        if op.name == "cf.cond_br":
            condition = self.values.get(op.operands[0])
            # Early returns of programs that have nothing to do: one that is unknown is taken to go on.
            targets = [targets[0] if condition else targets[1]]
        label, given = targets[0]
        names = self.program.blocks[label][0]
        self.values |= zip(names, [self.values.get(x) for x in _VALUE.findall(given)], strict=True)
        return label

    def _move(self, read: int, written: int) -> None:
        self.work.read += read
        self.work.written += written
        if self.around:
            self.around[-1].moved += read + written

    def _multiply(self, op: _Op) -> None:
        left, right = ([int(n) for n in x.split("x") if n] for x in _SHAPE.findall(op.text.rpartition(" : ")[2])[:2])
        operations = 2 * prod(left) * right[-1]
        self.work.operations += operations
        if self.around:
            self.around[-1].operations += operations


def _bytes(op: _Op) -> int:
    """Of the tile that an operation moves, from its type."""
    kind = op.text.rpartition(" : ")[2]
    kind = kind.rpartition("-> ")[2] if op.name.startswith("tt.descriptor_") else kind
    shape, element = _SHAPE.search(kind), _ELEMENT.search(kind)
    if element is None:
        raise ValueError(f"the type of a load or store cannot be read: {op.text[:200]}")
    entries = prod(int(n) for n in shape.group().split("x") if n) if shape else 1
    return entries * _BITS[element.group()] // 8
