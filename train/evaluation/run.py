"""`tnt eval` from its arguments to a JSON file and a picture of each task. Read `run_eval`, then `evaluate`."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..common.errors import is_out_of_memory
from ..common.files import atomic_file
from ..common.progress import progress_bar
from ..data import Rows, load_data
from ..options import to_mapping
from .arguments import DTYPES, EvalArguments
from .choice import choose_tasks, make_needles
from .chunks import ChunkCurve, default_chunk_sizes, describe_chunks, draw_chunks, measure_chunks, report_chunks
from .needles import Needle
from .perplexity import describe_perplexity, draw_perplexity, report_perplexity
from .position import (
    PositionCurve,
    bin_positions,
    describe_positions,
    draw_positions,
    join_positions,
    position_edges,
    report_positions,
)
from .retrieval import Retrieval, describe_retrieval, draw_retrieval, measure_retrieval, report_retrieval
from .scores import Scores, TokenLosses, iterate_losses, join_scores
from .subjects import Subject, find_subjects, find_tokenizer, load_model


@dataclass(frozen=True)
class Evaluation:
    """Everything that the tasks need, checked and loaded. `read` keeps what has been measured for several tasks."""

    arguments: EvalArguments
    tasks: list[str]
    remarks: list[str]
    subjects: list[Subject]
    models: dict[str, PreTrainedModel]
    rows: Rows
    description: str
    needles: dict[int, list[Needle]]
    read: dict[str, tuple[Scores, PositionCurve]] = field(default_factory=dict)


def run_eval(arguments: EvalArguments) -> int:
    """The command `tnt eval`: returns its exit status, and prints errors to stderr.

    0: done; 1: a result could not be written, or memory ran out; 2: arguments, models or data that cannot be used;
    130: interrupted from the keyboard. What was finished before is kept.
    """
    try:
        evaluation = prepare(arguments)
    except (ValueError, OSError) as error:
        return _fail(error, status=2)
    except KeyboardInterrupt:
        return _fail("interrupted before the evaluation began", status=130)
    try:
        evaluate(evaluation)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory; lower --batch-size, or --seq-len and --retrieval-lengths ({error})", status=1)
    except OSError as error:
        return _fail(error, status=1)
    except KeyboardInterrupt:
        return _fail(f"interrupted; finished tasks are kept in {arguments.output_dir}", status=130)
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
    choice = choose_tasks(arguments, subjects, problems)
    needles: dict[int, list[Needle]] = {}
    if tokenizer is not None:
        needles = make_needles(arguments, choice.retrieval_lengths, tokenizer, problems)
    if problems:
        raise ValueError("\n  ".join(["this evaluation cannot be done:", *problems]))

    print("loading models and data ...", flush=True)
    device, dtype = arguments.torch_device(), DTYPES[arguments.dtype]
    models = {subject.label: load_model(subject, device, dtype) for subject in subjects}
    data = load_data(arguments.data, tokenizer)
    rows = data.validation.rows(arguments.seq_len, arguments.data.boundaries)
    if len(rows) == 0:
        raise ValueError(
            f"--seq-len {arguments.seq_len} is more than the {data.validation.num_tokens:,} tokens that are held out; "
            "use a smaller one, more text, or a larger --data.validation-share"
        )
    rows = rows.head(max(1, arguments.eval_tokens // arguments.seq_len))
    return Evaluation(arguments, choice.tasks, choice.remarks, subjects, models, rows, data.description, needles)


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Do the tasks one after the other, each written to `output_dir` when it is done. Returns what the files hold."""
    arguments = evaluation.arguments
    _print_start(evaluation)
    arguments.output.claim(arguments.results)
    reports = {}
    for task in evaluation.tasks:
        began = time.perf_counter()
        results = {label: _MEASURES[task](evaluation, label) for label in evaluation.models}
        report = _head(evaluation, task) | {"seconds": time.perf_counter() - began} | _REPORTS[task](results)
        reports[task] = report
        with atomic_file(arguments.output_dir / f"{task}.json") as path:
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        _DRAWINGS[task](arguments.output_dir / f"{task}.png", results)
        print("\n".join([f"\n{task}", *(f"  {line}" for line in _DESCRIPTIONS[task](results))]), flush=True)
    print(f"\nresults  {arguments.output_dir}: a JSON file and a PNG of each task", flush=True)
    return reports


