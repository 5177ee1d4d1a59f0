"""The emulator's instructions of threads against results worked out by hand, and what it refuses and reports.

Kernels here are written in PTX: 32 threads or more, which read tensors of one entry a thread and write one.
"""

import numpy as np
import pytest
from emulator.errors import EmulationError, Unsupported
from emulator.machine import Kernel
from emulator.ptx import parse
from emulator_probes import execute, kernel_text

DTYPES = {
    "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32,
    "f32": np.float32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
}  # fmt: skip


def compute(statement: str, result: str, *operands: tuple[str, list]) -> np.ndarray:
    """An instruction of one thread: D and A, B, C, … stand for registers of the given types; entries → threads."""
    lines, tensors = [], []
    names = {}
    for letter, (kind, values) in zip("ABCD", operands, strict=False):
        bits = np.array(values, DTYPES[kind]) if kind != "pred" else np.array(values, np.uint32)
        bits = bits.view(f"u{bits.itemsize}").astype(np.uint64)
        tensors += [np.zeros(32, np.uint32), np.zeros(32, np.uint32)]
        for half, tensor in enumerate(tensors[-2:]):
            tensor[: len(values)] = (bits >> np.uint64(32 * half)) & np.uint64(0xFFFFFFFF)
        low, high = len(tensors) - 1, len(tensors)
        lines += [f"ld.global.b32 %r{low}, [%rd{low}];", f"ld.global.b32 %r{high}, [%rd{high}];"]
        width = {"pred": "pred"}.get(kind, f"b{8 * np.dtype(DTYPES.get(kind, 'u4')).itemsize}")
        names[letter] = {"pred": f"%p{low}", "b16": f"%rs{low}", "b32": f"%r{low}", "b64": f"%rd{40 + low}"}[width]
        lines.append({
            "pred": f"setp.ne.b32 %p{low}, %r{low}, 0;",
            "b16": f"cvt.u16.u32 %rs{low}, %r{low};",
            "b32": "",
            "b64": f"mov.b64 %rd{40 + low}, {{%r{low}, %r{high}}};",
        }[width])  # fmt: skip
    width = "pred" if result == "pred" else f"b{8 * np.dtype(DTYPES[result]).itemsize}"
    names["OUT"] = {"pred": "%p60", "b16": "%rs60", "b32": "%r60", "b64": "%rd60"}[width]
    for name, register in names.items():
        statement = statement.replace(name, register, 1) if name == "OUT" else statement
    words = [names.get(word, word) for word in statement.replace(",", " , ").replace(";", " ;").split(" ")]
    lines.append(" ".join(words))
    lines.append({
        "pred": "selp.b32 %r60, 1, 0, %p60;\nmov.b32 %r61, 0;",
        "b16": "cvt.u32.u16 %r60, %rs60;\nmov.b32 %r61, 0;",
        "b32": "mov.b32 %r61, 0;",
        "b64": "mov.b64 {%r60, %r61}, %rd60;",
    }[width])  # fmt: skip
    lines += ["st.global.b32 [%rd0], %r60;", f"st.global.b32 [%rd{len(tensors) + 1}], %r61;"]
    after, _ = execute("\n".join(lines), np.zeros(32, np.uint32), *tensors, np.zeros(32, np.uint32))
    whole = after[0].astype(np.uint64) | (after[-1].astype(np.uint64) << np.uint64(32))
    dtype = np.dtype(bool if result == "pred" else DTYPES[result])
    return whole.astype(bool if result == "pred" else f"u{dtype.itemsize}").view(dtype)[: len(operands[0][1])]


