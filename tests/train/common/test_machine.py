"""What other processes do to the CPUs: counted by a kernel that is made up, and with a real one beside us."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from modeling_tnt.train.common import machine
from modeling_tnt.train.common.machine import OtherProcesses, advise_threads, describe_others

SECONDS = 2.0


class FakeMachine:
    """Four CPUs of which the process may use 1 and 3; `run` lets SECONDS pass."""

    def __init__(self, monkeypatch, folder: Path):
        self.clock, self.own, self.children, self.load = 100.0, 5.0, 1.0, 0.0
        self.ticks = {number: [1000, 0, 500, 9000, 100, 0, 0, 0, 300, 0] for number in range(4)}
        self.stat = folder / "stat"
        self.write()
        monkeypatch.setattr(machine, "PROC_STAT", self.stat)
        clocks = {"perf_counter": lambda: self.clock, "process_time": lambda: self.own}
        self.os = SimpleNamespace(
            times=lambda: SimpleNamespace(children_user=self.children, children_system=0.0),
            sched_getaffinity=lambda pid: {1, 3},
            getloadavg=lambda: (self.load, 0.0, 0.0),
        )
        monkeypatch.setattr(machine, "time", SimpleNamespace(**clocks))
        monkeypatch.setattr(machine, "os", self.os)

    def write(self) -> None:
        lines = [f"cpu{number} {' '.join(map(str, counts))}" for number, counts in self.ticks.items()]
        self.stat.write_text(
            "\n".join(["cpu  4000 0 2000 36000 400 0 0 0 1200 0", *lines, "intr 17 4 8", "ctxt 99", ""])
        )

    def run(self, busy: dict[int, float], kind: int = 0, own: float = 0.0, seconds: float = SECONDS) -> None:
        """CPUs are busy for these shares of the time with a kind of work, the process for `own` CPUs' time."""
        for number, counts in self.ticks.items():
            share = busy.get(number, 0.0)
            counts[kind] += round(100 * seconds * share)
            counts[3] += round(100 * seconds * (1 - share))
        self.clock += seconds
        self.own += own * seconds
        self.write()


@pytest.fixture
def fake(monkeypatch, tmp_path: Path) -> FakeMachine:
    return FakeMachine(monkeypatch, tmp_path)


def test_busy_cpus_that_are_not_ours(fake: FakeMachine):
    others = OtherProcesses()
    fake.run({0: 1.0, 1: 1.0, 3: 0.5}, own=0.5)  # CPU 0 is none that we may use
    assert others.cpus() == pytest.approx(1.0)
    fake.run({}, seconds=2 * SECONDS)
    assert others.cpus() == pytest.approx(1.0 / 3)


@pytest.mark.parametrize(("kind", "counted"), [(1, 1.0), (2, 1.0), (4, 0.0), (7, 1.0), (8, 0.0)])
def test_waiting_for_a_disk_is_idle_and_for_a_hypervisor_is_not(fake: FakeMachine, kind: int, counted: float):
    """Nice, system, iowait, steal; and a guest's time, which the kernel has counted as a user's already."""
    others = OtherProcesses()
    fake.run({1: 1.0} if kind != 8 else {}, kind)
    if kind == 8:
        fake.ticks[1][kind] += round(100 * SECONDS)
        fake.write()
    assert others.cpus() == pytest.approx(counted)


def test_own_work_and_that_of_children_that_ended_is_not_others(fake: FakeMachine):
    others = OtherProcesses()
    fake.run({1: 1.0, 3: 1.0}, own=1.5)
    fake.children += 0.5 * SECONDS
    assert others.cpus() == pytest.approx(0.0)
    fake.own += 1.0  # counted finer than the kernel's ticks: never below nothing
    assert others.cpus() == 0.0


def test_children_that_still_run_are_others_unless_they_help(fake: FakeMachine):
    used = iter((3.0, 3.0 + 1.5 * SECONDS))  # by helpers, so far
    others = OtherProcesses(lambda: next(used))
    fake.run({1: 1.0, 3: 1.0}, own=0.25)
    assert others.cpus() == pytest.approx(0.25)


def test_a_short_time_tells_nothing(fake: FakeMachine):
    others = OtherProcesses()
    fake.run({1: 1.0}, seconds=0.3)
    assert others.cpus() is None


@pytest.mark.parametrize("lacking", ["file", "counts"])
def test_without_counts_of_the_kernel_it_is_the_load(fake: FakeMachine, lacking: str):
    if lacking == "file":
        machine.PROC_STAT.unlink()
    others = OtherProcesses()
    fake.clock += SECONDS
    fake.own += SECONDS
    fake.load = 1.75
    assert others.cpus() == pytest.approx(0.75)
    del fake.os.getloadavg
    assert others.cpus() is None
    assert describe_others(None, threads=2) == ""


def test_a_busy_process_beside_us_is_seen():
    """Whatever else runs: this one sleeps, and what keeps a CPU busy for the whole time is not it."""
    child = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        cpus = machine.look_around()
    finally:
        child.kill()
        child.communicate()
    if machine.PROC_STAT.exists():
        assert cpus > 0.5
        assert "busy with other processes: these times are too long" in describe_others(cpus, machine.count_cpus())


@pytest.mark.parametrize(
    ("cpus", "threads", "worst", "sentence"),
    [
        (0.04, 2, None, "0.0 of 2 CPUs busy with other processes"),
        (0.9, 2, None, "0.9 of 2 CPUs busy with other processes: these times are too long and spread; run again on an "
         "idle machine"),
        (0.12, 2, 0.05, "0.1 of 2 CPUs busy with other processes (0.1 in the worst measurement): these times are too "
         "long and spread; run again on an idle machine"),
        (0.12, 1, None, "0.1 of 2 CPUs busy with other processes"),
        (0.05, 2, 1.4, "0.1 of 2 CPUs busy with other processes (1.4 in the worst measurement): these times are too "
         "long and spread; run again on an idle machine"),
    ],
)  # fmt: skip
def test_the_sentence(fake: FakeMachine, cpus: float, threads: int, worst: float | None, sentence: str):
    assert describe_others(cpus, threads, worst) == sentence


@pytest.mark.parametrize(
    ("cpus", "threads", "remedy"), [(None, 2, ""), (0.3, 2, ""), (1.0, 1, ""), (1.0, 2, "OMP_NUM_THREADS=1"),
                                    (2.0, 2, "OMP_NUM_THREADS=1")],
)  # fmt: skip
def test_threads_that_find_no_cpu_are_told_of(monkeypatch, cpus, threads, remedy):
    monkeypatch.setattr(machine, "count_cpus", lambda: 2)
    assert remedy in advise_threads(cpus, threads) and bool(advise_threads(cpus, threads)) == bool(remedy)
