"""Machine code of a compiled kernel, as a list of instructions with the registers that they read and write."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from triton import knobs

# Kinds of instructions that the model tells apart, by how an opcode begins; the first that fits.
KINDS = (
    ("HGMMA", r"HGMMA"), ("HMMA", r"[HI]MMA"), ("LDSM", r"LDSM"), ("STSM", r"STSM"), ("LDS", r"LDS"), ("STS", r"STS"),
    ("COPY", r"LDGSTS"), ("GROUP", r"LDGDEPBAR|DEPBAR"), ("LDG", r"LDG"), ("STG", r"STG"), ("LDL", r"LDL"),
    ("STL", r"STL"), ("ATOM", r"ATOM|RED"), ("SHFL", r"SHFL"), ("MUFU", r"MUFU"), ("BAR", r"BAR"),
    ("CONVERT", r"F2FP"), ("FENCE", r"MEMBAR|FENCE"), ("WARPGROUP", r"WARPGROUP"),
    ("FLOAT", r"FADD|FMUL|FFMA|FSETP|FSEL|FMNMX"), ("PERMUTE", r"PRMT"), ("UNIFORM", r"U"),
    ("BRANCH", r"BRA|BSSY|BSYNC|CALL|RET|EXIT|WARPSYNC"), ("NOP", r"NOP"),
)  # fmt: skip
OTHER = "INTEGER"  # integer arithmetic and moves, and what is rare

STORES = frozenset({"STS", "STG", "STSM", "STL", "ATOM"})
WITHOUT_REGISTERS = frozenset({"BAR", "GROUP", "NOP", "BRANCH", "WARPGROUP", "FENCE"})
RARE_SKIP = 60  # a branch that jumps over more instructions than this is taken to jump: what it skips is seldom run

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_GUARD = re.compile(r"@!?(U?P\w+)\s+(.*)")
_REGISTER = re.compile(r"\b(UR|R)(\d+)(\.64)?")
_PREDICATE = re.compile(r"\b(U?P\d)\b")


@dataclass(frozen=True)
class Instruction:
    """reads, writes: names of registers and predicates; target: the label that a branch jumps to."""

    address: int
    text: str
    opcode: str
    kind: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    guarded: bool = False
    target: str | None = None


@dataclass
class Listing:
    """The instructions of one function, and the index of the instruction behind each label."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[range]:
        """The indices of every loop's instructions, from its first one to the branch back to it."""
        found = []
        for i, instruction in enumerate(self.instructions):
            begin = self.labels.get(instruction.target, i) if instruction.target else i
            if begin < i:
                found.append(range(begin, i + 1))
        return found

    def hot_loop(self) -> range | None:
        """The loop with most instructions of the tensor cores: of nested ones the innermost that has them all.

        Without such instructions the longest loop that holds no other; None where nothing loops.
        """
        loops = self.loops()
        products = {loop: self._products(loop) for loop in loops}
        if any(products.values()):
            return max(loops, key=lambda loop: (products[loop], -len(loop)))
        innermost = [a for a in loops if not any(a != b and a.start <= b.start and b.stop <= a.stop for b in loops)]
        return max(innermost, key=len, default=None)

    def straight(self, indices: Iterable[int]) -> list[Instruction]:
        """What a warp runs of these instructions, without what is seldom run: long skips, and calls of slow paths."""
        indices = list(indices)
        last = indices[-1] if indices else -1
        skipped: set[int] = set()
        for i in indices:
            instruction = self.instructions[i]
            if instruction.opcode.startswith("CALL"):
                skipped |= {i - 1, i}  # with the move of the address to return to
            end = self.labels.get(instruction.target, i) if instruction.target else i
            if instruction.guarded and end - i - 1 > RARE_SKIP and end <= last + 1:
                skipped |= set(range(i + 1, end))
        return [self.instructions[i] for i in indices if i not in skipped]

    def _products(self, indices: range) -> int:
        return sum(self.instructions[i].kind in ("HMMA", "HGMMA") for i in indices)


