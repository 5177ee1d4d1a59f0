"""The counter counts, the model of a multiprocessor obeys what it is made of, and a small kernel goes all the way.

Nothing compiles under TRITON_INTERPRET, which the tests of the kernels need, so the last part runs this file as a
script in a process without that variable, as test_aot.py does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # predict, aot and prediction stand beside this file and belong to no package

import predict  # noqa: E402
from prediction import parts, sass, sm_model  # noqa: E402
from prediction.card import H100  # noqa: E402
from prediction.cases import LAYERS, OPERATIONS  # noqa: E402
from prediction.timing import Timing  # noqa: E402
from prediction.ttir import Pointer, Program  # noqa: E402


def listing(*lines: str) -> sass.Listing:
    """A listing as nvdisasm writes it, of instructions and labels."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return sass.parse("\n".join(text))


def program(*lines: str) -> list[sass.Instruction]:
    return listing(*lines).instructions


# -- The listing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, reads, writes",
    [
        ("FADD R1, R2, -R3", {"R2", "R3"}, {"R1"}),
        ("@!P0 FADD R1, R2, R3", {"P0", "R2", "R3"}, {"R1"}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {f"R{i}" for i in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13)},
         {"R4", "R5", "R6", "R7"}),
        ("LDS.128 R4, [R2+0x10]", {"R2"}, {"R4", "R5", "R6", "R7"}),
        ("LDG.E.64 R6, desc[UR4][R2.64+0x8]", {"UR4", "R2", "R3"}, {"R6", "R7"}),
        ("STG.E.128 desc[UR4][R2.64], R8", {"UR4", "R2", "R3", "R8", "R9", "R10", "R11"}, set()),
        ("LDSM.16.M88.4 R4, [R2]", {"R2"}, {"R4", "R5", "R6", "R7"}),
        ("SHFL.BFLY PT, R1, R2, 0x8, 0x1f", {"R2"}, {"R1"}),
        ("ISETP.GE.AND P0, PT, R1, R2, PT", {"R1", "R2"}, {"P0"}),
        ("IMAD.WIDE R2, R4, 0x4, R6", {"R4", "R6", "R7"}, {"R2", "R3"}),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", set(), set()),
    ],
)  # fmt: skip
def test_registers_of_an_instruction(text, reads, writes):
    instruction = sass.parse_instruction(0, text)
    assert (set(instruction.reads), set(instruction.writes)) == (reads, writes)


def test_a_wgmma_writes_half_a_register_a_column():
    instruction = sass.parse_instruction(0, "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")
    assert instruction.kind == "HGMMA" and sass.wgmma_columns(instruction.opcode) == 32
    assert instruction.writes == tuple(f"R{24 + i}" for i in range(16))


def test_kinds_are_counted():
    body = program(
        "FADD R1, R2, R3", "FFMA R1, R2, R3, R4", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.EX2 R1, R1",
        "LDS R1, [R2]", "LDSM.16.M88.4 R4, [R2]", "BAR.SYNC 0x0", "IADD3 R1, R2, R3, RZ",
    )  # fmt: skip
    assert sass.count_kinds(body) == {
        "FLOAT": 2, "HMMA": 1, "MUFU": 1, "LDS": 1, "LDSM": 1, "BAR": 1, "INTEGER": 1,
    }  # fmt: skip


NESTED = (
    "MOV R0, RZ", ".L_x_1:", "IADD3 R1, R1, R2, RZ", ".L_x_2:", "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P0 BRA `(.L_x_2)", "FADD R1, R2, R3", "@P1 BRA `(.L_x_1)", ".L_x_3:", *["FADD R9, R9, R9"] * 9,
    "@P2 BRA `(.L_x_3)", "EXIT",
)  # fmt: skip


def test_the_hot_loop_is_the_innermost_with_all_products():
    assert listing(*NESTED).loops() == [range(2, 4), range(1, 6), range(6, 16)]
    assert listing(*NESTED).hot_loop() == range(2, 4)


def test_without_products_the_longest_innermost_loop_is_hot():
    assert listing(*(line.replace("HMMA.16816.F32.BF16", "FFMA") for line in NESTED)).hot_loop() == range(6, 16)
    assert listing("FADD R1, R2, R3", "EXIT").hot_loop() is None