HIGH = [(-(2**40) - 1) * (2**30 + 5) >> 64, (3 << 61) * 7 >> 64]
NAN, INF = float("nan"), float("inf")
F, S, U = "f32", "s32", "u32"
SCALAR = [
    ("add.f32 OUT, A, B;", F, [(F, [1.5, INF]), (F, [2.25, -INF])], [3.75, NAN]),
    ("sub.f32 OUT, A, B;", F, [(F, [1.5]), (F, [2.25])], [-0.75]),
    ("mul.f32 OUT, A, B;", F, [(F, [1.5, 0.0]), (F, [-2.0, INF])], [-3.0, NAN]),
    # (1 + 2^-12)^2 - 1 has 2^-24 in it, which the rounded product has not.
    ("fma.rn.f32 OUT, A, B, C;", F, [(F, [1 + 2**-12]), (F, [1 + 2**-12]), (F, [-1.0])], [2**-11 + 2**-24]),
    ("neg.f32 OUT, A;", F, [(F, [1.5, -0.0])], [-1.5, 0.0]),
    ("abs.f32 OUT, A;", F, [(F, [-1.5])], [1.5]),
    ("neg.bf16 OUT, A;", "b16", [("b16", [0x3F80])], [0xBF80]),
    ("neg.bf16x2 OUT, A;", "b32", [("b32", [0x3F80BF80])], [0xBF803F80]),
    ("abs.f16 OUT, A;", "b16", [("b16", [0xBC00])], [0x3C00]),
    ("min.f32 OUT, A, B;", F, [(F, [1.0, NAN]), (F, [2.0, 2.0])], [1.0, 2.0]),
    ("max.NaN.f32 OUT, A, B;", F, [(F, [1.0, NAN]), (F, [2.0, 2.0])], [2.0, NAN]),
    ("div.full.f32 OUT, A, B;", F, [(F, [1.0, 1.0]), (F, [4.0, 0.0])], [0.25, INF]),
    ("ex2.approx.f32 OUT, A;", F, [(F, [3.0, -INF])], [8.0, 0.0]),
    ("lg2.approx.f32 OUT, A;", F, [(F, [8.0])], [3.0]),
    ("rcp.approx.f32 OUT, A;", F, [(F, [4.0])], [0.25]),
    ("sqrt.approx.f32 OUT, A;", F, [(F, [16.0])], [4.0]),
    ("rsqrt.approx.ftz.f32 OUT, A;", F, [(F, [16.0, 1e-40])], [0.25, INF]),
    ("add.rn.f32.bf16 OUT, A, B;", F, [("b16", [0x3F80]), (F, [0.5])], [1.5]),
    ("fma.rn.f32.f16 OUT, A, B, C;", F, [("b16", [0x3C00]), ("b16", [0x4000]), (F, [0.5])], [2.5]),
    ("fma.rn.f32x2 OUT, A, B, C;", "b64", [("b64", [0x40000000_3F800000])] * 3, [0x40C00000_40000000]),
    ("add.s32 OUT, A, B;", S, [(S, [2**31 - 1]), (S, [1])], [-(2**31)]),
    ("sub.s64 OUT, A, B;", "s64", [("s64", [1]), ("s64", [2**40])], [1 - 2**40]),
    ("mul.lo.s32 OUT, A, B;", S, [(S, [-3, 1 << 20]), (S, [5, 1 << 12])], [-15, 0]),
    ("mul.hi.s32 OUT, A, B;", S, [(S, [-(1 << 20)]), (S, [1 << 14])], [-4]),
    ("mul.hi.u32 OUT, A, B;", U, [(U, [0xFFFFFFFF]), (U, [0xFFFFFFFF])], [0xFFFFFFFE]),
    ("mul.hi.s64 OUT, A, B;", "s64", [("s64", [-(2**40) - 1, 3 << 61]), ("s64", [2**30 + 5, 7])], HIGH),
    ("mul.hi.u64 OUT, A, B;", "u64", [("u64", [2**64 - 1]), ("u64", [2**64 - 1])], [2**64 - 2]),
    ("mul.wide.s32 OUT, A, B;", "s64", [(S, [-3]), (S, [2**30])], [-3 * 2**30]),
    ("mad.wide.u32 OUT, A, B, C;", "u64", [(U, [2**31]), (U, [4]), ("u64", [7])], [2**33 + 7]),
    ("mad.lo.s32 OUT, A, B, C;", S, [(S, [3]), (S, [4]), (S, [-5])], [7]),
    ("div.s32 OUT, A, B;", S, [(S, [-7, 7, -(2**31)]), (S, [2, -2, 1])], [-3, -3, -(2**31)]),
    ("rem.s32 OUT, A, B;", S, [(S, [-7, 7]), (S, [2, -2])], [-1, 1]),
    ("div.u64 OUT, A, B;", "u64", [("u64", [2**63])], [2**62]),
    ("neg.s32 OUT, A;", S, [(S, [5])], [-5]),
    ("min.s32 OUT, A, B;", S, [(S, [-1]), (S, [1])], [-1]),
    ("max.u32 OUT, A, B;", U, [(U, [0xFFFFFFFF]), (U, [1])], [0xFFFFFFFF]),
    ("and.b32 OUT, A, B;", U, [(U, [0b1100]), (U, [0b1010])], [0b1000]),
    ("or.b32 OUT, A, B;", U, [(U, [0b1100]), (U, [0b1010])], [0b1110]),
    ("xor.b64 OUT, A, B;", "u64", [("u64", [2**40]), ("u64", [1])], [2**40 + 1]),
    ("not.b32 OUT, A;", U, [(U, [0])], [0xFFFFFFFF]),
    ("and.pred OUT, A, B;", "pred", [("pred", [1, 1]), ("pred", [1, 0])], [True, False]),
    ("not.pred OUT, A;", "pred", [("pred", [1, 0])], [False, True]),
    # A or (B and not C): bits 100 to 111 and 010 of the table.
    ("lop3.b32 OUT, A, B, C, 0xF4;", U, [(U, [0b0001]), (U, [0b0110]), (U, [0b0100])], [0b0011]),
    ("shl.b32 OUT, A, B;", U, [(U, [3, 3]), (U, [4, 32])], [48, 0]),
    ("shr.u32 OUT, A, B;", U, [(U, [0x80000000, 5]), (U, [31, 40])], [1, 0]),
    ("shr.s32 OUT, A, B;", S, [(S, [-8, -8]), (U, [1, 40])], [-4, -1]),
    ("shf.l.wrap.b32 OUT, A, B, C;", U, [(U, [0x80000000]), (U, [1]), (U, [1])], [3]),
    ("shf.r.clamp.b32 OUT, A, B, C;", U, [(U, [1]), (U, [3]), (U, [32])], [3]),
    ("bfe.u32 OUT, A, B, C;", U, [(U, [0xABCD]), (U, [4]), (U, [8])], [0xBC]),
    ("bfe.s32 OUT, A, B, C;", S, [(S, [0b100]), (U, [2]), (U, [1])], [-1]),
    ("bfi.b32 OUT, A, B, 4, 8;", U, [(U, [0xFFF]), (U, [0])], [0xFF0]),
    # Byte 0 of the first, byte 0 of the second (4), its byte 3 (7) and the sign of the first's byte 3 (3 + 8).
    ("prmt.b32 OUT, A, B, 0xB740;", U, [(U, [0x83020100]), (U, [0x07060504])], [0xFF070400]),
    ("setp.lt.s32 OUT, A, B;", "pred", [(S, [-1, 1]), (S, [1, 1])], [True, False]),
    ("setp.lt.u32 OUT, A, B;", "pred", [(U, [0xFFFFFFFF]), (U, [1])], [False]),
    ("setp.ne.f32 OUT, A, B;", "pred", [(F, [NAN, 1.0]), (F, [1.0, 2.0])], [False, True]),
    ("setp.neu.f32 OUT, A, B;", "pred", [(F, [NAN]), (F, [1.0])], [True]),
    ("setp.num.f32 OUT, A, B;", "pred", [(F, [NAN, 1.0]), (F, [1.0, 1.0])], [False, True]),
    ("selp.b32 OUT, A, B, C;", U, [(U, [1, 1]), (U, [2, 2]), ("pred", [1, 0])], [1, 2]),
    ("mov.b32 OUT, {A,B};", U, [("b16", [0x1111]), ("b16", [0x2222])], [0x22221111]),
    ("cvt.rn.bf16.f32 OUT, A;", "b16", [(F, [1 + 2**-8, 1 + 3 * 2**-8, INF])], [0x3F80, 0x3F82, 0x7F80]),
    ("cvt.rn.f16.f32 OUT, A;", "b16", [(F, [1 + 2**-11, 1e6])], [0x3C00, 0x7C00]),
    ("cvt.rn.bf16x2.f32 OUT, A, B;", U, [(F, [1.0]), (F, [2.0])], [0x3F804000]),
    ("cvt.f32.bf16 OUT, A;", F, [("b16", [0x4040])], [3.0]),
    ("cvt.f32.f16 OUT, A;", F, [("b16", [0x4200])], [3.0]),
    ("cvt.rna.tf32.f32 OUT, A;", F, [(F, [1 + 2**-11, 1 + 2**-12])], [1 + 2**-10, 1.0]),
    ("cvt.rn.f32.s32 OUT, A;", F, [(S, [-3])], [-3.0]),
    ("cvt.s64.s32 OUT, A;", "s64", [(S, [-3])], [-3]),
    ("cvt.u64.u32 OUT, A;", "u64", [(U, [0xFFFFFFFF])], [0xFFFFFFFF]),
    ("cvt.u32.u64 OUT, A;", U, [("u64", [2**32 + 5])], [5]),
]  # fmt: skip