# --------------------------------------------------------------------------------------------------------- measuring


def _read_rows(evaluation: Evaluation, label: str) -> tuple[Scores, PositionCurve]:
    """Scores and positions of the model as configured, from one pass over the rows, which is made once."""
    if label not in evaluation.read:
        edges, scores, curves = position_edges(evaluation.arguments.seq_len), [], []
        for losses in _iterate(evaluation, label, label):
            scores.append(losses.sum_rows())
            curves.append(bin_positions(losses, edges))
        evaluation.read[label] = join_scores(scores), join_positions(curves)
    return evaluation.read[label]


def _iterate(evaluation: Evaluation, label: str, name: str) -> Iterator[TokenLosses]:
    with progress_bar(len(evaluation.rows), name, "row", leave=False) as bar:
        yield from iterate_losses(
            evaluation.models[label], evaluation.rows, batch_size=evaluation.arguments.batch_size, on_batch=bar.update
        )


def _measure_perplexity(evaluation: Evaluation, label: str) -> Scores:
    return _read_rows(evaluation, label)[0]


def _measure_position(evaluation: Evaluation, label: str) -> PositionCurve:
    return _read_rows(evaluation, label)[1]


def _measure_chunks(evaluation: Evaluation, label: str) -> ChunkCurve:
    model, arguments = evaluation.models[label], evaluation.arguments
    own = list(model.config.local_chunk_sizes)

    def score(model: PreTrainedModel) -> Scores:
        chunks = model.config.local_chunk_sizes
        if chunks == own:
            return _read_rows(evaluation, label)[0]
        return join_scores([x.sum_rows() for x in _iterate(evaluation, label, f"{label}, chunks {chunks}")])

    return measure_chunks(model, arguments.chunk_sizes or default_chunk_sizes(model.config, arguments.seq_len), score)


def _measure_retrieval(evaluation: Evaluation, label: str) -> list[Retrieval]:
    model, batch_size, results = evaluation.models[label], evaluation.arguments.batch_size, []
    for length, needles in evaluation.needles.items():
        with progress_bar(len(needles), f"{label}, {length} tokens", "document", leave=False) as bar:
            results.append(measure_retrieval(model, needles, batch_size=batch_size, on_batch=bar.update))
    return results


_MEASURES: dict[str, Callable[[Evaluation, str], Any]] = {
    "perplexity": _measure_perplexity, "position": _measure_position, "chunks": _measure_chunks,
    "retrieval": _measure_retrieval,
}  # fmt: skip
_REPORTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "perplexity": report_perplexity, "position": report_positions, "chunks": report_chunks,
    "retrieval": report_retrieval,
}  # fmt: skip
_DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "perplexity": describe_perplexity, "position": describe_positions, "chunks": describe_chunks,
    "retrieval": describe_retrieval,
}  # fmt: skip
_DRAWINGS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "perplexity": draw_perplexity, "position": draw_positions, "chunks": draw_chunks, "retrieval": draw_retrieval,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- printing


def _print_start(evaluation: Evaluation) -> None:
    arguments, rows = evaluation.arguments, evaluation.rows
    for subject in evaluation.subjects:
        model = evaluation.models[subject.label]
        chunks = f", local chunks {model.config.local_chunk_sizes}" if subject.has_local_memories else ""
        print(f"model    {subject.label}: {model.num_parameters() / 1e6:.2f} M parameters, {model.dtype}{chunks}")
    print(f"data     {evaluation.description}")
    print(f"         {len(rows)} rows of {arguments.seq_len} held-out tokens, on {arguments.torch_device()}")
    for remark in evaluation.remarks:
        print(f"note     {remark}")
    sys.stdout.flush()


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


def _fail(error: BaseException | str, status: int) -> int:
    print(f"\ntnt eval: error: {error}", file=sys.stderr)
    return status
