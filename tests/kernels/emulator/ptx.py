"""Text of PTX → instructions, labels, parameters and the types of registers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import Unsupported

_SKIPPED = (".loc", ".file", ".section", ".pragma")
_NAME = r"[%$\w]+"


@dataclass(frozen=True)
class Instruction:
    """One statement: `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1 + 8]`.

    opcode     all of the mnemonic, "ld.global.v2.b32"; `parts` is it cut at the points.
    operands   "{%r1, %r2}" and "[%rd1 + 8]": braces, brackets and bars are kept.
    predicate  "%p1", or None; `negated`: it runs where the predicate is false.
    """

    index: int
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    def __str__(self) -> str:
        guard = "" if self.predicate is None else f"@{'!' * self.negated}{self.predicate} "
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()

    def unsupported(self, what: str = "is not emulated") -> Unsupported:
        return Unsupported(f"{self.opcode} {what}: {self}")


@dataclass(frozen=True)
class Program:
    """A kernel.

    threads         of a block.
    parameters      types in order, "u64".
    register_types  prefix of a register's name → type, "%rd" → "b64".
    labels          name → index of the instruction that follows.
    """

    name: str
    target: str
    threads: int
    parameters: tuple[str, ...]
    register_types: dict[str, str]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def register_type(self, name: str) -> str | None:
        """The declared type of a register, None for what is no register."""
        return self.register_types.get(name.rstrip("0123456789"))


def parse(text: str) -> Program:
    """The one kernel in a PTX module.

    Raises:
        Unsupported: on more than one kernel, functions or unknown directives.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    if re.search(r"^\s*(\.visible\s+)?\.func\b", text, re.M) or len(re.findall(r"\.entry\b", text)) != 1:
        raise Unsupported("a module must have one kernel and no functions")
    name, parameters, rest = re.search(rf"\.entry\s+({_NAME})\s*\(([^)]*)\)(.*)", text, re.S).groups()
    directives, _, rest = rest.partition("{")
    instructions, labels, register_types = _parse_body(rest[: _closing_brace(rest)])
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1\s*,\s*1)?\s*(?:\.|$)", directives.strip(), re.M)
    if threads is None:
        raise Unsupported(f"{name}: the number of threads of a block must be given in one dimension (.reqntid)")
    return Program(
        name,
        re.search(r"\.target\s+([\w]+)", text).group(1),
        int(threads.group(1)),
        tuple(re.findall(r"\.param\s+\.(\w+)", parameters)),
        register_types,
        instructions,
        labels,
    )


def _closing_brace(body: str) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", body):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    raise Unsupported("a kernel without an end")


def _parse_body(body: str) -> tuple[tuple[Instruction, ...], dict[str, int], dict[str, str]]:
    lines = [line for line in body.splitlines() if not line.strip().startswith(_SKIPPED)]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    register_types: dict[str, str] = {}
    for statement in "\n".join(lines).split(";"):
        statement = " ".join(statement.split())
        while label := re.match(rf"({_NAME}):\s*", statement):
            labels[label.group(1)] = len(instructions)
            statement = statement[label.end() :]
        if declared := re.fullmatch(r"\.reg \.(\w+) (%\w+?)<\d+>", statement):
            register_types[declared.group(2)] = declared.group(1)
        elif statement.startswith("."):
            raise Unsupported(f"the directive {statement!r} is not emulated")
        elif statement:
            instructions.append(parse_instruction(statement, len(instructions)))
    return tuple(instructions), labels, register_types


def parse_instruction(statement: str, index: int = 0) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(?:@(!?%\w+) )?(\S+) ?(.*)", statement).groups()
    predicate = None if guard is None else guard.removeprefix("!")
    return Instruction(index, opcode, tuple(_split(rest)), predicate, guard is not None and guard[0] == "!")


def _split(text: str) -> list[str]:
    """At the commas that stand in no braces or brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def elements(operand: str) -> list[str]:
    """ "{%r1, %r2}" → ["%r1", "%r2"]; an operand without braces is alone."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address_parts(operand: str) -> tuple[str, int]:
    """ "[%rd1 + -8]" → ("%rd1", -8)."""
    match = re.fullmatch(rf"\[\s*({_NAME})\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if match is None:
        raise Unsupported(f"the address {operand} is not emulated")
    return match.group(1), int(match.group(2) or "0", 0)