@pytest.mark.parametrize("statement, result, operands, want", SCALAR, ids=[case[0] for case in SCALAR])
def test_an_instruction_of_one_thread(statement, result, operands, want):
    if statement.startswith("div.u64"):
        operands = [*operands, ("u64", [2])]
    statement = statement.replace("{A,B}", "{ A , B }")
    np.testing.assert_array_equal(compute(statement, result, *operands), np.array(want, dtype=None))


@pytest.mark.parametrize(
    "statement, why",
    [
        ("popc.b32 %r1, %r0;", "popc.b32 is not emulated"),
        ("add.sat.s32 %r1, %r0, 1;", "modifier .sat"),
        ("mul.rz.f32 %r1, %r0, %r0;", "modifier .rz"),
        ("cvt.rni.s32.f32 %r1, %r0;", "cvt.rni.s32.f32"),
        ("ld.global.v3.b32 %r1, [%rd0];", "modifier .v3"),
        ("bar.sync 1, 32;", "no barrier of the whole block"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1}, %rd0, %rd0, 1, 1, 1;", "m64n8k32"),
        ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1};", "m16n8k32"),
        ("add.f64 %rd1, %rd0, %rd0;", ".f64"),
        ("mul.bf16 %rs1, %rs0, %rs0;", "mul.bf16"),
    ],
)
def test_what_is_not_known_stops_with_its_name(statement, why):
    with pytest.raises(Unsupported, match=why.replace(".", r"\.")):
        Kernel(kernel_text(statement))


