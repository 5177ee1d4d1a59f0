"""What all benchmarks share: measurements that fail or come too late, timing, arguments."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from modeling_tnt.train.bench import decode, harness, measure
from modeling_tnt.train.bench.arguments import KernelBenchArguments
from modeling_tnt.train.bench.contenders import Attention
from modeling_tnt.train.bench.harness import Bench
from modeling_tnt.train.bench.measure import Stopwatch, Timing, Work, expected_seconds
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
    begun = []

    class Interrupted(Stopwatch):
        def __init__(self, *args):
            begun.append(args)
            if len(begun) == 3:
                raise KeyboardInterrupt
            super().__init__(*args)

    monkeypatch.setattr(harness, "Stopwatch", Interrupted)
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
    bench = Bench(KernelBenchArguments(device="cpu", time_limit=100, case_seconds=0.01, output_dir=tmp_path).resolve())

    def attempt(length: int, ms: float, *series: str) -> list[tuple[str, str]]:
        work = Work(lambda: None, lambda timing: {"ms_median": ms})
        outcomes = bench.attempt_in_turns({one: lambda: work for one in series}, length)
        return [(outcome.status, outcome.reason) for outcome in outcomes.values()]

    assert attempt(1024, 2000.0, "a") == [("ok", "")]
    now[0] = 83  # a call of twice the length: one to warm up, three timed, 4 s each
    assert attempt(2048, 4000.0, "a") == [("ok", "")]
    now[0] = 85
    assert attempt(2048, 2000.0, "a") == [("not run", "time limit of 100 s: would take about 16 s, 15 s are left")]
    assert attempt(2048, 2000.0, "b") == [("ok", "")] and bench.attempt(dict).status == "ok"
    # In turns: to warm up and first timed, then once a turn; two of them, 2 s and 4 s each.
    assert attempt(2048, 2000.0, "a", "b")[1] == (
        "not run", "time limit of 100 s: would take about 42 s, 15 s are left"
    )  # fmt: skip
    assert timing.Deadline(None).refuse(1e9) is None


@pytest.fixture
def idle_bench(tmp_path: Path) -> Bench:
    return Bench(KernelBenchArguments(device="cpu", case_seconds=1e-3, output_dir=tmp_path).resolve())


def test_what_is_compared_is_timed_in_turns(idle_bench: Bench):
    order = []

    def prepare(name: str) -> Work:
        return Work(lambda: order.append(name) or time.sleep(1e-3), lambda timing: timing.fields(1) | {"name": name})

    outcomes = idle_bench.attempt_in_turns({name: partial(prepare, name) for name in "ab"}, length=1)
    assert [outcome.value["name"] for outcome in outcomes.values()] == ["a", "b"]
    assert order == ["a", "a", "b", "b", *(["a", "b"] * harness.TURNS)]
    assert {outcome.value["repeats"] for outcome in outcomes.values()} == {1 + harness.TURNS}
    order.clear()
    alone = idle_bench.attempt_in_turns({"a": partial(prepare, "a")}, length=1)
    assert order == ["a"] * 4 and alone["a"].value["repeats"] == 3


@pytest.mark.parametrize("place", ["prepare", "warm-up", "turn", "figures"])
def test_one_that_fails_leaves_the_others_their_times(idle_bench: Bench, place: str):
    calls = []

    def fail_at(where: str) -> None:
        if where == place:
            raise RuntimeError(f"broken at {where}")

    def prepare() -> Work:
        fail_at("prepare")

        def call() -> None:
            calls.append(time.sleep(1e-3))
            fail_at("warm-up" if len(calls) <= 2 else "turn")

        return Work(call, lambda timing: fail_at("figures"))

    right = Work(lambda: time.sleep(1e-3), lambda timing: timing.fields(1))
    outcomes = idle_bench.attempt_in_turns({"wrong": prepare, "right": lambda: right}, length=1)
    assert (outcomes["wrong"].status, outcomes["wrong"].reason) == ("failed", f"RuntimeError: broken at {place}")
    alone = place in ("prepare", "warm-up")
    assert outcomes["right"].status == "ok"
    assert outcomes["right"].value["repeats"] == (3 if alone else 1 + harness.TURNS)


def timed(call: Callable[[], object], seconds: float) -> Timing:
    watch = Stopwatch(call, CPU, seconds)
    watch.take_turn()
    return watch.read()


@pytest.fixture
def calls() -> list[float]:
    return []


@pytest.mark.parametrize(("slow_seconds", "count", "repeats"), [(5.0, 4, 3), (0.0, 2, 1)])
def test_a_call_that_takes_long_is_timed_by_the_clock(calls, monkeypatch, slow_seconds, count: int, repeats: int):
    monkeypatch.setattr(measure, "SLOW_CALL_SECONDS", slow_seconds)
    found = timed(lambda: calls.append(time.sleep(2e-3)), seconds=5e-3)
    assert (len(calls), found.repeats) == (count, repeats)
    assert 2e-3 <= found.lowest <= found.median <= found.highest and found.peak_bytes is None
    assert expected_seconds(2e-3, 5e-3) == pytest.approx(count * 2e-3)


def test_short_calls_on_a_cpu(calls):
    found = timed(lambda: calls.append(time.sleep(1e-3)), seconds=0.05)
    assert 1e-3 <= found.lowest <= found.median <= found.highest and found.repeats <= 50 and len(calls) > found.repeats


def test_short_calls_on_a_gpu(calls, monkeypatch):
    """Triton's own function, on a driver whose events read a clock."""
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing.runtime.driver, "_active", ClockDriver())
    times = measure._time_on_gpu(lambda: calls.append(time.sleep(1e-3)), 0.05)
    assert len(times) <= 50 and len(calls) == 1 + 5 + 1 + len(times) and 1e-3 <= min(times) <= max(times)


class ClockDriver:
    """What `do_bench` asks of a GPU's driver."""

    class Event:
        def __init__(self, enable_timing: bool):
            self.seconds = 0.0

        def record(self) -> None:
            self.seconds = time.perf_counter()

        def elapsed_time(self, end: ClockDriver.Event) -> float:
            return 1e3 * (end.seconds - self.seconds)

    def get_device_interface(self) -> type[ClockDriver]:
        return ClockDriver

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: None) -> None:
        return None

    @staticmethod
    def synchronize() -> None:
        return None


@pytest.mark.parametrize("name", ["kernels", "decode"])
def test_a_machine_that_is_not_idle_is_told(run, monkeypatch, capsys, name: str):
    class Busy:
        def __init__(self, *helpers: Callable[[], float]):
            pass

        def cpus(self) -> float:
            return 1.25

    for module in (harness, measure, decode):
        monkeypatch.setattr(module, "OtherProcesses", Busy)
    monkeypatch.setattr(harness, "look_around", lambda: 0.75)
    monkeypatch.setattr(machine, "count_cpus", lambda: 2)
    _, rows = run(name)
    assert {row["cpus_used_by_others"] for row in rows} == ({"1.25"} if name == "kernels" else {1.25})
    warning = "these times are too long and spread; run again on an idle machine"
    lines = capsys.readouterr().out.strip().splitlines()
    assert f"load      0.8 of 2 CPUs busy with other processes: {warning}" in lines[:7]
    assert lines[-1] == f"load      1.2 of 2 CPUs busy with other processes (1.2 in the worst measurement): {warning}"


def test_machine_and_versions():
    assert "threads" in machine.describe_machine(CPU)
    assert machine.describe_versions().startswith("torch ")
