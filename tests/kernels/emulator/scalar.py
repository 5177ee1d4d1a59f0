"""Instructions of one thread: arithmetic, comparisons, conversions, moves. One function a mnemonic.

Approximations (ex2.approx, rcp.approx, div.full, …) are computed in float32 as numpy rounds them: a GPU may differ in
the last two bits. An fma is rounded from float64, which holds the product exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import FROM_HALF, TO_HALF, flush, to_tf32
from .ptx import Instruction, elements
from .table import Run, allow, instruction
from .threads import TYPES, Layout, bits_of

_SIGNED = {"s16": np.int32, "s32": np.int64}
_UNSIGNED = {"u16": np.uint32, "u32": np.uint64}
_WIDE = _SIGNED | _UNSIGNED


def _type(ins: Instruction, part: int = -1) -> type:
    if ins.parts[part] not in TYPES:
        raise ins.unsupported(f"has the type .{ins.parts[part]}, which is not emulated")
    return TYPES[ins.parts[part]]


def _elementwise(ins: Instruction, layout: Layout, kinds: list[type], function: Callable) -> Run:
    """`function` of the operands after the first, read as `kinds`, is written to the first."""
    if len(ins.operands) != len(kinds) + 1:
        raise ins.unsupported(f"has {len(ins.operands)} operands, which is not emulated")
    reads = [layout.reader(operand, kind) for operand, kind in zip(ins.operands[1:], kinds, strict=True)]
    write = layout.writer(ins.operands[0])
    if len(reads) == 1:
        (read,) = reads
        return lambda threads, mask: write(threads, function(read(threads)), mask)
    if len(reads) == 2:
        left, right = reads
        return lambda threads, mask: write(threads, function(left(threads), right(threads)), mask)
    return lambda threads, mask: write(threads, function(*(read(threads) for read in reads)), mask)


# -- Arithmetic --------------------------------------------------------------------------------------------------------


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


_FLOAT: dict[str, tuple[int, Callable]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "fma": (3, _fused),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
}


def _float(ins: Instruction, layout: Layout) -> Run:
    count, function = _FLOAT[ins.parts[0]]
    if ins.parts[-1] in FROM_HALF and ins.parts[-2] == "f32":
        return _mixed(ins, layout)
    if ins.parts[-1] == "f32x2":
        return _pairs(ins, layout)
    if ins.parts[-1] != "f32":
        return _sign(ins, layout)
    if "NaN" in ins.parts:
        function = {"min": np.minimum, "max": np.maximum}[ins.parts[0]]
    allow(ins, "rn", *(["NaN"] if ins.parts[0] in ("min", "max") else []))
    return _elementwise(ins, layout, [np.float32] * count, function)


def _mixed(ins: Instruction, layout: Layout) -> Run:
    """add.f32.bf16: the first operand has half precision; of an fma, both factors."""
    if ins.parts[0] not in ("add", "sub", "fma") or set(ins.parts[1:-2]) - {"rn"}:
        raise ins.unsupported()
    widen, (count, function) = FROM_HALF[ins.parts[-1]], _FLOAT[ins.parts[0]]
    narrow = 2 if count == 3 else 1

    def mixed(*operands: np.ndarray) -> np.ndarray:
        return function(*map(widen, operands[:narrow]), *operands[narrow:])

    return _elementwise(ins, layout, [np.uint16] * narrow + [np.float32] * (count - narrow), mixed)


def _sign(ins: Instruction, layout: Layout) -> Run:
    """neg.bf16, abs.f16x2: of half precision alone only the sign is changed here."""
    allow(ins)
    if ins.parts[0] not in ("neg", "abs"):
        raise ins.unsupported()
    sign = np.uint32(0x80008000) if ins.parts[-1].endswith("x2") else np.uint16(0x8000)
    change = (lambda x: x ^ sign) if ins.parts[0] == "neg" else (lambda x: x & ~sign)
    return _elementwise(ins, layout, [type(sign)], change)


def _pairs(ins: Instruction, layout: Layout) -> Run:
    """add.f32x2: two floats in a 64-bit register."""
    allow(ins, "rn")
    count, function = _FLOAT[ins.parts[0]]

    def pairs(*operands: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(function(*(x.view(np.float32) for x in operands))).view(np.uint64)

    return _elementwise(ins, layout, [np.uint64] * count, pairs)


def _is_float(ins: Instruction) -> bool:
    return ins.parts[-1] in ("f32", "f32x2", "bf16", "f16", "bf16x2", "f16x2")


_INTEGER: dict[str, tuple[int, Callable]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
}


@instruction("add", "sub", "neg", "abs", "min", "max")
def _arithmetic(ins: Instruction, layout: Layout) -> Run:
    if _is_float(ins):
        return _float(ins, layout)
    allow(ins)
    count, function = _INTEGER[ins.parts[0]]
    return _elementwise(ins, layout, [_type(ins)] * count, function)


@instruction("fma")
def _fma(ins: Instruction, layout: Layout) -> Run:
    return _float(ins, layout)


@instruction("mul", "mad")
def _multiply(ins: Instruction, layout: Layout) -> Run:
    """Integers: the low half of the product, its high half, or all of it ("wide"); mad adds the third operand."""
    if _is_float(ins):
        return _float(ins, layout)
    allow(ins, "lo", "hi", "wide")
    kind, with_sum = _type(ins), ins.parts[0] == "mad"
    if ins.parts[1] == "lo":
        if with_sum:
            return _elementwise(ins, layout, [kind] * 3, lambda a, b, c: a * b + c)
        return _elementwise(ins, layout, [kind] * 2, np.multiply)
    if ins.parts[1:] in (("hi", "s64"), ("hi", "u64")) and not with_sum:
        return _elementwise(ins, layout, [kind] * 2, _high_half)
    if ins.parts[-1] not in _WIDE:
        raise ins.unsupported()
    wide = _WIDE[ins.parts[-1]]
    half = np.dtype(kind).itemsize * 8

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        whole = a.astype(wide) * b.astype(wide)
        return whole if ins.parts[1] == "wide" else (whole >> wide(half)).astype(kind)

    if not with_sum:
        return _elementwise(ins, layout, [kind] * 2, product)
    last = wide if ins.parts[1] == "wide" else kind
    return _elementwise(ins, layout, [kind, kind, last], lambda a, b, c: product(a, b) + c)


def _high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the product of 64-bit integers, by their 32-bit halves; of negative ones, 2^64 times the other is too much."""
    low_bits, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    (x1, x0), (y1, y0) = ((n >> half, n & low_bits) for n in (x, y))
    middle = x1 * y0 + (x0 * y0 >> half)
    carry = (x0 * y1 + (middle & low_bits)) >> half
    high = x1 * y1 + (middle >> half) + carry
    if a.dtype == np.int64:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


