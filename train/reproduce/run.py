"""`tnt reproduce table3` from its arguments to table3.md, table3.png and table3.json. Read `run_table3`."""

from __future__ import annotations

import signal
import sys

import torch

from ..bench.timing import Deadline
from ..common.machine import describe_machine
from ..common.output_folder import OutputFolder
from ..data import TokenizedData, load_data, load_tokenizer
from ..loop.run_folder import RunFolder
from ..loop.signals import Stopper
from .arguments import Table3Arguments
from .jobs import Job, find_other_settings, make_jobs
from .picture import describe_lines, draw_table
from .report import Table, describe, write_json, write_markdown
from .results import bytes_per_token, collect, judge, read_score
from .runner import Runner
from .scales import SCALES

COMMAND = "reproduce table3"
RUNS = "runs"
MARKDOWN, PICTURE, JSON = "table3.md", "table3.png", "table3.json"


def run_table3(arguments: Table3Arguments) -> int:
    """The command `tnt reproduce table3`: returns its exit status, and prints errors to stderr.

    0: done, or the time limit was reached; 1: a run failed, or a result could not be written; 2: arguments or data that
    cannot be used; 130: interrupted from the keyboard; 143: by SIGTERM. What was finished is kept and reported, and the
    same command goes on.
    """
    try:
        resolved = arguments.resolve()
        with OutputFolder(resolved.output_dir, COMMAND).hold():
            reproduction = _prepare(resolved)
            try:
                return reproduction.run()
            except OSError as error:
                return _fail(f"{error}; the same command goes on", status=1)
    except (ValueError, TypeError, OSError) as error:
        return _fail(error, status=2)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", status=130)


def _prepare(arguments: Table3Arguments) -> Reproduction:
    """Check the recipes of all runs and the output folder, and read the data. Nothing is trained.

    Raises ValueError for settings that cannot be used, and OSError for data or a tokenizer that cannot be read.
    """
    jobs = make_jobs(arguments)
    _take_folder(OutputFolder(arguments.output_dir, COMMAND), jobs, overwrite=arguments.overwrite)
    others = find_other_settings(jobs)
    if others:
        more = [f"and {len(others) - 5} more"] if len(others) > 5 else []
        head = f"--output-dir {arguments.output_dir} holds other runs; give another folder, or --overwrite:"
        raise ValueError("\n  ".join([head, *others[:5], *more]))
    # Tokenised here, once: the runs find it in the cache.
    options = jobs[0].recipe.data
    return Reproduction(arguments, jobs, load_data(options, load_tokenizer(options.tokenizer)))


class Reproduction:
    """All runs, then the reports."""

    def __init__(self, arguments: Table3Arguments, jobs: list[Job], data: TokenizedData):
        self.arguments, self.jobs, self.data = arguments, jobs, data
        self.folder, self.deadline = arguments.output_dir, Deadline(arguments.time_limit)

    def run(self) -> int:
        """Returns the exit status. Raises OSError for a result that cannot be written."""
        self._print_start()
        with Stopper() as stopper:
            runner = Runner(
                self.jobs, workers=self.arguments.workers, device=self.arguments.device, stopper=stopper,
                deadline=self.deadline,
            )  # fmt: skip
            runner.run()
        table = self._report(runner.failures)
        print(f"\n{describe(table)}\n\nresults  {self.folder}: {MARKDOWN}, {PICTURE}, {JSON}", flush=True)
        return self._status(table, runner.failures, stopper.signal)

    def _status(self, table: Table, failures: dict[str, str], stop: int | None) -> int:
        left = f"{len(table.missing)} of {len(self.jobs)} runs are left; the same command goes on"
        if stop is not None:
            return _fail(f"stopped; {left}", status=143 if stop == signal.SIGTERM else 130)
        if failures:
            return _fail(f"{len(failures)} runs failed, see {self.folder / MARKDOWN}; {left}", status=1)
        if table.missing:
            print(f"\nthe time limit of {self.arguments.time_limit:g} s is over; {left}", flush=True)
        return 0

    def _print_start(self) -> None:
        args, steps = self.arguments, sum(job.steps for job in self.jobs)
        done = sum(job.finished for job in self.jobs)
        at_once = f"{args.workers} at once, one thread each" if args.device == "cpu" else "one after the other"
        print(
            f"scale    {args.scale}: {SCALES[args.scale].help}\n"
            f"data     {self.data.description}\n"
            f"runs     {len(self.jobs)} of {steps:,} steps in all, on {args.device}, {at_once}"
            f"{f'; {done} are finished' if done else ''}\n"
            f"results  {self.folder}; each run has its log in {self.folder / RUNS}\n",
            flush=True,
        )

    def _report(self, failures: dict[str, str]) -> Table:
        table = self._make_table(failures)
        write_json(table, self.folder / JSON)
        write_markdown(table, self.folder / MARKDOWN)
        draw_table(self.folder / PICTURE, describe_lines(table.results), scale=self.arguments.scale)
        return table

    def _make_table(self, failures: dict[str, str]) -> Table:
        results = collect(self.arguments.rows, self.jobs, failures)
        some = next((job for job in self.jobs if job.finished), None)
        scored = 0 if some is None else read_score(some).validation_tokens
        return Table(
            arguments=self.arguments, jobs=self.jobs, results=results, verdicts=judge(results),
            description=self.data.description, machine=describe_machine(torch.device(self.arguments.device)),
            validation_tokens=scored,
            bytes_per_token=None if some is None else bytes_per_token(self.data, some.recipe, scored),
        )  # fmt: skip


def _take_folder(folder: OutputFolder, jobs: list[Job], *, overwrite: bool) -> None:
    """List what will be written. The runs list their own files, each in its folder.

    Raises ValueError for a user's files in the way, and for a run in progress, which one that was killed may leave.
    """
    names = [MARKDOWN, PICTURE, JSON]
    names += [f"{RUNS}/{job.name}.{kind}" for job in jobs for kind in ("yaml", "log")]
    runs = {job.folder.root for job in jobs}
    runs |= {(folder.root / name).with_suffix("") for name in folder.listed() if name.startswith(f"{RUNS}/")}
    problems = [held for root in runs for held in RunFolder(root).find_holder()]
    # One of an earlier version kept no list; its runs tell that it is one, and it can be gone on with.
    if overwrite or not any(job.folder.holds_run() for job in jobs):
        problems += folder.find_problems(names, overwrite=True)
    if problems:
        raise ValueError("\n  ".join(problems))
    if overwrite:
        for root in runs:
            RunFolder(root).clear()
        folder.clear()
    folder.claim(names)


def _fail(error: BaseException | str, status: int) -> int:
    print(f"\ntnt reproduce table3: error: {error}", file=sys.stderr)
    return status
