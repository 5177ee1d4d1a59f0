"""`tnt eval` from its arguments to a JSON file and a picture of each task. Read `run_eval`, then `evaluate`."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from modeling_tnt.context_parallel import ContextParallelError

from ..common.errors import is_out_of_memory
from ..common.files import atomic_file
from ..common.progress import progress_bar
from ..data import Rows, load_data
from ..options import fail, to_mapping
from .arguments import DTYPES, TASKS, EvalArguments
from .position import PositionCurve, bin_positions, join_positions, position_edges
from .processes import Processes, start_processes
from .scores import Scores, TokenLosses, iterate_losses, join_scores
from .subjects import Subject, find_subjects, find_tokenizer, load_model
from .task import Setup, Task


@dataclass(frozen=True)
class Evaluation:
    """Everything that the tasks need, checked and loaded."""

    arguments: EvalArguments
    tasks: dict[str, Task]
    remarks: list[str]
    subjects: list[Subject]
    models: dict[str, PreTrainedModel]
    rows: Rows
    description: str
    processes: Processes
    _read: dict[str, tuple[Scores, PositionCurve]] = field(default_factory=dict)

    def read_rows(self, label: str) -> tuple[Scores, PositionCurve]:
        """Scores and positions of the model as configured, from one pass over the rows, which is made once."""
        if label not in self._read:
            edges, scores, curves = position_edges(self.arguments.seq_len), [], []
            for losses in self.iterate(label, label):
                scores.append(losses.sum_rows())
                curves.append(bin_positions(losses, edges))
            self._read[label] = join_scores(scores), join_positions(curves)
        return self._read[label]

    def iterate(self, label: str, name: str) -> Iterator[TokenLosses]:
        """The losses of the model as it is, batch by batch, beside a progress bar called `name`."""
        model, processes = self.models[label], self.processes
        bar = progress_bar(len(self.rows), name, "row", leave=False, active=processes.is_main)
        with bar, processes.reading_together(model):
            yield from iterate_losses(model, self.rows, batch_size=self.arguments.batch_size, on_batch=bar.update)


def run_eval(arguments: EvalArguments) -> int:
    """The command `tnt eval`: returns its exit status, and prints errors to stderr.

    0: done; 1: a result could not be written, memory ran out, or another process was lost; 2: arguments, models or
    data that cannot be used; 130: interrupted from the keyboard. What was finished before is kept.
    """
    try:
        evaluation = prepare(arguments)
    except (ValueError, OSError) as error:
        return fail("eval", error, status=2)
    except KeyboardInterrupt:
        return fail("eval", "interrupted before the evaluation began", status=130)
    try:
        evaluate(evaluation)
    except (ContextParallelError, OSError) as error:
        return fail("eval", error, status=1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return fail(
            "eval", f"out of memory; lower --batch-size, or --seq-len and --retrieval-lengths ({error})", status=1
        )
    except KeyboardInterrupt:
        return fail("eval", f"interrupted; finished tasks are kept in {arguments.output_dir}", status=130)
    return 0


def prepare(arguments: EvalArguments) -> Evaluation:
    """Check the arguments, load models and data, and make the documents. Nothing is computed or written.

    Raises:
        ValueError: for arguments that cannot be used, all of them at once, or data that does not fit them.
        OSError: for models or data that cannot be read.
    """
    problems = arguments.problems()
    subjects = find_subjects([arguments.model, *arguments.compare], problems) if arguments.model else []
    complete = len(subjects) == 1 + len(arguments.compare)
    tokenizer = find_tokenizer(arguments.data.tokenizer, subjects, problems) if complete else None
    setup = Setup(arguments, subjects, tokenizer, problems)
    tasks = choose_tasks(setup)
    if problems:
        raise ValueError("\n  ".join(["this evaluation cannot be done:", *problems]))

    device, dtype = arguments.torch_device(), DTYPES[arguments.dtype]
    processes = start_processes(arguments.context_parallel, device)
    if processes.is_main:
        print("loading models and data ...", flush=True)
    models = {subject.label: load_model(subject, device, dtype) for subject in subjects}
    with processes.main_first():
        data = load_data(arguments.data, tokenizer)
    rows = data.validation.rows(arguments.seq_len, arguments.data.boundaries)
    if len(rows) == 0:
        raise ValueError(
            f"--seq-len {arguments.seq_len} is more than the {data.validation.num_tokens:,} tokens that are held out; "
            "use a smaller one, more text, or a larger --data.validation-share"
        )
    rows = rows.head(max(1, arguments.eval_tokens // arguments.seq_len))
    return Evaluation(arguments, tasks, setup.remarks, subjects, models, rows, data.description, processes)


def choose_tasks(setup: Setup) -> dict[str, Task]:
    """The tasks that are asked for, in the order of `TASKS`. One that cannot be done is a problem where it was named,
    and otherwise left out with a remark."""
    arguments, tasks = setup.arguments, {}
    for name in (name for name in TASKS if name in (arguments.tasks or TASKS)):
        task = resolve_name(f"{__package__}.{TASKS[name]}")()
        obstacle = task.prepare(setup)
        if obstacle is None:
            tasks[name] = task
        elif name in arguments.tasks:
            setup.problems.append(f"--tasks {name} cannot be done: {obstacle}")
        else:
            setup.remarks.append(f"the task {name} is left out: {obstacle}")
    longest = max([arguments.seq_len, *(task.longest for task in tasks.values())])
    for source, limit, usual in ((s.source, s.limit, s.longest) for s in setup.subjects):
        if limit is not None and arguments.seq_len > limit:
            setup.problems.append(
                f"--seq-len {arguments.seq_len} is more than the {limit} positions of {source}; use at most that"
            )
        if usual is not None and longest > usual:
            setup.remarks.append(f"{source} was made for {usual:,} tokens and reads up to {longest:,} here")
    for subject in setup.subjects if arguments.context_parallel > 1 else []:
        if not subject.is_tnt:
            kind = subject.config.model_type
            setup.remarks.append(f"{subject.source} is a {kind} model, so each process reads its whole rows by itself")
    return tasks


def evaluate(evaluation: Evaluation) -> None:
    """Do the tasks one after the other, each written to `output_dir` when it is done."""
    from_main = evaluation.processes.from_main
    from_main(partial(_begin, evaluation))
    for name, task in evaluation.tasks.items():
        began = time.perf_counter()
        results = {label: task.measure(evaluation, label) for label in evaluation.models}
        seconds = time.perf_counter() - began
        from_main(partial(_finish, evaluation, name, results, seconds))
    if evaluation.processes.is_main:
        print(f"\nresults  {evaluation.arguments.output_dir}: a JSON file and a PNG of each task", flush=True)


def _begin(evaluation: Evaluation) -> None:
    """Say what is evaluated, and list in the output folder what will be written."""
    arguments, rows = evaluation.arguments, evaluation.rows
    together = f", each read by {arguments.context_parallel} processes" if arguments.context_parallel > 1 else ""
    for subject in evaluation.subjects:
        model = evaluation.models[subject.label]
        chunks = f", local chunks {model.config.local_chunk_sizes}" if subject.has_local_memories else ""
        print(f"model    {subject.label}: {model.num_parameters() / 1e6:.2f} M parameters, {model.dtype}{chunks}")
    print(f"data     {evaluation.description}")
    print(f"         {len(rows)} rows of {arguments.seq_len} held-out tokens{together}, on {arguments.torch_device()}")
    for remark in evaluation.remarks:
        print(f"note     {remark}")
    sys.stdout.flush()
    arguments.output.claim(arguments.results)


def _finish(evaluation: Evaluation, name: str, results: dict[str, Any], seconds: float) -> None:
    """Write a task's results, draw and print them."""
    task, folder = evaluation.tasks[name], evaluation.arguments.output_dir
    report = _head(evaluation, name) | {"seconds": seconds} | task.report(results)
    with atomic_file(folder / f"{name}.json") as path:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    task.draw(folder / f"{name}.png", results)
    print("\n".join([f"\n{name}", *(f"  {line}" for line in task.describe(results))]), flush=True)


def _head(evaluation: Evaluation, task: str) -> dict[str, Any]:
    """What every result says of how it was made."""
    return {
        "task": task,
        "sources": {subject.label: subject.source for subject in evaluation.subjects},
        "data": evaluation.description,
        "arguments": to_mapping(evaluation.arguments),
        "device": str(evaluation.arguments.torch_device()),
        "remarks": evaluation.remarks,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip
