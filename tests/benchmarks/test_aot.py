"""The recorder notes what a GPU would compile, the report is the assembler's, and the presets' kernels fit.

Under TRITON_INTERPRET, which the other tests of the kernels need, nothing can be compiled. So this file is also a
script: the tests run it in a process without that variable, and look at the facts that it writes down.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, bias, o, rows, wide, factor, flag, SIZE: tl.constexpr, BIAS: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + place, mask=place < rows).to(tl.float32) * factor + wide + flag
    if BIAS:
        value += tl.load(bias + place, mask=place < rows)
    tl.store(o + place, value, mask=place < rows)


@triton.jit
def hold_kernel(x, o, SIZE: tl.constexpr):
    """Every entry of a matrix is needed again after the sum of all."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + place)
    tl.store(o + place, value * tl.sum(value))


@triton.jit
def refused_kernel(o, SIZE: tl.constexpr):
    """A range whose length is no power of two does not compile."""
    tl.store(o + tl.arange(0, SIZE), 1.0)


# -- In the process without the interpreter ----------------------------------------------------------------------------


def record_launches(aot) -> dict:
    """Launches with all kinds of arguments."""
    from recording import record

    x, bias, o = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64), torch.full((64,), 7.0)
    with record(90) as launches:
        scale_kernel[(4,)](x, bias, o, 64, 2**40, 0.5, True, SIZE=16, BIAS=True, num_warps=2, num_stages=5)
        scale_kernel[(4,)](x[1:], None, o, 1, 17, 2, False, SIZE=16, BIAS=False)
        scale_kernel[lambda meta: (4,)](x, bias, o, 128, 2**50, 0.25, True, 16, True, num_warps=2, num_stages=5)
        scale_kernel[(4,)](x[1:], bias, o, 64, 2**40, 0.5, True, SIZE=16, BIAS=True, num_warps=2, num_stages=5)
    return {
        "types": [launch.types() for launch in launches],
        "constexprs": [launch.constexprs() for launch in launches],
        "options": [(launch.options.num_warps, launch.options.num_stages) for launch in launches],
        "table": aot.render([aot.Case(x, {("tiny", "bf16", "train")}) for x in launches[2:]], [aot.Usage()] * 2),
        "same binary": [launch.key == launches[0].key for launch in launches],
        "o": o.unique().tolist(),
        "driver": str(triton.runtime.driver._active),
        "compiler": triton.runtime.jit.JITFunction._do_compile.__name__,
    }


def run_with_an_old_triton(aot) -> None:
    """Ends the process."""
    triton.__version__ = "3.4.0"
    aot.main(["--presets", "tiny"])


def measure_probes(aot) -> dict:
    """What kernels with known properties take, and what is said of it."""
    from recording import record

    matrix, launches = torch.zeros(128, 128), []
    for target in aot.TARGETS:
        with record(target) as recorded:
            hold_kernel[(1,)](matrix, matrix, SIZE=16, num_warps=1)
            hold_kernel[(1,)](matrix, matrix, SIZE=128, num_warps=1)
        launches += recorded
    with record(90) as recorded:
        refused_kernel[(1,)](matrix, SIZE=24)
    launches += recorded
    cases = [aot.Case(launch, {("tiny", "fp32", "train")}) for launch in launches]
    usages = aot.measure_all(launches, processes=2)
    facts = {
        "usages": [vars(usage) for usage in usages],
        "cuobjdump": [read_with_cuobjdump(launch) for launch in launches[:-1]],
        "problems": aot.find_problems(cases, usages),
        "table": aot.render(cases, usages),
        "names": aot.names(aot.render(cases, usages)),
        "names without measuring": aot.names(aot.render(cases, [aot.Usage()] * len(cases))),
        "too much shared memory": aot.find_problems(cases[:1], [aot.Usage(registers=32, shared=163 * 1024 + 1)]),
        "too much tensor memory": aot.find_problems(cases[4:5], [aot.Usage(registers=32, tensor_memory=513)]),
        "a trap": aot.find_problems(cases[4:5], [aot.Usage(registers=4)]),
        "too slow": vars(aot.measure(launches[1], time_limit=0.001)),
        "all that a block has": aot.find_problems(
            [cases[0], cases[4]],
            [aot.Usage(registers=32, shared=163 * 1024), aot.Usage(registers=32, tensor_memory=512)],
        ),
    }
    aot.SPILL_LIMITS["hold_kernel"] = {("fp32", 80): usages[1].spill_stores}
    facts["problems when a spill is allowed"] = aot.find_problems(cases[:2], usages[:2])
    aot.LONG_CHUNK_SPILL_LIMITS["hold_kernel"] = {("fp32", 80): 7}
    long, both = {("tiny", "fp32", "train long chunks")}, {("tiny", "fp32", phase) for phase in aot.PHASES}
    facts["limits by users"] = [aot.spill_limit(aot.Case(launches[1], users)) for users in (long, both)]
    return facts


def read_with_cuobjdump(launch) -> tuple[int, int]:
    """Registers and bytes of stack, by the tool that reads them from the binary (the table has them from the log)."""
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", launch.target, 32)
    Path("probe.cubin").write_bytes(triton.compile(source, target, launch.options.__dict__).asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "probe.cubin"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    words = dict(word.split(":", 1) for word in report.split() if word.startswith(("REG:", "STACK:")))
    return int(words["REG"]), int(words["STACK"])


def measure_presets(aot) -> dict:
    """All kernels by name, and some of them compiled: the whole table takes too long for a test."""
    cases, refused = aot.collect(aot.PRESETS, aot.DTYPES, aot.TARGETS)
    chosen = [case for case in cases if is_compiled_in_tests(case)]
    usages = aot.measure_all([case.launch for case in chosen])
    return {
        "names": aot.names(aot.render(cases, [aot.Usage()] * len(cases), refused)),
        "names in the file": aot.names(aot.TABLE.read_text(encoding="utf-8")),
        "phases": list(aot.PHASES),
        "with an anchor in training": sorted({case.launch.name for case in cases if trains_with_an_anchor(case)}),
        "kernels": sorted({case.launch.name for case in cases}),
        "spill limits": [*aot.SPILL_LIMITS, *aot.LONG_CHUNK_SPILL_LIMITS, *aot.PRESET_SPILL_LIMITS],
        "compiled": [[case.launch.name, case.launch.target, sorted(case.users)] for case in chosen],
        "problems": aot.find_problems(chosen, usages),
    }


def list_scans(aot) -> dict:
    """The types of the tensors that the kernels of the preset with momentum and forget gate scan, for sm_90."""
    cases, _ = aot.collect(["titans-150m"], ["bf16"], [90])
    scanned = [re.findall(r'"tt\.scan".*?\}\) : \((.*?)\)', first_ir(case.launch), re.DOTALL) for case in cases]
    return {"scanned": {case.launch.name: types for case, types in zip(cases, scanned, strict=True)}}


def first_ir(launch) -> str:
    """What Triton makes of a kernel's source, before any pass."""
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    target = triton.backends.compiler.GPUTarget("cuda", launch.target, 32)
    backend = triton.compiler.make_backend(target)
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(launch.options), backend.get_module_map()
    return str(source.make_ir(target, launch.options, functions, modules, context))


def measure_projections(aot) -> dict:
    """What the projection within chunks takes on sm_100 in bf16, forward and backward: no preset has it."""
    from recording import SHARED_LIMITS, record

    from modeling_tnt.kernels import MemoryParams, local_memory
    from modeling_tnt.kernels.fused.limits import assume_device

    q, k, v = (torch.zeros(1, 9, 1, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with record(100) as launches, assume_device((10, 0), SHARED_LIMITS[100]):
        o, _ = local_memory(
            q, k, v, torch.zeros(1, 9, 1), MemoryParams(torch.zeros(1, 64, 64)),
            chunk_size=8, qk_projection="chunk", backend="triton",
        )  # fmt: skip
        o.sum().backward()
    projections = [launch for launch in launches if launch.name.startswith("projection")]
    usages = aot.measure_all(projections, processes=1)
    return {"errors": {launch.name: usage.error for launch, usage in zip(projections, usages, strict=True)}}


def trains_with_an_anchor(case) -> bool:
    """Whether training needs the binary, and it holds a chunk's anchor beside the state."""
    return case.launch.constexprs().get("MULTI") == "True" and any(
        phase.startswith("train") for *_, phase in case.users
    )


def is_compiled_in_tests(case) -> bool:
    """For sm_90 what tnt-150m and ttt-linear-125m need in bf16; the latter's forward for other targets and in fp32."""
    if case.launch.target == 90 and {("tnt-150m", "bf16"), ("ttt-linear-125m", "bf16")} & {u[:2] for u in case.users}:
        return True
    return case.launch.name == "forward_kernel" and any(
        preset == "ttt-linear-125m" and phase == "train" and (dtype == "bf16" or case.launch.target == 90)
        for preset, dtype, phase in case.users
    )


# -- In the process of the tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(in_other_process, tmp_path_factory):
    return in_other_process(record_launches, tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="module")
def probes(in_other_process, tmp_path_factory):
    return in_other_process(measure_probes, tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module")
def presets(in_other_process, tmp_path_factory):
    return in_other_process(measure_presets, tmp_path_factory.mktemp("presets"))


def test_a_recorded_launch_has_the_types_that_a_gpu_would_see(recorded):
    aligned, unaligned, *_ = recorded["types"]
    assert aligned == {
        "x": "*bf16/16", "bias": "*fp32/16", "o": "*fp32/16",
        "rows": "i32/16", "wide": "i64/16", "factor": "fp32", "flag": "u1",
    }  # fmt: skip
    assert unaligned == {"x": "*bf16", "o": "*fp32/16", "wide": "i32", "factor": "i32", "flag": "u1"}


def test_one_and_none_are_constants(recorded):
    with_bias, without, *_ = recorded["constexprs"]
    assert with_bias == {"SIZE": "16", "BIAS": "True"}
    assert without == {"bias": "None", "rows": "1", "SIZE": "16", "BIAS": "False"}


def test_options_are_those_of_the_launch(recorded):
    assert recorded["options"][0] == [2, 5]
    assert recorded["options"][1] == [4, 3]


def test_values_and_grid_make_no_other_binary(recorded):
    assert recorded["same binary"] == [True, False, True, False]


def test_the_table_tells_binaries_apart_by_types_where_constants_do_not(recorded):
    lines = recorded["table"].splitlines()
    assert "In every variant: SIZE=16 BIAS" in lines
    assert {"1. tiny (train): x=*bf16", "2. tiny (train): x=*bf16/16"} <= set(lines)


def test_recording_runs_nothing_and_leaves_triton_as_it_was(recorded):
    assert recorded["o"] == [7.0]
    assert (recorded["driver"], recorded["compiler"]) == ("None", "_do_compile")


@pytest.mark.slow
def test_an_old_triton_is_told_so(tmp_path):
    command = [sys.executable, str(Path(__file__).resolve()), run_with_an_old_triton.__name__, "facts.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "error: this needs triton 3.6 or newer, found 3.4.0; pip install 'triton>=3.6'"
    )


def test_a_kernel_that_spills_is_seen_to_spill(probes):
    for small, large in (probes["usages"][i : i + 2] for i in (0, 2, 4)):
        assert small["registers"] > 0
        assert small["spill_stores"] == small["spill_loads"] == small["stack"] == 0
        assert min(large["spill_stores"], large["spill_loads"], large["stack"]) > 512  # it holds 2 KiB a thread


def test_the_log_and_the_binary_agree(probes):
    assert [[usage["registers"], usage["stack"]] for usage in probes["usages"][:-1]] == probes["cuobjdump"]


def test_problems_name_the_kernel_and_the_limit(probes):
    *spills, refused = probes["problems"]
    assert [f"on sm_{target} " in problem for target, problem in zip((80, 90, 100), spills, strict=True)] == [True] * 3
    assert "hold_kernel" in spills[0] and "SIZE=128" in spills[0] and "of which 0 are allowed" in spills[0]
    assert "refused_kernel on sm_90" in refused and "power of 2" in refused
    assert probes["problems when a spill is allowed"] == []
    assert probes["limits by users"] == [7, probes["usages"][1]["spill_stores"]]
    (shared,) = probes["too much shared memory"]
    assert "needs 166913 B of shared memory, of which a block has 166912" in shared
    (tensor_memory,) = probes["too much tensor memory"]
    assert "on sm_100 " in tensor_memory
    assert "needs 513 columns of tensor memory, of which a block has 512" in tensor_memory
    (trap,) = probes["a trap"]
    assert "has 4 registers: the compiler made a trap of it" in trap
    assert probes["all that a block has"] == []


def test_compiling_has_a_time_limit(probes):
    assert "compiling took longer than 0.001 s" in probes["too slow"]["error"]
    assert probes["too slow"]["seconds"] < 60


def test_the_table_has_a_row_for_each_binary(probes):
    table, large = probes["table"], probes["usages"][3]
    usage = (
        f"{large['registers']} | {large['spill_stores']} / {large['spill_loads']} | {large['stack']} | 0 | 232448 | 0"
    )
    assert "1. tiny (train): SIZE=128" in table.splitlines()
    assert f"| 1 | fp32 | sm_90 | 1 | 3 | {usage} |" in table.splitlines()
    assert table.count("| fp32 | sm_") == 7
    assert "| fails |" in table


def test_names_of_a_table_do_not_depend_on_what_was_measured(probes):
    assert probes["names"] == probes["names without measuring"]
    assert {"## hold_kernel", "## refused_kernel", "2. tiny (train): SIZE=16"} <= set(probes["names"])


def test_no_kernel_scans_a_single_column(in_other_process, tmp_path):
    """Triton 3.4 to 3.6 end in an assertion there; tests run under a newer one."""
    scanned = in_other_process(list_scans, tmp_path)["scanned"]
    assert scanned.keys() >= {"forward_kernel", "recompute_kernel", "backward_kernel"}
    assert "tensor<16x16xf32>" in scanned["recompute_kernel"]  # so that a scan is seen at all
    assert not [types for types in scanned.values() if any("x1xf" in kind for kind in types)], scanned


def test_a_projection_within_chunks_compiles_where_sums_are_kept_in_tensor_memory(in_other_process, tmp_path):
    """The compiler fails on a sum there that a branch of the loop replaces by zeros."""
    errors = in_other_process(measure_projections, tmp_path)["errors"]
    names = ("projection_kernel", "projection_queries_kernel", "projection_keys_kernel")
    assert errors == dict.fromkeys(names)


def test_the_kernels_of_the_presets_fit(presets):
    assert not presets["problems"], "\n\n".join(presets["problems"])


def test_what_is_compiled_here_covers_every_target_and_dtype(presets):
    assert {target for _, target, _ in presets["compiled"]} == {80, 90, 100}
    assert {dtype for _, _, users in presets["compiled"] for _, dtype, _ in users} == {"bf16", "fp32"}
    assert {phase for _, _, users in presets["compiled"] for _, _, phase in users} == set(presets["phases"])


def test_training_with_chunks_of_several_tiles_is_in_the_table(presets):
    assert presets["with an anchor in training"] == ["backward_kernel", "forward_kernel", "recompute_kernel"]


def test_spill_limits_name_kernels_that_exist(presets):
    assert set(presets["spill limits"]) <= set(presets["kernels"])


def test_the_table_in_the_repository_is_of_these_kernels(presets):
    assert presets["names in the file"] == presets["names"], "run python tests/benchmarks/aot.py --write"


if __name__ == "__main__":
    import aot as _aot

    functions = (
        record_launches, run_with_an_old_triton, measure_probes, list_scans, measure_projections, measure_presets
    )  # fmt: skip
    chosen = {f.__name__: f for f in functions}[sys.argv[1]]
    Path(sys.argv[2]).write_text(json.dumps(chosen(_aot)))
