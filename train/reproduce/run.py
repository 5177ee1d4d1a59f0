"""`tnt reproduce table3` from its arguments to table3.md, table3.png and table3.json. Read `run_table3`."""

from __future__ import annotations

import math
import signal
import time

import torch

from ..common.machine import describe_machine
from ..common.output_folder import OutputFolder
from ..data import TokenizedData, load_data, load_tokenizer
from ..loop.signals import Stopper
from ..options import fail
from .arguments import Table3Arguments
from .jobs import make_jobs
from .picture import describe_lines, draw_table
from .report import Table, describe, write_json, write_markdown
from .results import bytes_per_token, collect
from .runs import RUNS, Job, Runner, claim_runs
from .scales import SCALES

COMMAND = "reproduce table3"
MARKDOWN, PICTURE, JSON = "table3.md", "table3.png", "table3.json"


def run_table3(arguments: Table3Arguments) -> int:
    """The command `tnt reproduce table3`: returns its exit status, and prints errors to stderr.

    0: done, or the time limit was reached; 1: a run failed, or a result could not be written; 2: arguments or data that
    cannot be used; 130: interrupted from the keyboard; 143: by SIGTERM. What was finished is kept and reported, and the
    same command goes on.
    """
    try:
        arguments = arguments.resolve()
        folder = OutputFolder(arguments.output_dir, COMMAND)
        with folder.hold():
            jobs = make_jobs(arguments)
            claim_runs(folder, jobs, [MARKDOWN, PICTURE, JSON], overwrite=arguments.overwrite)
            # Tokenised here, once: the runs find it in the cache.
            options = jobs[0].recipe.data
            data = load_data(options, load_tokenizer(options.tokenizer))
            try:
                return _run(arguments, jobs, data)
            except OSError as error:
                return fail(COMMAND, f"{error}; the same command goes on", status=1)
    except (ValueError, TypeError, OSError) as error:
        return fail(COMMAND, error, status=2)
    except KeyboardInterrupt:
        return fail(COMMAND, "interrupted; the same command goes on", status=130)


def _run(arguments: Table3Arguments, jobs: list[Job], data: TokenizedData) -> int:
    """All runs, then the reports. Raises OSError for a result that cannot be written."""
    _print_start(arguments, jobs, data)
    ends = time.monotonic() + (arguments.time_limit or math.inf)
    with Stopper() as stopper:
        failures = Runner(
            jobs, workers=arguments.workers, device=arguments.device,
            stopping=lambda: stopper.signal is not None or time.monotonic() >= ends,
        ).run()  # fmt: skip
    table, folder = _make_table(arguments, jobs, data, failures), arguments.output_dir
    write_json(table, folder / JSON)
    write_markdown(table, folder / MARKDOWN)
    draw_table(folder / PICTURE, describe_lines(table.results), scale=arguments.scale)
    print(f"\n{describe(table)}\n\nresults  {folder}: {MARKDOWN}, {PICTURE}, {JSON}", flush=True)

    left = f"{len(table.missing)} of {len(jobs)} runs are left; the same command goes on"
    if stopper.signal is not None:
        return fail(COMMAND, f"stopped; {left}", status=143 if stopper.signal == signal.SIGTERM else 130)
    if failures:
        return fail(COMMAND, f"{len(failures)} runs failed, see {folder / MARKDOWN}; {left}", status=1)
    if table.missing:
        print(f"\nthe time limit of {arguments.time_limit:g} s is over; {left}", flush=True)
    return 0


def _print_start(arguments: Table3Arguments, jobs: list[Job], data: TokenizedData) -> None:
    done, steps, folder = sum(job.finished for job in jobs), sum(job.steps for job in jobs), arguments.output_dir
    at_once = f"{arguments.workers} at once, one thread each" if arguments.device == "cpu" else "one after the other"
    print(
        f"scale    {arguments.scale}: {SCALES[arguments.scale].help}\n"
        f"data     {data.description}\n"
        f"runs     {len(jobs)} of {steps:,} steps in all, on {arguments.device}, {at_once}"
        f"{f'; {done} are finished' if done else ''}\n"
        f"results  {folder}; each run has its log in {folder / RUNS}\n",
        flush=True,
    )


def _make_table(arguments: Table3Arguments, jobs: list[Job], data: TokenizedData, failures: dict[str, str]) -> Table:
    some = next((job for job in jobs if job.finished), None)
    return Table(
        arguments=arguments, jobs=jobs, results=collect(arguments.rows, jobs, failures), description=data.description,
        machine=describe_machine(torch.device(arguments.device)),
        validation_tokens=0 if some is None else some.metrics["validation_tokens"],
        bytes_per_token=None if some is None else bytes_per_token(data, some),
    )  # fmt: skip
