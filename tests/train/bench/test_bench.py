"""`tnt bench` at sizes that take no time: what it measures, writes and prints, and what it does when a part fails."""

from __future__ import annotations

import csv
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from modeling_tnt import TNTConfig, TNTForCausalLM
from modeling_tnt.kernels import local_memory
from modeling_tnt.train.bench import contenders, gate, kernels, model, timing
from modeling_tnt.train.bench.arguments import KernelBenchArguments, ModelBenchArguments
from modeling_tnt.train.bench.contenders import Attention, Case, FlaTttLinear
from modeling_tnt.train.bench.crossover import find_crossover, summarize_crossovers
from modeling_tnt.train.bench.gate import Gate, worst_error
from modeling_tnt.train.bench.predicted import load_predictions
from modeling_tnt.train.bench.rows import ModelRow
from modeling_tnt.train.bench.session import Session
from modeling_tnt.train.bench.timing import expected_seconds, measure
from modeling_tnt.train.cli import main
from modeling_tnt.train.common import machine
from modeling_tnt.train.common import timing as attempt
from modeling_tnt.train.common.costs import (
    BOTH,
    FORWARD,
    attention_bytes,
    attention_operations,
    memory_bytes,
    memory_operations,
)
from modeling_tnt.train.common.models import build_llama, make_llama_config, make_titans_config

