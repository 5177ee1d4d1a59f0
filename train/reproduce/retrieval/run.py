"""`tnt reproduce retrieval` from its arguments to retrieval.md and retrieval.json. Read `run_retrieval`."""

from __future__ import annotations

import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ...common.output_folder import OutputFolder
from ...data import load_data, load_tokenizer
from ...loop.signals import Stopper
from ...options import fail
from ..runs import Job, Runner, claim_runs
from .arguments import RetrievalArguments
from .jobs import clear_evaluations, make_jobs, measure, texts_name
from .report import make_report, to_markdown, write_report
from .text import write_texts

COMMAND = "reproduce retrieval"
MARKDOWN, JSON = "retrieval.md", "retrieval.json"


def run_retrieval(arguments: RetrievalArguments) -> int:
    """The command `tnt reproduce retrieval`: returns its exit status, and prints errors to stderr.

    0: done, or the time limit was reached; 1: a run or an evaluation failed, or a result could not be written; 2:
    arguments that cannot be used; 130: interrupted from the keyboard; 143: by SIGTERM. The same command goes on.
    """
    try:
        arguments = arguments.resolve()
        folder = OutputFolder(arguments.output_dir, COMMAND)
        with folder.hold():
            jobs = _prepare(arguments, folder)
            try:
                return _run(arguments, jobs)
            except OSError as error:
                return fail(COMMAND, f"{error}; the same command goes on", status=1)
    except (ValueError, TypeError, OSError) as error:
        return fail(COMMAND, error, status=2)
    except KeyboardInterrupt:
        return fail(COMMAND, "interrupted; the same command goes on", status=130)


def _prepare(arguments: RetrievalArguments, folder: OutputFolder) -> list[Job]:
    """The runs, with the text and the folder that they need."""
    jobs, texts = make_jobs(arguments), texts_name(arguments)
    claim_runs(folder, jobs, [MARKDOWN, JSON, texts], overwrite=arguments.overwrite)
    if arguments.overwrite:
        clear_evaluations(arguments, jobs)
    if not (folder.root / texts).exists():
        write_texts(folder.root / texts, arguments.megabytes)
    options = jobs[0].recipe.data
    load_data(options, load_tokenizer(options.tokenizer))  # once: the runs find it in the cache
    return jobs


def _run(arguments: RetrievalArguments, jobs: list[Job]) -> int:
    done = sum(job.finished for job in jobs)
    print(f"{len(jobs)} runs of {arguments.steps} steps in {arguments.output_dir}; {done} are finished\n", flush=True)
    ends = time.monotonic() + (arguments.time_limit or math.inf)
    with Stopper() as stopper:
        failures = Runner(
            jobs, workers=arguments.workers, device=arguments.device,
            stopping=lambda: stopper.signal is not None or time.monotonic() >= ends,
        ).run()  # fmt: skip
        if stopper.signal is None:
            failures |= _measure_all(arguments, [job for job in jobs if job.finished])
    report = make_report(arguments, jobs, failures)
    write_report(report, arguments.output_dir / MARKDOWN, arguments.output_dir / JSON)
    print(f"\n{to_markdown(report)}", flush=True)
    left = f"{len(report.problems)} of {len(jobs)} runs are left; the same command goes on"
    if stopper.signal is not None:
        return fail(COMMAND, f"stopped; {left}", status=143 if stopper.signal == signal.SIGTERM else 130)
    if failures:
        return fail(COMMAND, f"{len(failures)} runs failed; {left}", status=1)
    return 0


def _measure_all(arguments: RetrievalArguments, jobs: list[Job]) -> dict[str, str]:
    """Evaluate what has not been, as many at once as runs; returns the reasons of those that failed."""
    with ThreadPoolExecutor(arguments.workers) as threads:
        reasons = threads.map(partial(measure, arguments), jobs)
        return {job.name: reason for job, reason in zip(jobs, reasons, strict=True) if reason is not None}