@pytest.mark.parametrize("skipped, run", [(sass.RARE_SKIP, 62), (sass.RARE_SKIP + 1, 2)])
def test_only_long_skips_are_taken(skipped, run):
    code = listing("@P0 BRA `(.L_x_1)", *["FADD R1, R2, R3"] * skipped, ".L_x_1:", "EXIT")
    assert len(code.straight(range(skipped + 2))) == run


# -- The model ---------------------------------------------------------------------------------------------------------


def once(*lines: str, warps: int = 4, blocks: int = 1) -> float:
    return sm_model.estimate(program(*lines), warps=warps, blocks=blocks, loop=False).cycles


@pytest.mark.parametrize(
    "text, kind",
    [
        ("FADD R1, R1, R2", "FLOAT"),
        ("SHFL.BFLY PT, R1, R1, 0x8, 0x1f", "SHFL"),
        ("LDG.E R1, desc[UR4][R1.64]", "LDG"),
        ("MUFU.EX2 R1, R1", "MUFU"),
    ],
)
def test_a_dependent_chain_costs_the_sum_of_latencies(text, kind):
    assert once(*[text] * 10) == 9 * sm_model.LATENCY[kind] + 1


def test_independent_instructions_overlap():
    loads = [f"LDG.E R{10 + i}, desc[UR4][R2.64]" for i in range(10)]
    assert once(*loads, "FADD R1, R19, R19") == 9 * sm_model.INTERVAL["LDG"] + sm_model.LATENCY["LDG"] + 1
    assert once(*[f"FADD R{i}, R30, R31" for i in range(10)]) == 10


def test_a_unit_takes_its_interval():
    products = [f"HMMA.16816.F32.BF16 R{4 * i}, R100, R104, R{4 * i}" for i in range(10)]
    assert once(*products) == pytest.approx(9 * sm_model.INTERVAL["HMMA"] + 1)


def test_more_warps_hide_latency():
    chain = program(*["FADD R1, R1, R2"] * 100)
    one, two, four = (sm_model.estimate(chain, warps=w).cycles for w in (4, 8, 16))
    assert one == pytest.approx(two, rel=0.02) and one == pytest.approx(four, rel=0.02)
    eight = sm_model.estimate(chain, warps=32).cycles  # there are four cycles to fill
    assert eight == pytest.approx(2 * four, rel=0.02)


def test_two_blocks_share_an_sm():
    chain = program("LDG.E R1, desc[UR4][R1.64]", *[f"FADD R{10 + i % 8}, R4, R5" for i in range(500)])
    alone, shared = (sm_model.estimate(chain, warps=4, blocks=n).cycles for n in (1, 2))
    assert alone <= shared < 2 * alone


def test_a_barrier_ends_a_phase_for_all_warps():
    work = ["FADD R1, R1, R2"] * 5
    assert once(*work, "BAR.SYNC 0x0", *work) > once(*work, *work)
    phases = [once(*(["FADD R1, R1, R2", "BAR.SYNC 0x0"] * n), warps=8) for n in (1, 2, 3)]
    assert phases[2] - phases[1] == phases[1] - phases[0] >= sm_model.BARRIER


def test_warps_wait_at_a_barrier_for_the_last():
    # The second warp of a scheduler gets its ten products of the slow unit later than the first.
    body = [*[f"MUFU.EX2 R{i}, R40" for i in range(10)], "BAR.SYNC 0x0"]
    assert once(*body, warps=8) >= once(*body, warps=4) + 10 * sm_model.INTERVAL["MUFU"] - 1