BENCH_MEMORY = Path(__file__).parents[2] / "benchmarks" / "bench_memory.py"
CPU = torch.device("cpu")
KERNELS = [
    "bench", "kernels", "--device", "cpu", "--backends", "torch", "--peers", "none", "--memories", "mlp",
    "--heads", "1", "--head-dim", "16", "--shard-length", "32", "--lengths", "32", "64", "--tokens", "64",
    "--chunk-sizes", "16", "--case-seconds", "0.001",
]  # fmt: skip
MODEL = [
    "bench", "model", "--device", "cpu", "--lengths", "32", "64", "--tokens", "64", "--chunk-sizes", "16",
    "--case-seconds", "0.001",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The reference over many tokens takes longer than everything else here."""
    monkeypatch.setattr(gate, "SHORTEST_SHARD", 16)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    return tmp_path / "bench"


def run(flags: list[str], output_dir: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    """The exit status and the rows of the CSV; later flags replace earlier ones."""
    status = main([*flags, "--output-dir", str(output_dir), *more])
    name = f"{flags[1]}.csv"
    with (output_dir / name).open(newline="") as file:
        return status, list(csv.DictReader(file))


def wrong_backend(monkeypatch, change):
    """`change` what the torch backend returns: o, q → another o."""

    def wrong(q, *args, backend, **options):
        o, state = local_memory(q, *args, backend=backend, **options)
        return (change(o, q) if backend == "torch" else o), state

    monkeypatch.setattr(contenders, "local_memory", wrong)


# ------------------------------------------------------------------------------------------------------------ kernels


def test_kernels_measures_writes_and_prints(output_dir: Path, capsys):
    more = ["--memories", "mlp", "linear", "--peers", "fla", "flash", "cudnn", "--chunk-sizes", "16", "8"]
    status, rows = run(KERNELS, output_dir, *more)
    assert status == 0
    # Two memories at two chunk sizes, fla at two, flash and cudnn without chunks; each at two lengths in two modes.
    assert len(rows) == (2 * 2 + 2 + 2) * 2 * 2
    timed = [row for row in rows if row["status"] == "ok"]
    assert {(row["contender"], row["memory"]) for row in timed} == {
        ("torch", "mlp"),
        ("torch", "linear"),
        ("flash", ""),
    }
    for row in timed:
        assert float(row["ms_lowest"]) <= float(row["ms_median"]) <= float(row["ms_highest"])
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["ms_median"]))
        seconds = float(row["ms_median"]) / 1e3
        assert float(row["operations_per_second"]) == pytest.approx(int(row["operations"]) / seconds)
        assert float(row["bytes_per_second"]) == pytest.approx(int(row["bytes_moved"]) / seconds)
        assert int(row["batch"]) * int(row["length"]) == 64
    assert all(0 < float(row["gate_error"]) < 1e-3 for row in timed if row["contender"] == "torch")
    assert (output_dir / "kernels.png").read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert "fla: missing: runs on cuda only, not on cpu" in printed
    assert "cudnn: missing: runs on cuda only, not on cpu" in printed
    assert "torch: 4 of 4 memory types and chunk sizes passed, worst" in printed


def test_bf16(output_dir: Path):
    status, rows = run(KERNELS, output_dir, "--dtype", "bf16", "--peers", "flash")
    assert status == 0 and {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda o, q: o + 0.01 * o.detach(), "output"),
        (lambda o, q: o + 0.01 * (q - q.detach()), "q"),
        (lambda o, q: torch.where(torch.arange(o.shape[1])[:, None, None] == 5, torch.nan, o), "output"),
        (lambda o, q: o.detach() + 0 * q, "k"),
    ],
    ids=["output", "gradient", "nan", "no gradient"],
)
def test_the_gate_stops_a_wrong_backend(output_dir: Path, monkeypatch, capsys, change, where: str):
    wrong_backend(monkeypatch, change)
    status, rows = run(KERNELS, output_dir, "--peers", "flash", "--modes", BOTH)
    assert status == 1
    assert {(row["contender"], row["status"]) for row in rows} == {("torch", "gate failed"), ("flash", "ok")}
    assert all(f"‖x − reference‖ / ‖reference‖ of {where} is" in row["reason"] for row in rows[:2])
    assert not any(row["tokens_per_second"] for row in rows[:2])
    assert "torch mlp C=16: gate failed" in capsys.readouterr().out


def test_a_backend_that_crashes_fails_the_gate(output_dir: Path, monkeypatch, capsys):
    def crash(o, q):
        raise RuntimeError("a kernel went wrong\nwith details")

    wrong_backend(monkeypatch, crash)
    status, rows = run(KERNELS, output_dir)
    assert status == 1 and {row["status"] for row in rows} == {"gate failed"}
    assert "gate failed: failed: RuntimeError: a kernel went wrong" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, ImportError])
def test_a_backend_that_says_what_it_cannot_is_no_failure(output_dir: Path, monkeypatch, capsys, error: type):
    def refuse(o, q):
        raise error("head_dim=16 is not supported")

    wrong_backend(monkeypatch, refuse)
    status, rows = run(KERNELS, output_dir)
    assert status == 0 and {row["status"] for row in rows} == {"cannot run"}
    assert "torch mlp C=16 T=32 and 3 more: cannot run: head_dim=16 is not supported" in capsys.readouterr().out


def test_the_gate_reads_across_resets_and_many_chunks(monkeypatch):
    monkeypatch.setattr(gate, "SHORTEST_SHARD", 128)
    args = KernelBenchArguments(device="cpu", heads=1, head_dim=8).resolve()
    checked = Gate(args, torch.Generator().manual_seed(0))
    assert checked.check("torch", "mlp", 1).status == "ok"
    (inputs, *_), *_ = checked._problems.values()
    assert inputs.q.shape == (1, 128 + 1 + 1, 1, 8)


def test_worst_error_of_nan():
    want = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    error, where = worst_error(want | {"b": torch.tensor([1.0, torch.nan]), "c": torch.zeros(2)}, want)
    assert error != error and where == "b"
    assert worst_error(want | {"c": torch.full((2,), 1.5)}, want) == (0.5, "c")


def test_a_missing_peer_is_named(output_dir: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "titans_pytorch", None)
    status, rows = run(KERNELS, output_dir, "--peers", "titans")
    assert status == 0
    missing = [row for row in rows if row["contender"] == "titans"]
    assert len(missing) == 4 and {row["status"] for row in missing} == {"missing"}
    assert all("pip install titans-pytorch" in row["reason"] for row in missing)
    assert "titans: missing: titans-pytorch cannot be imported" in capsys.readouterr().out


def test_titans(output_dir: Path):
    pytest.importorskip("titans_pytorch")
    _, rows = run(KERNELS, output_dir, "--peers", "titans", "--lengths", "64", "--modes", BOTH)
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[1]["contender"] == "titans"


def test_fla_gets_shards_as_rows_and_our_weights_as_its_state(output_dir: Path, monkeypatch):
    """What the package's signature asks for, in its layout; without a GPU the kernel itself cannot run."""
    calls = []

    def chunk_ttt_linear(q, k, v, w, b, eta, scale=None, eps=1e-6, chunk_size=16, initial_state=None,
                         initial_state_bias=None):  # fmt: skip
        calls.append((q.shape, w.shape, b.shape, eta.shape, initial_state.shape, initial_state_bias.shape, chunk_size))
        assert w.dtype == b.dtype == eta.dtype == q.dtype  # its backward does not compile otherwise
        state, bias = initial_state.sum((0, 1)).to(q.dtype), initial_state_bias.sum().to(q.dtype)
        o = q @ state + bias + k + v * eta + w * b
        return o, None, None

    ttt = types.ModuleType("fla.ops.ttt")
    ttt.chunk_ttt_linear = chunk_ttt_linear
    monkeypatch.setitem(sys.modules, "fla.ops.ttt", ttt)
    monkeypatch.setattr(FlaTttLinear, "devices", ("cpu",))
    more = ["--memories", "linear", "--peers", "fla", "--heads", "2", "--lengths", "64", "--modes", BOTH]
    _, rows = run(KERNELS, output_dir, *more, "--dtype", "bf16")
    ours, fla = rows
    assert ours["status"] == fla["status"] == "ok"
    assert ours["operations"] == fla["operations"] and ours["shard_length"] == fla["shard_length"] == "32"
    shapes = ((2, 32, 2, 16), (2, 16), (2, 16), (2, 32, 2, 1), (2, 2, 16, 16), (2, 2, 1, 16), 16)
    assert set(calls) == {shapes}


def test_attention_is_the_named_kernel_and_causal(monkeypatch):
    args = KernelBenchArguments(device="cpu", lengths=[64], tokens=128, heads=2, head_dim=16).resolve()
    attention = contenders.make_contenders(args)[3]
    assert isinstance(attention, Attention) and attention.name == "flash"
    work = attention.prepare(Case("flash", None, None, 64, BOTH), args, torch.Generator().manual_seed(0))
    q, k, v = (x.transpose(1, 2) for x in work.leaves)
    scores = (q @ k.mT / 4).masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(work.forward(), (scores.softmax(-1) @ v).transpose(1, 2))


# ------------------------------------------------------------------------------------------------ failures on the way


def test_out_of_memory_is_recorded(output_dir: Path, monkeypatch, capsys):
    sizes = iter((900, 901))

    def too_large(*args):
        raise torch.OutOfMemoryError(f"tried to allocate {next(sizes)} GiB")

    monkeypatch.setattr(Attention, "prepare", too_large)
    status, rows = run(KERNELS, output_dir, "--peers", "flash", "--modes", BOTH)
    assert status == 0
    assert [row["status"] for row in rows] == ["ok", "ok", "out of memory", "out of memory"]
    assert "flash T=32 and 1 more: out of memory: tried to allocate 900 GiB" in capsys.readouterr().out


def test_what_is_not_finite_is_no_time_of_ours_and_a_remark_on_a_peer(output_dir: Path, monkeypatch, capsys):
    def broken(prepare):
        def wrapped(*args):
            work = prepare(*args)
            return work._replace(forward=lambda: work.forward() / 0)

        return wrapped

    for contender in (contenders.OurMemory, Attention):
        monkeypatch.setattr(contender, "prepare", broken(contender.prepare))
    _, rows = run(KERNELS, output_dir, "--peers", "flash", "--modes", BOTH, "--lengths", "32")
    ours, peer = rows
    assert (ours["status"], ours["reason"]) == ("failed", "FloatingPointError: its output is not finite")
    assert (peer["status"], peer["reason"]) == ("ok", "its output is not finite") and peer["ms_median"]
    assert "flash T=32: timed, but its output is not finite" in capsys.readouterr().out


def test_the_time_limit_leaves_a_table(output_dir: Path, capsys):
    status, rows = run(KERNELS, output_dir, "--time-limit", "1e-9")
    assert status == 0
    assert {(row["status"], row["reason"]) for row in rows} == {("not run", "time limit of 1e-09 s")}
    printed = capsys.readouterr().out
    assert "4 measurements not run: time limit of 1e-09 s" in printed and "tokens/s, forward" in printed
    assert (output_dir / "kernels.png").exists()


def test_an_interrupted_run_keeps_what_was_measured(output_dir: Path, monkeypatch, capsys):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(kernels, "measure", interrupted)
    status, rows = run(KERNELS, output_dir)
    assert status == 130 and [row["status"] for row in rows] == ["ok", "ok"]
    captured = capsys.readouterr()
    assert "tokens/s, forward" in captured.out and "tnt bench kernels: error: interrupted" in captured.err


def quick_run(monkeypatch, folder: Path, factor: float, **sizes) -> str:
    """The report of a quick run on a GPU in which every call takes `factor` times what is predicted, else 7 ms."""
    predictions = load_predictions()
    args = KernelBenchArguments(
        device="cpu", backends=["triton"], peers=["none"], memories=["mlp"], lengths=[2048, 32768], chunk_sizes=[16],
        modes=[BOTH], dtype="bf16", heads=12, shard_length=2048, quick=True, case_seconds=0.01, seed=0,
        output_dir=folder,
    )  # fmt: skip
    bench = kernels.KernelBench(replace(args, **{"tokens": 131072} | sizes))

    def measured(case):
        row = bench._row(case, attempt.Outcome(attempt.NOT_RUN))
        seconds = factor * (predictions.ms_of(row) or 7.0) / 1e3
        return attempt.Outcome(attempt.OK, value=kernels.Measured(timing.Timing(seconds, *[seconds] * 2, 3, 0, 0), ""))

    monkeypatch.setattr(bench, "_check_and_time", measured)
    rows = list(bench.rows())
    bench.args = replace(bench.args, device="cuda")
    return bench.report(rows)


def test_a_quick_run_prints_measured_beside_predicted(output_dir: Path, monkeypatch):
    output_dir.mkdir()
    report = quick_run(monkeypatch, output_dir, 2.0)
    table = report[report.index("measured on ") :].splitlines()
    assert "beside predicted for an NVIDIA H100 SXM at 1.755 GHz, not calibrated" in table[0]
    lines = [line.split() for line in table[2:] if line]
    assert [line[:5] for line in lines] == [["triton", "mlp", "C=16", T, "forward+backward"] for T in ("2048", "32768")]
    (entry,) = [e for e in load_predictions().entries if (e["contender"], e["memory"], e["chunk_size"], e["mode"])
                == ("triton", "mlp", 16, BOTH)]  # fmt: skip
    for line in lines:
        assert float(line[5]) == pytest.approx(2 * entry["ms"], rel=1e-2)
        assert float(line[6]) == pytest.approx(entry["ms"], rel=1e-2)
        assert line[7] == "2.00"


@pytest.mark.parametrize("sizes", [{"tokens": 65536}, {"heads": 8}, {"dtype": "fp16"}, {"shard_length": 1024}])
def test_other_sizes_than_the_predicted_ones_have_no_prediction(output_dir: Path, monkeypatch, sizes):
    output_dir.mkdir()
    report = quick_run(monkeypatch, output_dir, 1.0, **sizes)
    assert "none of the cases that were timed is predicted; predictions are for the default sizes" in report


def test_a_quick_run_without_a_gpu_says_what_the_comparison_needs(output_dir: Path, capsys):
    assert run([*KERNELS, "--quick", "--lengths", "32"], output_dir)[0] == 0
    (message,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("measured beside predicted")]
    assert "needs a GPU, this run used the CPU" in message and "NVIDIA H100" in message
    assert run([*KERNELS, "--lengths", "32", "--overwrite"], output_dir)[0] == 0
    assert "measured beside predicted" not in capsys.readouterr().out


def test_a_lost_device_ends_the_measurements_not_the_report(output_dir: Path, monkeypatch):
    def illegal(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dead(device, reason):
        raise attempt.DeviceLostError(f"the device answers no more after this: {reason}")

    monkeypatch.setattr(Attention, "prepare", illegal)
    monkeypatch.setattr(attempt, "_check_alive", dead)
    status, rows = run(KERNELS, output_dir, "--peers", "flash", "--modes", BOTH, "--chunk-sizes", "16", "8")
    assert status == 0
    assert [row["status"] for row in rows] == ["ok"] * 2 + ["not run"] * 4
    assert all("illegal memory access" in row["reason"] for row in rows[2:])


def test_a_measurement_that_would_take_too_long_is_not_begun(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(attempt.time, "monotonic", lambda: now[0])
    session = Session(time_limit=100, case_seconds=1)
    done = attempt.Outcome("ok")
    session.remember("a", 1024, 2.0)  # a call of twice the length: two to warm up, three timed, 4 s each
    now[0] = 79
    assert session.run("a", 2048, lambda: done) is done
    now[0] = 81
    refused = session.run("a", 2048, lambda: done)
    assert refused.status == "not run"
    assert refused.reason == "time limit of 100 s: would take about 20 s, 19 s are left"
    assert session.run("a", 512, lambda: done) is done and session.run("b", 2048, lambda: done) is done
    assert attempt.Deadline(None).refuse(1e9) is None


def test_measure(monkeypatch):
    calls = []
    result = measure(calls.append, CPU, seconds=0.0)
    assert calls == [0, 1, 0, 1, 2] and result.repeats == 3
    assert result.lowest <= result.median <= result.highest and result.peak_bytes is None
    monkeypatch.setattr(timing, "SLOW_CALL_SECONDS", 0.0)
    calls.clear()
    assert measure(calls.append, CPU, seconds=9.0).repeats == 1 and calls == [0, 1]
    assert expected_seconds(2.0, 1.0) == 4.0


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*KERNELS, "--lengths", "48"], "--lengths must divide --tokens 64, got 48"),
        ([*KERNELS, "--lengths", "0"], "--lengths must be at least 1, got 0"),
        ([*KERNELS, "--chunk-sizes", "24"], "--shard-length 32 must be a multiple of every chunk size, got 24"),
        ([*KERNELS, "--backends", "torsh"], "--backends must be one of torch, triton, got 'torsh'"),
        ([*KERNELS, "--peers", "vllm"], "--peers must be one of fla, flash, cudnn, titans, none, got 'vllm'"),
        ([*KERNELS, "--modes", "backward"], "--modes must be one of forward+backward, forward, got 'backward'"),
        ([*KERNELS, "--dtype", "int8"], "--dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ([*KERNELS, "--heads", "0"], "--heads must be at least 1, got 0"),
        ([*KERNELS, "--time-limit", "-1"], "--time-limit must be positive and finite, got -1.0"),
        ([*KERNELS, "--seed", "-1"], "--seed must be at least 0, got -1"),
        ([*KERNELS, "--device", "tpu"], "--device must be cuda or cpu, got 'tpu'"),
        ([*MODEL, "--preset", "huge"], "--preset must be one of tiny, "),
        ([*MODEL, "--precision", "fp8"], "--precision must be one of autocast-bf16, bf16, fp32, got 'fp8'"),
        ([*MODEL, "--attention", "eager"], "--attention must be one of flash, cudnn, got 'eager'"),
        ([*MODEL, "--chunk-sizes", "24"], "--chunk-sizes 24: TNTConfig has 1 problem"),
        ([*MODEL, "--titans-chunk-size", "-8"], "--titans-chunk-size must be at least 0, got -8"),
        ([*MODEL, "--preset", "ttt-mlp-125m"], "0 leaves the Titans model out"),
    ],
)
def test_bad_arguments(flags: list[str], message: str, output_dir: Path, capsys):
    assert main([*flags, "--output-dir", str(output_dir)]) == 2
    printed = capsys.readouterr().err
    assert f"tnt bench {flags[1]}: error: " in printed and message in printed
    assert not output_dir.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main([*KERNELS, "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_results_are_not_replaced_unasked(output_dir: Path, tmp_path: Path, capsys):
    assert run(KERNELS, output_dir, "--time-limit", "1e-9")[0] == 0
    assert main([*KERNELS, "--output-dir", str(output_dir)]) == 2
    assert "holds kernels.csv, kernels.png; give another folder, or --overwrite" in capsys.readouterr().err
    assert run(KERNELS, output_dir, "--time-limit", "1e-9", "--overwrite")[0] == 0
    (tmp_path / "file").touch()
    assert main([*KERNELS, "--output-dir", str(tmp_path / "file" / "below")]) == 2
    assert "is a file; give another folder" in capsys.readouterr().err


def test_an_unknown_flag_is_answered_with_the_nearest(capsys):
    for flags in (KERNELS, MODEL):
        with pytest.raises(SystemExit, match="2"):
            main([*flags, "--lenghts", "32"])
        assert "--lenghts is unknown; did you mean --lengths?" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark_name", ["kernels", "model"])
def test_help_names_defaults(benchmark_name: str, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", benchmark_name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(default: 2048 4096 8192 16384 32768" in words and "on a CPU" in words


def test_defaults_on_a_gpu_are_the_documented_ones(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = KernelBenchArguments(output_dir=tmp_path).resolve()
    assert (args.device, args.dtype, args.head_dim, args.heads, args.expansion) == ("cuda", "bf16", 64, 12, 2)
    assert args.shard_length == 2048 and args.lengths == [2**n for n in range(11, 17)]
    assert args.chunk_sizes[0] == 16 and sorted(args.chunk_sizes) == [1, 8, 16, 64, 128]
    quick = KernelBenchArguments(quick=True, chunk_sizes=[4], output_dir=tmp_path).resolve()
    assert quick.lengths == [2048, 8192, 32768] and quick.chunk_sizes == [4] and quick.tokens == args.tokens
    args = ModelBenchArguments(output_dir=tmp_path).resolve()
    assert (args.preset, args.chunk_sizes, args.titans_chunk_size) == ("tnt-150m", [8, 16, 64], 8)
    assert args.lengths == [2**n for n in range(11, 16)] and args.precision == "autocast-bf16"


# ------------------------------------------------------------------------------------------------------------- figures


def test_operations_and_bytes():
    shape = {"head_dim": 64, "expansion": 2, "chunk_size": 16}
    both = memory_operations(BOTH, memory="mlp", qk_projection="none", **shape)
    forward = memory_operations(FORWARD, memory="mlp", qk_projection="none", **shape)
    assert both - 16 * 16 * (64 + 128) == 52 * 64 * 128
    assert 26 * (forward - 4 * 16 * (64 + 128)) == 7 * (both - 16 * 16 * (64 + 128))
    assert memory_operations(BOTH, memory="linear", qk_projection="none", **shape) == 22 * 64**2 + 16 * 16 * 64
    chunk, shard = (memory_operations(FORWARD, memory="mlp", qk_projection=p, **shape) for p in ("chunk", "shard"))
    assert (chunk - forward, shard - chunk) == (4 * 16 * 64, 4 * 64**2)
    assert attention_operations(FORWARD, head_dim=64, length=1024) * 7 == 2 * attention_operations(
        BOTH, head_dim=64, length=1024
    )
    assert memory_bytes(FORWARD, head_dim=64, itemsize=2) == 4 * 128 + 4
    assert memory_bytes(BOTH, head_dim=64, itemsize=2) == 11 * 128 + 12
    assert attention_bytes(BOTH, head_dim=64, itemsize=2) == 12 * 128


@pytest.mark.parametrize("projection", ["none", "shard"])
def test_both_benchmarks_count_alike(projection: str):
    spec = importlib.util.spec_from_file_location("bench_memory", BENCH_MEMORY)
    bench_memory = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_memory)
    args = bench_memory.parse(["--qk-projection", projection, "--length", "1", "--batch", "1", "--heads", "1"])
    ours = memory_operations(
        BOTH, memory="mlp", head_dim=args.head_dim, expansion=args.expansion, chunk_size=16, qk_projection=projection
    )
    assert ours == bench_memory.operations(args, 16, "operation")


def test_machine_and_versions():
    assert "threads" in machine.describe_machine(CPU)
    assert machine.describe_versions().startswith("torch ")


# -------------------------------------------------------------------------------------------------------------- model


def test_model_measures_writes_and_prints(output_dir: Path, capsys):
    status, rows = run(MODEL, output_dir)
    assert status == 0
    assert [row["contender"] for row in rows] == ["llama"] * 2 + ["tnt C=16"] * 2 + ["titans C=8"] * 2
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["ms_median"]))
        assert 0 < float(row["loss"]) < 7  # random bytes: ln 384 = 5.95 before steps, as many as the machine manages
    sizes = [int(row["parameters"]) for row in rows[::2]]
    assert max(sizes) < 1.1 * min(sizes)
    assert (output_dir / "model.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "tnt C=16 " in printed[printed.index("faster than the Llama from a length of") :]
    assert f"{sizes[0]:,}" in printed


def test_model_time_limit_and_failure(output_dir: Path, monkeypatch, capsys):
    status, rows = run(MODEL, output_dir, "--time-limit", "1e-9", "--titans-chunk-size", "0")
    assert status == 0 and [row["status"] for row in rows] == ["not run"] * 4
    assert "not measured: no length at which both were timed" in capsys.readouterr().out

    def diverge(self, *args, **options):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(model.ModelBench, "_measure", diverge)
    status, rows = run(MODEL, output_dir, "--overwrite")
    assert status == 0 and {row["reason"] for row in rows} == {"FloatingPointError: the loss is nan"}
    assert "llama T=32 and 1 more: failed" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["autocast-bf16", "bf16"])
def test_model_precisions(precision: str, output_dir: Path):
    _, rows = run(MODEL, output_dir, "--precision", precision, "--lengths", "32", "--titans-chunk-size", "0")
    assert [row["status"] for row in rows] == ["ok", "ok"], [row["reason"] for row in rows]


@pytest.mark.parametrize("preset", ["tnt-150m", "tiny"])
def test_the_llama_has_as_many_parameters(preset: str):
    config = TNTConfig.from_preset(preset)
    llama = make_llama_config(config, 1024)
    with torch.device("meta"):
        ours, other = TNTForCausalLM(config).num_parameters(), build_llama(config, 1024).num_parameters()
    assert abs(other / ours - 1) < 0.02
    assert (llama.hidden_size, llama.num_hidden_layers) == (config.hidden_size, config.num_hidden_layers)
    assert (llama.num_attention_heads, llama.vocab_size) == (config.num_heads, config.vocab_size)


def test_the_titans_model_is_the_preset():
    made, preset = make_titans_config("tnt-150m", 8, "auto"), TNTConfig.from_preset("titans-150m")
    assert made.to_diff_dict() == preset.to_diff_dict()


def test_the_llama_attends_causally_without_a_mask(monkeypatch):
    """With a mask torch would refuse FlashAttention on a GPU."""
    calls, attention = [], F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, is_causal=False, **options):
        calls.append((attn_mask, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    llama = build_llama(TNTConfig.from_preset("tiny"), 32)
    llama(input_ids=torch.zeros(2, 32, dtype=torch.long))
    assert calls == [(None, True)] * 3


def test_crossover():
    llama = {2048: 8.0, 4096: 4.0, 8192: 2.0}
    assert find_crossover({2048: 1.0, 4096: 1.0, 8192: 1.0}, llama) is None
    assert find_crossover({2048: 9.0, 4096: 9.0, 8192: 9.0}, llama) == "always"
    assert find_crossover({2048: 4.0, 4096: 4.0, 8192: 4.0}, llama) == pytest.approx(4096)
    # The Llama's speed is proportional to 1 / length: equal where it is 2.83.
    assert find_crossover({4096: 8**0.5, 8192: 8**0.5}, llama) == pytest.approx(4096 * 2**0.5)
    # Faster, slower, faster: the last change counts.
    assert 4096 < find_crossover({2048: 9.0, 4096: 3.0, 8192: 3.0}, llama) < 8192
    assert find_crossover({}, llama) is None


def test_crossovers_as_text():
    speeds = {"llama": (8.0, 4.0, 2.0), "tnt C=8": (1.0, 1.0, 1.0), "tnt C=16": (4.0, 4.0, 8.0), "tnt C=64": (9.0,) * 3}
    rows = [
        ModelRow(name, T, 1, "ok", tokens_per_second=speed)
        for name, values in speeds.items()
        for T, speed in zip((2048, 4096, 8192), values, strict=True)
    ]
    rows.append(ModelRow("titans C=8", 2048, 1, "out of memory"))
    assert [" ".join(line.split()) for line in summarize_crossovers(rows).splitlines()] == [
        "faster than the Llama from a length of",
        "tnt C=8 none up to 8k (0.50 times the Llama's tokens/s at 8k)",
        "tnt C=16 4,096 tokens, interpolated (4.00 times the Llama's tokens/s at 8k)",
        "tnt C=64 2k or less, the shortest that was timed (4.50 times the Llama's tokens/s at 8k)",
        "titans C=8 not measured: no length at which both were timed",
    ]