@pytest.mark.parametrize("text", ["shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;", "@!%p1 bra $L1;", "mov.b32 %r1, 1;"])
def test_a_statement_reads_back(text):
    ins = parse(kernel_text(f"{text}\n$L1:\n")).instructions[-2]
    assert str(ins) == text.removesuffix(";")


# -- Registers and memory ----------------------------------------------------------------------------------------------

X = np.arange(32, dtype=np.uint32)


def test_a_register_that_was_never_written_is_an_error():
    with pytest.raises(EmulationError, match="%r7 is read, but no thread has written it"):
        execute("add.s32 %r1, %r7, 1;", X)


def test_a_half_of_a_pair_may_be_undefined():
    body = "mov.b64 %rd5, {%r0, %r9};\nmov.b64 {%r1, %r2}, %rd5;\nst.global.v2.b32 [%rd0], {%r1, %r2};"
    (after,), _ = execute("mad.wide.u32 %rd0, %r0, 4, %rd0;\n" + body, np.arange(64, dtype=np.uint32))
    assert after.reshape(32, 2).tolist() == [[i, 0xFFFFFFFF] for i in range(32)]


def test_a_predicate_keeps_the_other_threads():
    """The first write of a register under a predicate leaves it undefined in the others: all ones."""
    body = "setp.lt.u32 %p1, %r0, 4;\n@%p1 mov.b32 %r1, 7;\n@!%p1 add.s32 %r2, %r1, 0;\nst.global.b32 [%rd0], %r1;"
    (after,), _ = execute(body, X)
    assert after.tolist() == [7] * 4 + [0xFFFFFFFF] * 28


def test_shared_memory_is_nan_at_its_start():
    (after,), _ = execute("ld.shared.b32 %r1, [global_smem + 4];\nst.global.b32 [%rd0], %r1;", X, shared=64)
    assert np.isnan(after.view(np.float32)).all()


@pytest.mark.parametrize(
    "body, shared, why",
    [
        ("st.shared.b32 [global_smem + 64], %r0;", 64, "out of bounds of shared memory: byte 64 of 64"),
        ("ld.shared.v2.b32 {%r1, %r2}, [global_smem + 4];", 64, "no multiple of 8"),
        ("ld.global.b32 %r1, [%rd0 + 4];", 0, "byte 128 of t0, which has 128"),
        ("st.global.b32 [%rd1 + -4], %r0;", 0, "byte -4 of t1, which has 128"),
    ],
)
def test_out_of_bounds_names_the_instruction_and_the_tensor(body, shared, why):
    with pytest.raises(EmulationError, match=why) as caught:
        execute(body, X, X, shared=shared)
    assert body.split()[0] in str(caught.value)


