"""What all benchmarks share: measurements that fail or come too late, timing, arguments."""

from __future__ import annotations

from pathlib import Path

import torch

from modeling_tnt.train.bench import kernels, measure
from modeling_tnt.train.bench.arguments import KernelBenchArguments
from modeling_tnt.train.bench.contenders import Attention
from modeling_tnt.train.bench.harness import Bench
from modeling_tnt.train.bench.measure import expected_seconds
from modeling_tnt.train.common import machine, timing
from modeling_tnt.train.common.costs import BOTH

CPU = torch.device("cpu")


def test_out_of_memory_is_recorded(run, monkeypatch, capsys):
    sizes = iter((900, 901))

    def too_large(*args):
        raise torch.OutOfMemoryError(f"tried to allocate {next(sizes)} GiB")

    monkeypatch.setattr(Attention, "prepare", too_large)
    status, rows = run("kernels", "--peers", "flash", "--modes", BOTH)
    assert status == 0
    assert [row["status"] for row in rows] == ["ok", "ok", "out of memory", "out of memory"]
    assert "flash T=32 and 1 more: out of memory: tried to allocate 900 GiB" in capsys.readouterr().out


def test_the_time_limit_leaves_a_table(run, output_dir: Path, capsys):
    status, rows = run("kernels", "--time-limit", "1e-9")
    assert status == 0
    assert {(row["status"], row["reason"]) for row in rows} == {("not run", "time limit of 1e-09 s")}
    printed = capsys.readouterr().out
    assert "4 measurements not run: time limit of 1e-09 s" in printed and "tokens/s, forward" in printed
    assert (output_dir / "kernels.png").exists()


def test_an_interrupted_run_keeps_what_was_measured(run, monkeypatch, capsys):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure.measure(*args)

    monkeypatch.setattr(kernels, "measure", interrupted)
    status, rows = run("kernels")
    assert status == 130 and [row["status"] for row in rows] == ["ok", "ok"]
    captured = capsys.readouterr()
    assert "tokens/s, forward" in captured.out and "tnt bench kernels: error: interrupted" in captured.err


def test_a_lost_device_ends_the_measurements_not_the_report(run, monkeypatch):
    def illegal(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dead(device, reason):
        raise timing.DeviceLostError(f"the device answers no more after this: {reason}")

    monkeypatch.setattr(Attention, "prepare", illegal)
    monkeypatch.setattr(timing, "_check_alive", dead)
    status, rows = run("kernels", "--peers", "flash", "--modes", BOTH, "--chunk-sizes", "16", "8")
    assert status == 0
    assert [row["status"] for row in rows] == ["ok"] * 2 + ["not run"] * 4
    assert all("illegal memory access" in row["reason"] for row in rows[2:])


def test_a_measurement_that_would_take_too_long_is_not_begun(monkeypatch, tmp_path: Path):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    bench = Bench(KernelBenchArguments(device="cpu", time_limit=100, case_seconds=1, output_dir=tmp_path).resolve())

    def measured() -> dict[str, float]:
        return {"ms_median": 2000.0}

    assert bench.attempt(measured, "a", 1024).status == "ok"
    now[0] = 79  # a call of twice the length: two to warm up, three timed, 4 s each
    assert bench.attempt(lambda: {"ms_median": 4000.0}, "a", 2048).status == "ok"
    now[0] = 81
    refused = bench.attempt(measured, "a", 2048)
    assert refused.status == "not run"
    assert refused.reason == "time limit of 100 s: would take about 20 s, 19 s are left"
    assert bench.attempt(measured, "b", 2048).status == "ok" and bench.attempt(measured).status == "ok"
    assert timing.Deadline(None).refuse(1e9) is None


def test_measure(monkeypatch):
    calls = []
    result = measure.measure(lambda: calls.append(1), CPU, seconds=0.0)
    assert len(calls) == 5 and result.repeats == 3
    assert result.lowest <= result.median <= result.highest and result.peak_bytes is None
    monkeypatch.setattr(measure, "SLOW_CALL_SECONDS", 0.0)
    calls.clear()
    assert measure.measure(lambda: calls.append(1), CPU, seconds=9.0).repeats == 1 and len(calls) == 2
    assert expected_seconds(2.0, 1.0) == 4.0


def test_machine_and_versions():
    assert "threads" in machine.describe_machine(CPU)
    assert machine.describe_versions().startswith("torch ")