@instruction("div", "rem")
def _divide(ins: Instruction, layout: Layout) -> Run:
    """Integers are cut towards zero; by zero the result is unspecified: all bits one, here."""
    kind = _type(ins)
    if kind is np.float32:
        if ins.parts[0] == "rem":
            raise ins.unsupported()
        allow(ins, "full", "approx", "rn")
        return _elementwise(ins, layout, [kind] * 2, np.divide)
    allow(ins)

    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        by = np.where(b == 0, kind(1), b)
        rest = np.fmod(a, by)  # of the sign of a
        result = (a - rest) // by if ins.parts[0] == "div" else rest
        return np.where(b == 0, kind(-1) if np.issubdtype(kind, np.signedinteger) else np.iinfo(kind).max, result)

    return _elementwise(ins, layout, [kind] * 2, lambda a, b: quotient(a, b).astype(kind))


_APPROXIMATE: dict[str, Callable] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: np.float32(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@instruction(*_APPROXIMATE)
def _approximate(ins: Instruction, layout: Layout) -> Run:
    allow(ins, "approx", "rn", "ftz")
    if _type(ins) is not np.float32:
        raise ins.unsupported()
    function = _APPROXIMATE[ins.parts[0]]
    if "ftz" not in ins.parts:
        return _elementwise(ins, layout, [np.float32], function)
    return _elementwise(ins, layout, [np.float32], lambda x: flush(function(flush(x))))


# -- Bits --------------------------------------------------------------------------------------------------------------


@instruction("and", "or", "xor", "not")
def _bitwise(ins: Instruction, layout: Layout) -> Run:
    allow(ins)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[ins.parts[0]]
    return _elementwise(ins, layout, [_type(ins)] * (1 if ins.parts[0] == "not" else 2), function)


@instruction("lop3")
def _lookup(ins: Instruction, layout: Layout) -> Run:
    """Any function of three bits: bit 4a + 2b + c of the last operand."""
    allow(ins)
    *operands, table = ins.operands
    bits = layout.immediate(table)

    def look_up(*inputs: np.ndarray) -> np.ndarray:
        result = np.zeros_like(inputs[0])
        for row in range(8):
            if bits >> row & 1:
                chosen = [x if row >> place & 1 else ~x for place, x in zip((2, 1, 0), inputs, strict=True)]
                result |= chosen[0] & chosen[1] & chosen[2]
        return result

    return _elementwise(Instruction(ins.index, ins.opcode, tuple(operands)), layout, [np.uint32] * 3, look_up)


@instruction("shl", "shr")
def _shift(ins: Instruction, layout: Layout) -> Run:
    """Shifts by the width or more leave zeros, or the sign."""
    allow(ins)
    kind = _type(ins)
    width = 8 * np.dtype(kind).itemsize
    shift = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    signed = np.issubdtype(kind, np.signedinteger)

    def shifted(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        result = shift(x, np.minimum(by, np.uint32(width - 1)).astype(kind))
        return result if signed and shift is np.right_shift else np.where(by >= width, kind(0), result)

    return _elementwise(ins, layout, [kind, np.uint32], shifted)


@instruction("shf")
def _funnel_shift(ins: Instruction, layout: Layout) -> Run:
    """Of two registers as one of 64 bits: the upper half, shifted left, or the lower half, shifted right."""
    allow(ins, "l", "r", "wrap", "clamp")

    def shifted(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        places = (by & np.uint32(31) if "wrap" in ins.parts else np.minimum(by, np.uint32(32))).astype(np.uint64)
        if "l" in ins.parts:
            return ((both << places) >> np.uint64(32)).astype(np.uint32)
        return (both >> places).astype(np.uint32)

    return _elementwise(ins, layout, [np.uint32] * 3, shifted)


@instruction("bfe")
def _extract(ins: Instruction, layout: Layout) -> Run:
    """Bits `place` to `place + length - 1`, with their highest as the sign where the type has one."""
    allow(ins)
    if ins.parts[-1] not in ("u32", "s32"):
        raise ins.unsupported()
    kind = _type(ins)
    whole = np.int64 if kind is np.int32 else np.uint64

    def extract(x: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
        above = np.uint64(64) - np.minimum(length & np.uint32(255), np.uint32(64)).astype(np.uint64)
        moved = x.view(kind).astype(whole) >> np.minimum(place & np.uint32(255), np.uint32(63)).astype(whole)
        back = np.minimum(above, np.uint64(63)).astype(whole)
        return np.where(above == 64, kind(0), ((moved << back) >> back).astype(kind))

    return _elementwise(ins, layout, [np.uint32] * 3, extract)


@instruction("bfi")
def _insert(ins: Instruction, layout: Layout) -> Run:
    """The low `length` bits of the first operand take the place of those from `place` on in the second."""
    allow(ins)
    if ins.parts[-1] != "b32":
        raise ins.unsupported()

    def insert(x: np.ndarray, into: np.ndarray, place: np.ndarray, length: np.ndarray) -> np.ndarray:
        ones = (np.uint64(1) << np.minimum(length, np.uint32(32)).astype(np.uint64)) - np.uint64(1)
        window = (ones << place.astype(np.uint64)).astype(np.uint32)
        moved = (x.astype(np.uint64) << place.astype(np.uint64)).astype(np.uint32)
        return (into & ~window) | (moved & window)

    return _elementwise(ins, layout, [np.uint32] * 4, insert)


@instruction("prmt")
def _permute(ins: Instruction, layout: Layout) -> Run:
    """Four of the eight bytes of two registers; a selector with its fourth bit set copies the byte's sign."""
    allow(ins)

    def permute(low: np.ndarray, high: np.ndarray, selectors: np.ndarray) -> np.ndarray:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(low)
        for place in range(4):
            selector = (selectors >> np.uint32(4 * place)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (selector & np.uint32(7)).astype(np.uint64))).astype(np.uint8)
            sign = np.where(byte & np.uint8(128), np.uint8(255), np.uint8(0))
            byte = np.where(selector & np.uint32(8), sign, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * place)
        return result

    return _elementwise(ins, layout, [np.uint32] * 3, permute)


# -- Comparisons and choices -------------------------------------------------------------------------------------------

_ORDERED: dict[str, Callable] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # false for NaN, as all of these
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE_FLOAT: dict[str, Callable] = _ORDERED | {
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMPARE_INTEGER: dict[str, Callable] = _ORDERED | {
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


@instruction("setp")
def _compare(ins: Instruction, layout: Layout) -> Run:
    kind = _type(ins)
    table = _COMPARE_FLOAT if kind is np.float32 else _COMPARE_INTEGER
    if len(ins.parts) != 3 or ins.parts[1] not in table:
        raise ins.unsupported()
    return _elementwise(ins, layout, [kind] * 2, table[ins.parts[1]])


@instruction("selp")
def _select(ins: Instruction, layout: Layout) -> Run:
    allow(ins)
    kind = bits_of(_type(ins))
    return _elementwise(ins, layout, [kind, kind, np.bool_], lambda a, b, first: np.where(first, a, b))


# -- Moves and conversions ---------------------------------------------------------------------------------------------


@instruction("mov")
def _move(ins: Instruction, layout: Layout) -> Run:
    allow(ins)
    kind = bits_of(_type(ins))
    target, source = ins.operands
    if target.startswith("{"):
        return _unpack(ins, layout, kind)
    if source.startswith("{"):
        return _pack(ins, layout, kind)
    return _elementwise(ins, layout, [kind], lambda x: x)


def _half(kind: type) -> type:
    return {np.uint64: np.uint32, np.uint32: np.uint16}[kind]


def _unpack(ins: Instruction, layout: Layout, kind: type) -> Run:
    """mov.b32 {%rs1, %rs2}, %r1: the low half comes first."""
    writes, read = layout.writers(ins.operands[0]), layout.reader(ins.operands[1], kind)
    if len(writes) != 2:
        raise ins.unsupported()

    def run(threads, mask):
        halves = read(threads).view(_half(kind)).reshape(-1, 2)
        for place, write in enumerate(writes):
            write(threads, np.ascontiguousarray(halves[:, place]), mask)

    return run


def _pack(ins: Instruction, layout: Layout, kind: type) -> Run:
    """A half may be undefined: LLVM computes on pairs (add.f32x2) where it needs one half of the result."""
    if len(elements(ins.operands[1])) != 2:
        raise ins.unsupported()
    low, high = (layout.lenient_reader(name, _half(kind)) for name in elements(ins.operands[1]))
    write = layout.writer(ins.operands[0])

    def run(threads, mask):
        write(threads, np.stack([low(threads), high(threads)], 1).view(kind).reshape(-1), mask)

    return run


@instruction("cvta")
def _to_address(ins: Instruction, layout: Layout) -> Run:
    """Addresses of all spaces are the same numbers here (shared memory and parameters are told by the opcode)."""
    if ins.opcode not in ("cvta.to.global.u64", "cvta.global.u64", "cvta.param.u64"):
        raise ins.unsupported()
    return _elementwise(ins, layout, [np.uint64], lambda x: x)


@instruction("cvt")
def _convert(ins: Instruction, layout: Layout) -> Run:
    *modifiers, target, source = ins.parts[1:]
    if target in ("bf16x2", "f16x2") and source == "f32" and modifiers == ["rn"]:
        narrow = TO_HALF[target.removesuffix("x2")]

        def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            return np.stack([narrow(low), narrow(high)], 1).view(np.uint32)[:, 0]

        return _elementwise(ins, layout, [np.float32] * 2, pair)
    conversions: dict[tuple, tuple[type, Callable]] = {
        ("rn", "bf16", "f32"): (np.float32, TO_HALF["bf16"]),
        ("rn", "f16", "f32"): (np.float32, TO_HALF["f16"]),
        ("f32", "bf16"): (np.uint16, FROM_HALF["bf16"]),
        ("f32", "f16"): (np.uint16, FROM_HALF["f16"]),
        ("rna", "tf32", "f32"): (np.float32, to_tf32),
    }
    if (found := conversions.get((*modifiers, target, source))) is not None:
        return _elementwise(ins, layout, [found[0]], found[1])
    from_kind, to_kind = _type(ins), _type(ins, -2)
    integers = [np.issubdtype(kind, np.integer) for kind in (from_kind, to_kind)]
    to_float = to_kind is np.float32 and integers[0] and modifiers == ["rn"]
    if not to_float and (not all(integers) or modifiers):
        raise ins.unsupported()
    return _elementwise(ins, layout, [from_kind], lambda x: x.astype(to_kind))