def test_vectors_and_narrow_types():
    """Two entries of 16 bits are swapped, and a byte is extended by its sign."""
    body = """
        ld.global.v2.b16 {%rs1, %rs2}, [%rd0];
        st.global.v2.b16 [%rd0], {%rs2, %rs1};
        ld.global.s8 %rs3, [%rd1];
        cvt.s32.s16 %r1, %rs3;
        st.global.b32 [%rd1], %r1;
    """
    (swapped, signed), _ = execute(body, X + np.uint32(0x50000), np.full(32, 0xFE, np.uint32))
    assert swapped.tolist() == [(x << 16) + 5 for x in range(32)]
    assert set(signed.view(np.int32).tolist()) == {-2}


@pytest.mark.parametrize(
    "operation, operand, want",
    [("add.f32", "0f3F800000", 32.0), ("max.s32", "%r0", 31), ("exch.b32", "%r0", 31), ("min.u32", "%r0", 0)],
)
def test_atomics(operation, operand, want):
    """All threads at one place; what each of them got is what was there before."""
    body = f"""
        ld.param.b64 %rd9, [probe_param_0];
        mov.b32 %r2, {operand};
        atom.global.gpu.relaxed.{operation} %r1, [%rd9], %r2;
        st.global.b32 [%rd1], %r1;
        red.global.gpu.relaxed.{operation} [%rd9 + 4], %r2;
    """
    (sums, before), report = execute(body, np.zeros(32, np.uint32), X)
    dtype = np.float32 if operation.endswith("f32") else np.int32
    assert sums.view(dtype)[:2].tolist() == [want, want]
    expected = {"add.f32": np.arange(32), "max.s32": np.maximum(np.arange(32) - 1, 0), "min.u32": np.zeros(32)}
    expected["exch.b32"] = expected["max.s32"]
    assert (before.view(dtype) == expected[operation]).all()
    assert not report.races


