"""Runs of the trainer as processes, a few at once, that can be stopped and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..bench.timing import Deadline
from ..loop.signals import Stopper
from .branch import begin_from_first_stage
from .jobs import Job, write_recipe
from .paper import ROWS
from .results import read_score

POLL_SECONDS = 0.2
ERROR_MARK = "error: "


@dataclass
class Process:
    """A run in progress. `log_start`: bytes that its log had before."""

    job: Job
    handle: subprocess.Popen[bytes]
    log: Path
    log_start: int
    began: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Runner:
    """Runs jobs, at most `workers` at once, in their order as far as what they begin with is finished.

    failures  the reason of each run that failed, by its name. A failure stops no other run but those that begin with
              it; the next start of the same command tries again.
    """

    def __init__(self, jobs: list[Job], *, workers: int, device: str, stopper: Stopper, deadline: Deadline):
        self.jobs, self.workers, self.device = {job.name: job for job in jobs}, workers, device
        self.stopper, self.deadline = stopper, deadline
        self.waiting = [job for job in jobs if not job.finished]
        self.running: list[Process] = []
        self.done = len(jobs) - len(self.waiting)
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, list[tuple[int, float]]] = {}  # by row: steps and seconds of the runs finished here

    def run(self) -> None:
        """Until all runs are finished or have failed, or a signal or the time limit ends it: then each run is asked to
        save and waited for."""
        try:
            while (self.waiting or self.running) and not self.stopping:
                self._start_ready()
                time.sleep(POLL_SECONDS)
                self._reap()
            self._stop_running()
        finally:
            for process in self.running:  # after a second Ctrl-C
                process.handle.kill()
                process.handle.wait()

    @property
    def stopping(self) -> bool:
        return self.stopper.signal is not None or self.deadline.refuse() is not None

    # -------------------------------------------------------------------------------------------------------- starting

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if len(self.running) == self.workers:
                return
            if job.parent in self.failures:
                self._fail(job, f"{job.parent}, which it begins with, failed")
            elif job.parent is None or self.jobs[job.parent].finished:
                self._start(job)

    def _start(self, job: Job) -> None:
        self.waiting.remove(job)
        runs = job.folder.root.parent
        try:
            if job.parent is not None:
                begin_from_first_stage(job, self.jobs[job.parent])
            recipe = write_recipe(job, runs)
        except (OSError, ValueError) as error:
            self._fail(job, str(error))
            return
        log = runs / f"{job.name}.log"
        log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            handle = subprocess.Popen(
                trainer_command(recipe),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._environment(),
            )  # fmt: skip
        self.running.append(Process(job, handle, log, log_start, time.monotonic()))

    def _environment(self) -> dict[str, str]:
        if self.device == "cuda":
            return dict(os.environ)
        # One thread for each run: matrices of this size gain little from a second one, which another run can use.
        return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    # --------------------------------------------------------------------------------------------------------- ending

    def _reap(self) -> None:
        for process in list(self.running):
            status = process.handle.poll()
            if status is None:
                continue
            self.running.remove(process)
            job = process.job
            if status == 0 and job.finished:
                self.seconds.setdefault(job.row, []).append((job.steps, process.seconds))
                score = f"{read_score(job).bits_per_byte:.4f} bits/byte"
                self._report(job, f"{score}, {describe_seconds(process.seconds)}{self._time_left()}")
            elif not self.stopping:
                self._fail(job, _find_reason(process, status))

    def _fail(self, job: Job, reason: str) -> None:
        if job in self.waiting:
            self.waiting.remove(job)
        self.failures[job.name] = reason
        self._report(job, f"failed: {reason}")

    def _stop_running(self) -> None:
        for process in self.running:
            process.handle.send_signal(signal.SIGTERM)
        if self.running:
            print(f"stopping: {len(self.running)} runs save where they stand ...", flush=True)
        while self.running:
            time.sleep(POLL_SECONDS)
            self._reap()

    # -------------------------------------------------------------------------------------------------------- progress

    def _report(self, job: Job, words: str) -> None:
        self.done += 1
        width = len(str(len(self.jobs)))
        print(f"[{self.done:>{width}}/{len(self.jobs)}] seed {job.seed}, {ROWS[job.row].title}: {words}", flush=True)

    def _time_left(self) -> str:
        """From the runs of the same row that are finished, or from the average time of a step."""
        if not self.waiting and not self.running:
            return ""
        left = sum(self._expected(job) for job in self.waiting)
        left += sum(max(0.0, self._expected(p.job) - p.seconds) for p in self.running)
        return f"; about {describe_seconds(left / self.workers)} left"

    def _expected(self, job: Job) -> float:
        known = self.seconds.get(job.row) or [pair for pairs in self.seconds.values() for pair in pairs]
        return job.steps * sum(seconds for _, seconds in known) / sum(steps for steps, _ in known)


def trainer_command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "modeling_tnt.train", "--config", str(recipe), "--resume"]


def describe_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _find_reason(process: Process, status: int) -> str:
    """What the trainer said last, or how its process ended."""
    text = process.log.read_bytes()[process.log_start :].decode("utf-8", errors="replace")
    if ERROR_MARK in text:
        return " ".join(text.rpartition(ERROR_MARK)[2].split())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if status < 0:
        return f"ended by {signal.Signals(-status).name} (too little memory may be the cause); see {process.log}"
    return f"{lines[-1] if lines else f'exit status {status}'}; see {process.log}"
