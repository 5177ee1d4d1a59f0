"""The table of instructions: mnemonic → a function that turns an instruction into one that runs it."""

from __future__ import annotations

from collections.abc import Callable

from .ptx import Instruction
from .threads import Layout, Mask, Threads

Run = Callable[[Threads, Mask], None]
Build = Callable[[Instruction, Layout], Run]
TABLE: dict[str, Build] = {}


def instruction(*mnemonics: str) -> Callable[[Build], Build]:
    """Put the decorated function into the table.

    A mnemonic may name the first parts of an opcode ("cp.async.wait_group"); the longest that fits an opcode counts.
    """

    def put(build: Build) -> Build:
        for mnemonic in mnemonics:
            assert mnemonic not in TABLE, mnemonic
            TABLE[mnemonic] = build
        return build

    return put


def compile_instruction(ins: Instruction, layout: Layout) -> Run:
    """What runs the instruction.

    Raises:
        Unsupported: with the opcode, if the instruction or one of its modifiers is not in the table.
    """
    for length in range(len(ins.parts), 0, -1):
        if (build := TABLE.get(".".join(ins.parts[:length]))) is not None:
            return build(ins, layout)
    raise ins.unsupported()


def allow(ins: Instruction, *modifiers: str, skip: int = 1) -> None:
    """Refuse parts between the mnemonic, of `skip` parts, and the type, the last one, that are not among `modifiers`.

    Raises:
        Unsupported: naming the modifier.
    """
    for part in ins.parts[skip:-1]:
        if part not in modifiers:
            raise ins.unsupported(f"has the modifier .{part}, which is not emulated")