def test_asynchronous_products_are_waited_for():
    product = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    assert once(product, "FADD R1, R2, R3") < 10
    assert once(product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R1, R2, R3") > sm_model.WGMMA_LEAST


def test_copies_are_waited_for_by_group():
    """Two stages: the group before the last must have come, as in a pipelined loop."""
    copy = ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR")
    assert sass.kind_of(copy[0].split()[0]) == "COPY"
    work = [f"FADD R{10 + i % 8}, R5, R6" for i in range(400)]
    all_of_them = [*copy, *copy, "DEPBAR.LE SB0, 0x0"]
    but_one = [*copy, *work[:300], *copy, "DEPBAR.LE SB0, 0x1"]
    assert once(*all_of_them) == pytest.approx(sm_model.LATENCY["COPY"], abs=20)
    assert once(*but_one) == pytest.approx(sm_model.LATENCY["COPY"], abs=20)
    body = [*copy, *work, "DEPBAR.LE SB0, 0x1"]  # one iteration hides another's copies
    assert sm_model.estimate(program(*body), warps=4).cycles < 1.1 * sm_model.LATENCY["COPY"]
    body[-1] = "DEPBAR.LE SB0, 0x0"
    assert sm_model.estimate(program(*body), warps=4).cycles >= sm_model.LATENCY["COPY"]


def test_nothing_takes_no_time():
    assert sm_model.estimate([], warps=4).cycles == 0


def test_blocks_of_an_sm():
    assert H100.blocks_of(registers=255, warps=8, shared=70000) == 1
    assert H100.blocks_of(registers=128, warps=4, shared=0) == 4
    assert H100.blocks_of(registers=32, warps=4, shared=100 * 1024) == 2


# -- What a program does -----------------------------------------------------------------------------------------------

TTIR = """\
#loc = loc("k.py":1:0)
module {
  tt.func public @k(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %table: !tt.ptr<i64> loc("t"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i64 loc(#loc)
    %c1 = arith.constant 1 : i64 loc(#loc)
    %c3 = arith.constant 3 : i64 loc(#loc)
    %off = arith.constant 1 : i32 loc(#loc)
    %c-1_i32 = arith.constant -1 : i32 loc(#loc)
    %zero = arith.constant dense<0.000000e+00> : tensor<16x64xf32> loc(#loc)
    %up = arith.subi %off, %c-1_i32 : i32 loc(#loc)
    %one = arith.addi %up, %c-1_i32 : i32 loc(#loc)
    %p = tt.addptr %table, %one : !tt.ptr<i64>, i32 loc(#loc)
    %count = tt.load %p : !tt.ptr<i64> loc(#loc)
    %s = tt.splat %x : !tt.ptr<bf16> -> tensor<16x64x!tt.ptr<bf16>> loc(#loc)
    %empty = arith.cmpi sle, %count, %c0 : i64 loc(#loc)
    cf.cond_br %empty, ^bb1, ^bb2 loc(#loc)
  ^bb1:  // pred: ^bb0
    tt.return loc(#loc)
  ^bb2:  // pred: ^bb0
    %r:2 = scf.for %i = %c0 to %count step %c1 iter_args(%acc = %zero, %k = %c0) -> (tensor<16x64xf32>, i64)  : i64 {
      %m = arith.remsi %i, %c3 : i64 loc(#loc)
      %rare = arith.cmpi eq, %m, %c0 : i64 loc(#loc)
      scf.if %rare {
        tt.store %s, %acc : tensor<16x64x!tt.ptr<bf16>> loc(#loc)
      } loc(#loc)
      %a = tt.load %s, %mask, %zero : tensor<16x64x!tt.ptr<bf16>> loc(#loc)
      %d = tt.dot %a, %b, %acc, inputPrecision = tf32x3 : tensor<16x64xbf16> * tensor<64x32xbf16> -> tensor<16x32xf32> loc(#loc)
      %red = "tt.reduce"(%d) <{axis = 1 : i32}> ({
      ^bb0(%u: f32 loc(#loc), %w: f32 loc(#loc)):
        %sum = arith.addf %u, %w : f32 loc(#loc)
        tt.reduce.return %sum : f32 loc(#loc)
      }) : (tensor<16x32xf32>) -> tensor<16xf32> loc(#loc)
      %next = arith.addi %k, %c3 : i64 loc(#loc)
      scf.yield %d, %next : tensor<16x64xf32>, i64 loc(#loc)
    } loc(#loc)
    scf.for %j = %c0 to %r#1 step %c3 : i64 {
      %q = tt.load %s : tensor<64x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def test_bytes_products_and_loops_of_a_program():
    work = Program(TTIR).run({"table": Pointer([9, 5])}, (1, 1, 1))
    tile = 16 * 64 * 2
    assert work.trips == 5
    assert work.operations == 5 * 2 * 16 * 64 * 32
    assert work.written == 2 * tile  # in the passes 0 and 3
    assert work.read == 8 + 5 * tile + 5 * 64 * 4  # the table's entry; tiles; the second loop runs 15 / 3 times


def test_a_program_that_has_nothing_to_do_returns_early():
    work = Program(TTIR).run({"table": Pointer([9, 0])}, (1, 1, 1))
    assert (work.trips, work.read, work.written) == (0, 8, 0)


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="how often a loop"):
        Program(TTIR).run({"table": Pointer(None)}, (1, 1, 1))


# -- A small kernel, all the way ---------------------------------------------------------------------------------------


@triton.jit
def product_kernel(x, w, o, rows, SIZE: tl.constexpr):
    """o = x w, tile by tile: one program for each block of 16 · 8 rows."""
    column = tl.arange(0, SIZE)
    weights = tl.load(w + column[:, None] * SIZE + column[None, :])
    for tile in range(0, tl.minimum(8, tl.cdiv(rows - tl.program_id(0) * 128, 16))):
        place = (tl.program_id(0) * 128 + tile * 16 + tl.arange(0, 16))[:, None] * SIZE + column[None, :]
        tl.store(o + place, tl.dot(tl.load(x + place), weights).to(tl.bfloat16))


@triton.autotune([triton.Config({"SIZE": size}, num_warps=4) for size in (32, 1024)], key=[])
@triton.jit
def tuned_kernel(x, o, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(o + place, tl.load(x + place))


def predict_tuned(times, recording) -> dict:
    """An autotuned copy, whose small blocks take many waves."""
    x = torch.zeros(2**22)
    with recording.record_calls(90, only_operators=True) as recorded:
        tuned_kernel[lambda meta: (triton.cdiv(x.numel(), meta["SIZE"]),)](x, torch.empty_like(x))
    binaries = times.compile_all(recorded.calls, H100, processes=1)
    timings = times.Predictor(H100, binaries).predict(recorded.calls)
    return {"grids": [call.grid for call in recorded.calls], "timings": [vars(t) for t in timings]}


def predict_small(times, recording) -> dict:
    """Recorded, compiled and timed at two lengths, beside a product of torch in an operator and one outside."""

    @torch.library.custom_op("predict_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(torch.bfloat16)
        return torch.mm(x, x) + torch.mm(narrow.float(), narrow.float())

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    found = {}
    for rows in (1024, 48):
        x, w = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
        with recording.record_calls(90, only_operators=True) as recorded:
            large = torch.ones(1024, 1024)
            result = torch.ops.predict_test.twice(large)
            torch.mm(large, large)
            product_kernel[lambda meta: (triton.cdiv(meta["rows"], 128),)](x, w, torch.empty_like(x), rows, SIZE=64)
        kernels = [call for call in recorded.calls if isinstance(call, recording.KernelCall)]
        binaries = times.compile_all(kernels, H100, processes=1)
        timings = times.Predictor(H100, binaries).predict(recorded.calls)
        found[rows] = {
            "timings": [vars(t) for t in timings], "grid": kernels[0].grid, "shape": list(result.shape),
            "kinds": next(iter(binaries.values())).instructions, "registers": next(iter(binaries.values())).registers,
        }  # fmt: skip
    return found | {"tuned": predict_tuned(times, recording)}


@pytest.fixture(scope="module")
def small(in_other_process, tmp_path_factory) -> dict:
    return in_other_process(predict_small, tmp_path_factory.mktemp("predicted"))


def test_a_kernel_is_timed_by_what_it_does(small):
    (*_, kernel), grid = small["1024"]["timings"], small["1024"]["grid"]
    assert (kernel["name"], grid, kernel["programs"], kernel["trips"]) == ("product_kernel", [8, 1, 1], 8, 8)
    assert kernel["operations"] == 2 * 1024 * 64 * 64
    assert kernel["moved"] == 2 * 1024 * 64 * 2 + 8 * 64 * 64 * 2  # rows read and written, weights once a program
    assert small["1024"]["kinds"].get("HMMA", 0) + small["1024"]["kinds"].get("HGMMA", 0) > 0
    # Loads of the next tiles are under way, so that a tile takes about one of them, or less.
    assert 100 < kernel["cycles"] < 2 * sm_model.LATENCY["LDG"]
    assert kernel["seconds"] > H100.launch + 8 * kernel["cycles"] / H100.clock
    assert 0 < small["1024"]["registers"] <= 255


def test_a_shorter_call_walks_fewer_tiles(small):
    long, short = (small[rows]["timings"][-1] for rows in ("1024", "48"))
    assert (short["programs"], short["trips"]) == (1, 3)
    assert short["seconds"] < long["seconds"]


def test_of_an_autotuned_kernel_the_fastest_configuration_counts(small):
    (tuned,), grids = small["tuned"]["timings"], small["tuned"]["grids"]
    assert grids == [[2**17, 1, 1], [2**12, 1, 1]]
    assert (tuned["programs"], tuned["bound"], tuned["moved"]) == (2**12, "memory", 2**25)


def test_operations_of_torch_are_counted_in_operators_and_not_computed(small):
    copy, product, narrow, add, _ = small["1024"]["timings"]
    assert (copy["name"], product["name"], product["operations"], add["name"]) == ("_to_copy", "mm", 2 * 1024**3, "add")
    assert product["moved"] == 3 * 4 * 1024**2
    # Its operands are widened here; CUDA multiplies narrow ones.
    assert (narrow["name"], narrow["operations"], narrow["moved"]) == ("mm", 2 * 1024**3, (2 * 2 + 4) * 1024**2)
    assert product["operator"] == "predict_test::twice" and product["bound"] == "products"
    assert small["1024"]["shape"] == [1024, 1024]


# -- Parts of a row ----------------------------------------------------------------------------------------------------


def record_middle(times, recording) -> dict:
    """The middle rank's part, recorded but not compiled: the calls of its operators, and its stamps."""
    found = parts.record_part(parts.PartCase("tnt-150m", 4096, middle=True), H100.target)
    operators = [call.operator for call in found.recording.calls]
    return {"operators": operators, "passes": [[list(stamp) for stamp in stamps] for stamps in found.passes]}


def test_the_global_memory_lies_between_its_messages(in_other_process, tmp_path):
    found = in_other_process(record_middle, tmp_path)
    for stamps in found["passes"]:
        at = {(kind, "memory global" in what): place for kind, place, what in stamps}
        operators = found["operators"][at["begin", False] : at["end", False]]
        own = [at["begin", False] + i for i, operator in enumerate(operators) if "::global" in operator]
        assert at["wait", True] <= own[0] <= own[-1] < at["send", True] < at["end", False]
        assert any("::fused" in operator for operator in operators)
    (first, second), count = found["passes"], len(found["operators"])
    assert (first[-1][1], second[-1][1]) == (second[0][1], count)


def test_times_of_a_part():
    """Ten calls: the fourth and fifth are the global memory's in the forward pass, the eighth in the backward pass."""
    forward = [parts.Stamp("begin", 0), parts.Stamp("wait", 3, "memory global of"),
               parts.Stamp("send", 5, "memory global of"), parts.Stamp("end", 6)]  # fmt: skip
    backward = [parts.Stamp("begin", 6), parts.Stamp("wait", 7, "memory global of"),
                parts.Stamp("send", 8, "memory global of"), parts.Stamp("end", 10)]  # fmt: skip
    timings = [timing("a", "", float(ms)) for ms in range(1, 11)]
    whole = [parts.Stamp("begin", 0), parts.Stamp("end", 4)], [parts.Stamp("begin", 4), parts.Stamp("end", 10)]
    recordings = [
        parts.PartRecording(parts.PartCase("tnt-150m", 2048, middle=True), None, (forward, backward)),
        parts.PartRecording(parts.PartCase("tnt-150m", 1024, ends=True), None, whole),
        parts.PartRecording(parts.PartCase("tnt-150m", 2048), None, whole),
    ]
    of_middle, of_whole = (
        parts.part_times(recordings, [timings] * 3, "tnt-150m", middle)[2048] for middle in (True, False)
    )
    assert of_middle.forward.before == pytest.approx(6e-3)
    assert of_middle.forward.serial == pytest.approx((9e-3,)) and of_middle.forward.after == pytest.approx(6e-3)
    assert of_middle.backward.serial == pytest.approx((8e-3,)) and of_middle.backward.after == pytest.approx(19e-3)
    assert (of_middle.ends_forward, of_middle.ends_backward) == pytest.approx((20e-3, 90e-3))  # of twice as many tokens
    assert of_whole.forward.total == pytest.approx(10e-3) and of_whole.backward.total == pytest.approx(45e-3)


# -- What is written ---------------------------------------------------------------------------------------------------


def timing(name: str, operator: str, ms: float, kernel: bool = True, **more) -> Timing:
    return Timing(name, operator, ms / 1e3, int(ms * 1e9), 0, kernel, "latency", **more)


LAYER = predict.Result(
    LAYERS[0],
    [
        timing("forward_kernel", "x::fused_forward", 4.0, warps=8, blocks=1, cycles=7400.0, trips=256, programs=384,
               waves=3, stalls={"BAR": 0.5}),
        timing("advance_kernel", "x::global_forward", 1.0),
        timing("bmm", "x::global_backward", 3.0, kernel=False),
    ],
)  # fmt: skip


def cells(table: str, row: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[2 + row].strip("|").split("|")]


def test_a_layer_is_the_sum_of_its_memories():
    row = dict(zip(predict._LAYER_COLUMNS, cells(predict.layer_table([LAYER]), 0), strict=True))
    assert (row["local, ms"], row["global, ms"], row["together, ms"]) == ("4.0", "4.0", "8.0")
    assert row["launches: Triton + torch"] == "2 + 1"
    assert row["tokens/s"] == "8.2M"  # 65,536 in 8 ms
    # 52 D M and the chunk's products and the projection of the local memory, 52 D M of the global one; 12 heads.
    share = float(row["of bf16 peak"].rstrip("%")) / 100
    assert share == pytest.approx((2 * 52 * 64 * 128 + 8 * 8 * 2 * 192 + 10 * 64**2 + 14 * 8 * 64)
                                  * 12 * 65536 / 8e-3 / 989e12, abs=6e-4)  # fmt: skip
    low, high = (7 * 32768 * 64 * 12 * 65536 / rate * 1e3 for rate in (410e12, 300e12))
    assert row["FlashAttention, ms"] == f"{low:.0f} to {high:.0f}"
    assert row["times its speed"] == f"{low / 8:.1f} to {high / 8:.1f}"


def test_kernels_stand_by_their_time():
    table = predict.kernel_table(LAYER)
    assert [cells(table, i)[0] for i in range(3)] == ["forward_kernel", "torch: bmm", "advance_kernel"]
    assert cells(table, 0) == [
        "forward_kernel", "1", "8", "1", "384", "3", "256", "7,400", "4.00", "4.00", "latency", "BAR 50%",
    ]  # fmt: skip


def test_what_is_not_predicted_says_why():
    missing = [predict.Result(LAYERS[1], [], "too large"), predict.Result(OPERATIONS[-1], [], "no module")]
    text = predict.render([LAYER, *missing], seconds=1)
    assert "| tnt-150m | 16 | not predicted |" in text
    assert "- tnt-150m, C = 16: too large" in text
    assert "- fla linear, C = 8, forward: no module" in text
    assert predict.stored(missing)["predictions"] == []


def test_a_part_is_not_written(capsys):
    with pytest.raises(SystemExit):
        predict.main(["--write", "--layers", "tnt-150m"])
    assert "leave out --layers" in capsys.readouterr().err


def test_a_table_goes_between_its_marks():
    text = f"before\n{predict.BEGIN}\nold\n{predict.END}\nafter\n"
    new = predict.put_between_marks(text, "new")
    assert new == f"before\n{predict.BEGIN}\nnew\n{predict.END}\nafter\n"
    with pytest.raises(ValueError, match="must have the lines"):
        predict.put_between_marks("nothing", "new")


def test_the_files_in_the_repository_have_every_case():
    """Figures may be of older kernels, but no case is missing."""
    readme = predict.README.read_text(encoding="utf-8").partition(predict.BEGIN)[2].partition(predict.END)[0]
    for text in (readme, predict.TABLE.read_text(encoding="utf-8")):
        for case in LAYERS:
            assert f"| {case.name} | {case.chunk_size} |" in text, "run python tests/benchmarks/predict.py --write"
    kept = json.loads(predict.STORED.read_text(encoding="utf-8"))["predictions"]
    names = {(p["contender"], p["memory"], p["chunk_size"], p["mode"]) for p in kept}
    ours = {(c.contender, c.memory, c.chunk_size, c.mode) for c in OPERATIONS if c.contender != "fla"}
    assert ours <= names


if __name__ == "__main__":
    from prediction import recording as _recording
    from prediction import timing as _timing

    (chosen,) = (f for f in (predict_small, record_middle) if f.__name__ == sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(chosen(_timing, _recording)))
