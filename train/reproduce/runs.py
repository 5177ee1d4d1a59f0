"""A list of resumable training runs: each is `tnt train --resume` in a process of its own, a few of them at once.

An experiment makes a list of `Job`s, claims its output folder for them (`claim_runs`) and runs them (`Runner.run`). The
same list again skips what is finished and resumes what is not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from modeling_tnt import TNTConfig

from ..common.files import atomic_folder, files_below
from ..common.output_folder import OutputFolder
from ..loop.run_folder import RunFolder
from ..loop.state import score_key
from ..options import to_mapping
from ..plan import Stage, find_differences
from ..recipe import Recipe, load_recipe

RUNS = "runs"  # below the output folder: NAME.yaml, NAME.log and the folder NAME of each run
POLL_SECONDS = 0.2
ERROR_MARK = "error: "
SHOWN = 5  # differences that a message names


@dataclass(frozen=True)
class Job:
    """One run of the trainer.

    row, title, seed  which row of a table, the row in words, and the seed.
    recipe            complete; `output.dir` is the run's own folder, which has the run's name.
    stages            as the trainer will plan them.
    config            of the model that the first stage starts from; of a Llama, the TNT model that it is as large as.
    parent            the run whose first stage this one goes on from.
    """

    row: str
    title: str
    seed: int
    recipe: Recipe
    stages: list[Stage]
    config: TNTConfig
    parent: Job | None = None

    @property
    def name(self) -> str:
        return self.recipe.output.dir.name

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.output.dir)

    def beside(self, kind: str) -> Path:
        """The run's recipe ("yaml") or what it printed ("log")."""
        return self.folder.root.with_name(f"{self.name}.{kind}")

    @property
    def steps(self) -> int:
        """Optimizer steps that this run takes itself."""
        return sum(stage.steps for stage in (self.stages[1:] if self.parent else self.stages))

    @property
    def finished(self) -> bool:
        return self.folder.metrics_file.is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """Of a finished run. A loss that is not finite is NaN."""
        return json.loads(self.folder.metrics_file.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------- output folder


def claim_runs(folder: OutputFolder, jobs: Sequence[Job], results: Sequence[str], *, overwrite: bool) -> None:
    """List in `folder` what will be written: `results`, and each run's recipe and log. Runs list their own files.

    Raises ValueError for a user's files in the way, for a run in progress, which a command that was killed may have
    left, and for runs that were made with other settings.
    """
    _take_folder(folder, jobs, results, overwrite=overwrite)
    others = find_other_settings(jobs)
    if others:
        more = [f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        head = f"--output-dir {folder.root} holds other runs; give another folder, or --overwrite:"
        raise ValueError("\n  ".join([head, *others[:SHOWN], *more]))


def _take_folder(folder: OutputFolder, jobs: Sequence[Job], results: Sequence[str], *, overwrite: bool) -> None:
    names = [*results, *(f"{RUNS}/{job.name}.{kind}" for job in jobs for kind in ("yaml", "log"))]
    roots = {job.folder.root for job in jobs}
    roots |= {(folder.root / name).with_suffix("") for name in folder.listed() if name.startswith(f"{RUNS}/")}
    problems = [held for root in roots for held in RunFolder(root).find_holder()]
    # One of an earlier version kept no list; its runs tell that it is one, and it can be resumed.
    if overwrite or not any(job.folder.holds_run() for job in jobs):
        problems += folder.find_problems(names, overwrite=True)
    if problems:
        raise ValueError("\n  ".join(problems))
    if overwrite:
        for root in roots:
            RunFolder(root).clear()
        folder.clear()
    folder.claim(names)


def find_other_settings(jobs: Sequence[Job]) -> list[str]:
    """Runs that are there and were made with other settings, as problems."""
    return [
        f"{job.folder.root} was made with {path}={old}, now it is {new}"
        for job in jobs if job.folder.recipe_file.exists()
        for path, old, new in find_differences(load_recipe(str(job.folder.recipe_file)), job.recipe)
    ]  # fmt: skip


def begin_from_first_stage(job: Job) -> None:
    """Give `job` the last checkpoint of its parent's first stage, as if it had trained that stage itself and been
    stopped there; `--resume` then goes on with the second stage, on the same data in the same order.

    Does nothing when the run has begun already. Raises OSError without such a checkpoint, or when it cannot be written,
    ValueError for a damaged manifest of the run.
    """
    if job.folder.holds_run():
        return
    parent, stage = job.parent.folder, job.parent.stages[0]
    checkpoint = parent.checkpoint(stage.name, stage.steps)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is missing, from which this run begins; --overwrite trains it again")
    with atomic_folder(job.folder.root) as path:
        fresh = RunFolder(path)
        shutil.copytree(checkpoint, fresh.checkpoint(stage.name, stage.steps))
        shutil.copyfile(parent.log_file, fresh.log_file)  # the trainer cuts off what came after the checkpoint
        _write_recipe(job, fresh.recipe_file)
        fresh.claim(file.relative_to(path).as_posix() for file in files_below(path))


def _write_recipe(job: Job, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_mapping(job.recipe), sort_keys=False), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- processes


class Process(NamedTuple):
    """A run in progress. `log_start`: bytes that its log had before; `began`: on the monotonic clock."""

    job: Job
    handle: subprocess.Popen[bytes]
    log_start: int
    began: float


class Runner:
    """Runs jobs, at most `workers` at once, in their order, each once its parent, a job before it, is finished.

    stopping  returns true when no more runs are to be started, and those in progress are to save and end.
    failures  the reason of each run that failed, by its name. A failure stops only the runs that begin with it; the
              next start tries again.
    """

    def __init__(self, jobs: Sequence[Job], *, workers: int, device: str, stopping: Callable[[], bool]):
        self.jobs, self.workers, self.device, self.stopping = jobs, workers, device, stopping
        self.waiting = [job for job in jobs if not job.finished]
        self.running: list[Process] = []
        self.done = len(jobs) - len(self.waiting)
        self.failures: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Returns the failures, once all runs are finished or have failed, or have saved where they were stopped."""
        try:
            while (self.waiting or self.running) and not self.stopping():
                self._start_ready()
                time.sleep(POLL_SECONDS)
                self._reap()
            self._stop_running()
        finally:
            for process in self.running:  # after a second Ctrl-C
                process.handle.kill()
                process.handle.wait()
        return self.failures

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if len(self.running) == self.workers:
                return
            if job.parent is None or job.parent.finished or job.parent.name in self.failures:
                self.waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        if job.parent is not None and not job.parent.finished:
            self._fail(job, f"{job.parent.name}, which it begins with, failed")
            return
        try:
            if job.parent is not None:
                begin_from_first_stage(job)
            _write_recipe(job, job.beside("yaml"))
        except (OSError, ValueError) as error:
            self._fail(job, str(error))
            return
        with job.beside("log").open("ab") as log:
            log_start = log.tell()
            handle = subprocess.Popen(
                trainer_command(job.beside("yaml")),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment(self.device),
            )  # fmt: skip
        self.running.append(Process(job, handle, log_start, time.monotonic()))

    def _reap(self) -> None:
        for process in list(self.running):
            status, job = process.handle.poll(), process.job
            if status is None:
                continue
            self.running.remove(process)
            if status == 0 and job.finished:
                score = job.metrics["validation_bits_per_byte"][score_key(job.stages[-1].name)]
                took = tqdm.format_interval(time.monotonic() - process.began)
                self._report(job, f"{score:.4f} bits/byte, {took}")
            elif not self.stopping():
                self._fail(job, _find_reason(process, status))

    def _stop_running(self) -> None:
        for process in self.running:
            process.handle.send_signal(signal.SIGTERM)
        if self.running:
            print(f"stopping: {len(self.running)} runs save where they stand ...", flush=True)
        while self.running:
            time.sleep(POLL_SECONDS)
            self._reap()

    def _fail(self, job: Job, reason: str) -> None:
        self.failures[job.name] = reason
        self._report(job, f"failed: {reason}")

    def _report(self, job: Job, words: str) -> None:
        self.done += 1
        width = len(str(len(self.jobs)))
        print(f"[{self.done:>{width}}/{len(self.jobs)}] seed {job.seed}, {job.title}: {words}", flush=True)


def environment(device: str) -> dict[str, str]:
    """Of a run's process."""
    if device == "cuda":
        return dict(os.environ)
    # One thread for each run: matrices of this size gain little from a second one, which another run can use.
    return os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def trainer_command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "modeling_tnt.train", "--config", str(recipe), "--resume"]


def _find_reason(process: Process, status: int) -> str:
    """What the trainer said last, or how its process ended."""
    log = process.job.beside("log")
    text = log.read_bytes()[process.log_start :].decode("utf-8", errors="replace")
    if ERROR_MARK in text:
        return " ".join(text.rpartition(ERROR_MARK)[2].split())
    if status < 0:
        return f"ended by {signal.Signals(-status).name} (too little memory may be the cause); see {log}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{lines[-1] if lines else f'exit status {status}'}; see {log}"