def disassemble(cubin: bytes) -> str:
    """The listing of a binary, by the nvdisasm that comes with triton. Raises CalledProcessError with what it said."""
    with tempfile.TemporaryDirectory(prefix="sass-") as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parse(listing: str) -> Listing:
    """Read a listing of `disassemble`."""
    result = Listing()
    for line in listing.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            result.labels[label.group(1)] = len(result.instructions)
            continue
        found = _LINE.search(line)
        if found and line.lstrip().startswith("/*"):
            result.instructions.append(parse_instruction(int(found.group(1), 16), found.group(2)))
    return result


def parse_instruction(address: int, text: str) -> Instruction:
    """One instruction, "@P0 FADD R1, R2, R3"."""
    guard = _GUARD.match(text)
    opcode, _, rest = (guard.group(2) if guard else text).partition(" ")
    kind = kind_of(opcode)
    operands = split_operands(rest)
    if kind in WITHOUT_REGISTERS:
        reads, writes = [], []
    elif kind in STORES:
        reads, writes = _registers_of_store(opcode, kind, operands), []
    else:
        reads, writes = _registers(opcode, kind, operands)
    if guard:
        reads.append(guard.group(1))
    target = re.search(r"\.L_x_\d+", rest) if opcode.startswith("BRA") else None
    return Instruction(
        address, text, opcode, kind, tuple(reads), tuple(writes), guard is not None, target.group() if target else None
    )


def kind_of(opcode: str) -> str:
    return next((kind for kind, pattern in KINDS if re.match(pattern, opcode)), OTHER)


def count_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.kind for instruction in instructions)


def split_operands(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def words(opcode: str) -> int:
    """Registers of a thread that a load, a store or a move of the matrix units carries."""
    if opcode.startswith(("LDSM", "STSM")):
        return 4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1
    return 4 if ".128" in opcode else 2 if ".64" in opcode else 1


def wgmma_columns(opcode: str) -> int:
    """N of HGMMA.64xNx16."""
    return int(re.match(r"HGMMA\.\d+x(\d+)x", opcode).group(1))


def _consecutive(operand: str, count: int) -> list[str]:
    """The registers of an operand that names the first of them."""
    found = re.match(r"[-!|~]*\|?(UR|R)(\d+)", operand)
    return [f"{found.group(1)}{int(found.group(2)) + i}" for i in range(count)] if found else []


def _mentioned(operand: str) -> list[str]:
    """Registers and predicates that stand in an operand, as in "desc[UR28][R4.64+0x18]"."""
    names = _PREDICATE.findall(operand)
    for bank, number, pair in _REGISTER.findall(operand):
        names += [f"{bank}{int(number) + i}" for i in range(2 if pair else 1)]
    return names


def _registers_of_store(opcode: str, kind: str, operands: Sequence[str]) -> list[str]:
    if not operands:
        return []
    reads = [name for operand in operands[:-1] for name in _mentioned(operand)]
    return reads + _consecutive(operands[-1], words(opcode))


def _registers(opcode: str, kind: str, operands: list[str]) -> tuple[list[str], list[str]]:
    """What an instruction that is no store reads and writes: its results come first, predicates before registers."""
    results = 0
    while results < len(operands) and re.fullmatch(r"U?P(\d|T)", operands[results]):
        results += 1
    writes = [name for name in operands[:results] if not name.endswith("T")]
    sources = operands[results:]
    width = _result_width(opcode, kind)
    if not opcode.startswith(("ISETP", "FSETP", "PLOP3", "UISETP")):
        writes += _consecutive(sources[0], width) if sources else []
        sources = sources[1:]
    reads: list[str] = []
    for i, operand in enumerate(sources):
        if kind == "HMMA":
            reads += _consecutive(operand, 4 if i in (0, 2) else 2)
        elif kind == "HGMMA":
            reads += _consecutive(operand, width if i == len(sources) - 2 else 4) if operand.startswith("R") else []
        elif "WIDE" in opcode and i == 2:
            reads += _consecutive(operand, 2)
        else:
            reads += _mentioned(operand)
    return reads, writes


def _result_width(opcode: str, kind: str) -> int:
    if kind == "HMMA":
        return 4
    if kind == "HGMMA":
        return wgmma_columns(opcode) // 2
    if "WIDE" in opcode or (opcode.startswith("CS2R") and ".32" not in opcode):
        return 2
    return words(opcode) if kind in ("LDS", "LDG", "LDL", "LDSM") else 1