SHUFFLES = [
    ("bfly", 4, 31, lambda lane: lane ^ 4),
    ("bfly", 16, 0x101F, lambda lane: lane if lane < 16 else lane - 16),  # in segments of 16, only lower ones
    ("up", 1, 0, lambda lane: max(lane - 1, 0)),
    ("down", 2, 31, lambda lane: lane + 2 if lane < 30 else lane),
    ("idx", 5, 31, lambda lane: 5),
    ("idx", 3, 0x181F, lambda lane: lane // 8 * 8 + 3),  # in segments of 8 lanes
    ("up", 1, 0x1800, lambda lane: lane if lane % 8 == 0 else lane - 1),
]


@pytest.mark.parametrize("way, by, bounds, source", SHUFFLES)
def test_shuffles(way, by, bounds, source):
    body = f"shfl.sync.{way}.b32 %r1|%p1, %r0, {by}, {bounds}, -1;\nselp.b32 %r2, 1, 0, %p1;\n"
    (values, inside), _ = execute(body + "st.global.b32 [%rd0], %r1;\nst.global.b32 [%rd1], %r2;", X, X)
    assert values.tolist() == [source(lane) for lane in range(32)]
    reached = {"bfly": lambda lane: source(lane) != lane, "idx": lambda lane: True}.get(way, lambda n: source(n) != n)
    assert inside.tolist() == [int(reached(lane)) for lane in range(32)]


def test_a_lane_that_takes_no_part_cannot_be_read():
    for body in (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;",
        "shfl.sync.bfly.b32 %r1, %r0, 16, 31, 0xFFFF;",
    ):
        with pytest.raises(EmulationError, match="does not take part"):
            execute(body, X)


# -- Control flow and barriers -----------------------------------------------------------------------------------------


def test_a_loop_and_parameters():
    body = """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        $LOOP:
        add.s32 %r2, %r2, %r1;
        add.s32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 5;
        @%p1 bra $LOOP;
        st.global.b32 [%rd0], %r2;
    """
    assert execute(body, X)[0][0].tolist() == [10] * 32


def test_a_parameter_by_its_address():
    body = "mov.b32 %r1, probe_param_1;\nld.param.b64 %rd9, [%r1];\nst.global.b32 [%rd9], 5;"
    assert execute(body, X, X)[0][1][0] == 5


def test_a_branch_that_parts_a_warp_is_an_error():
    with pytest.raises(EmulationError, match="another way"):
        execute("setp.lt.u32 %p1, %r0, 5;\n@%p1 bra $END;\nmov.b32 %r1, 0;\n$END:", X)


def test_a_trap_is_an_error():
    with pytest.raises(EmulationError, match="trap"):
        execute("trap;", X)


# Two warps: each writes its numbers into shared memory, and reads those of the other.
EXCHANGE = """
    shl.b32 %r1, %r0, 2;
    xor.b32 %r2, %r1, 128;
    st.shared.b32 [%r1], %r0;
    bar.sync 0;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd0], %r3;
"""
TWO_WARPS = np.zeros(64, np.uint32)


@pytest.mark.parametrize("order", ["lockstep", "ascending", "descending", "random"])
def test_a_barrier_orders_warps(order):
    (after,), report = execute(EXCHANGE, TWO_WARPS, threads=64, shared=256, order=order)
    assert after.tolist() == [*range(32, 64), *range(32)]
    assert not report.races and not report.same_bytes


def test_a_missing_barrier_is_reported_and_shows_in_another_order():
    without = EXCHANGE.replace("bar.sync 0;", "")
    lockstep, report = execute(without, TWO_WARPS, threads=64, shared=256)
    assert {what for _, _, what, _ in report.races} == {"read of what another warp writes"}
    ascending, report = execute(without, TWO_WARPS, threads=64, shared=256, order="ascending")
    assert {what for _, _, what, _ in report.races} == {
        "read of what another warp writes",
        "write of what another warp reads",
    }
    assert not np.array_equal(lockstep, ascending)


@pytest.mark.parametrize("value, races, same", [("7", 0, 32), ("%r0", 32, 0)])
def test_equal_bytes_of_two_warps_are_no_race(value, races, same):
    body = f"and.b32 %r1, %r0, 31;\nshl.b32 %r1, %r1, 2;\nmov.b32 %r2, {value};\nst.shared.b32 [%r1], %r2;"
    for order in ("lockstep", "descending"):
        _, report = execute(body, TWO_WARPS, threads=64, shared=128, order=order)
        assert sum(report.races.values()) == races
        assert sum(report.same_bytes.values()) >= same and bool(report.same_bytes) == bool(same)


@pytest.mark.parametrize(
    "body, what",
    [
        ("ld.global.b32 %r1, [%rd9];\nst.global.b32 [%rd9], 0;", "write by one block, read by another"),
        ("mov.u32 %r1, %ctaid.x;\nst.global.b32 [%rd9], %r1;", "two blocks write different bytes"),
        ("ld.global.b32 %r1, [%rd9];\nred.global.gpu.relaxed.add.u32 [%rd9], 1;", "atomic by one block, read"),
        ("red.global.gpu.relaxed.add.u32 [%rd9], 1;", None),
    ],
)
def test_blocks_are_not_ordered(body, what):
    _, report = execute("ld.param.b64 %rd9, [probe_param_0];\n" + body, X, blocks=2)
    assert any(what in found for _, _, found, _ in report.races) if what else not report.races


def test_of_lanes_that_write_one_place_one_stays():
    (after,), report = execute("ld.param.b64 %rd9, [probe_param_0];\nst.global.b32 [%rd9], %r0;", X)
    assert after[0] in range(32)
    assert sum(report.ties.values()) == 31 and not report.races


def test_a_copy_arrives_when_it_is_waited_for():
    """Before, its place holds what it held; afterwards the other warp still needs a barrier."""
    body = """
        shl.b32 %r1, %r0, 2;
        st.shared.b32 [%r1], 5;
        cp.async.ca.shared.global [%r1], [%rd0], 4;
        cp.async.commit_group;
        {early}
        cp.async.wait_group 0;
        {barrier}
        xor.b32 %r2, %r1, 128;
        ld.shared.b32 %r3, [%r2];
        st.global.b32 [%rd1], %r3;
    """
    numbers = np.arange(64, dtype=np.uint32)

    def run(early: str, barrier: str) -> tuple[list[np.ndarray], set[str]]:
        after, report = execute(body.format(early=early, barrier=barrier), numbers, numbers, threads=64, shared=256)
        return after, {what for _, _, what, _ in report.races}

    after, races = run("", "bar.sync 0;")
    assert after[1].tolist() == [*range(32, 64), *range(32)] and not races
    assert run("", "")[1] == {"read of what another warp writes"}
    after, races = run("ld.shared.b32 %r4, [%r1];\nst.global.b32 [%rd0], %r4;", "bar.sync 0;")
    assert races == {"read of what a copy still brings"} and set(after[0].tolist()) == {5}
