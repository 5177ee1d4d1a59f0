"""retrieval.md and retrieval.json: what each model found again, by length, over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.files import atomic_file
from ...common.machine import describe_versions
from ...evaluation.estimates import Estimate
from ...loop.state import score_key
from ..report import NOTHING, markdown_table
from ..results import mean_of
from ..runs import Job
from .arguments import ROWS, RetrievalArguments
from .jobs import STAGE, read_results


@dataclass
class RowResult:
    """A model's finished runs. `exact`, `nats`: share of exact answers and nats of the answer by length, each a value a
    seed; `bits_per_byte`: a value a seed."""

    row: str
    parameters: int | None = None
    bits_per_byte: list[float] = field(default_factory=list)
    exact: dict[int, list[float]] = field(default_factory=dict)
    nats: dict[int, list[float]] = field(default_factory=dict)

    @property
    def seeds(self) -> int:
        return len(self.bits_per_byte)

    def add(self, job: Job, found: dict[int, dict[str, Any]]) -> None:
        metrics = job.metrics
        self.parameters = metrics["parameters"]
        self.bits_per_byte.append(metrics["validation_bits_per_byte"][score_key(STAGE)])
        for length, of_length in found.items():
            self.exact.setdefault(length, []).append(of_length["exact_match"]["value"])
            self.nats.setdefault(length, []).append(of_length["nats_of_answer"]["value"])


@dataclass(frozen=True)
class Report:
    """`chance`: the share of exact answers of a model that answers with any value of the document, by length.
    `problems`: of the runs that are not in the results."""

    arguments: RetrievalArguments
    results: list[RowResult]
    chance: dict[int, float]
    problems: list[str]

    @property
    def command(self) -> str:
        """What makes this report, paths left out."""
        args, default, words = self.arguments, RetrievalArguments(), ["tnt reproduce retrieval"]
        for name in ("steps", "seq_len", "batch_size", "learning_rate", "megabytes", "seeds", "retrieval_documents"):
            if getattr(args, name) != getattr(default, name):
                words.append(f"--{name.replace('_', '-')} {getattr(args, name):g}")
        for name, usual in (("rows", list(ROWS)), ("retrieval_lengths", default.retrieval_lengths)):
            if getattr(args, name) != usual:
                words.append(f"--{name.replace('_', '-')} {' '.join(map(str, getattr(args, name)))}")
        return " ".join(words)


def make_report(arguments: RetrievalArguments, jobs: Sequence[Job], failures: dict[str, str]) -> Report:
    results, chance, problems = {row: RowResult(row) for row in arguments.rows}, {}, []
    for job in jobs:
        found = read_results(arguments, job)
        if found is None:
            problems.append(f"{job.name}: {failures.get(job.name, 'not finished')}")
            continue
        results[job.row].add(job, found)
        chance |= {length: of_length["chance"] for length, of_length in found.items()}
    return Report(arguments, list(results.values()), chance, problems)


def to_markdown(report: Report) -> str:
    args = report.arguments
    parts = [
        "# What attention adds to memories in retrieval",
        f"Written by `{report.command}`; {describe_versions()}.\n\n"
        f"Each model is trained on {args.steps * args.batch_size * args.seq_len:,} tokens ({args.steps} steps of "
        f"{args.batch_size} x {args.seq_len}) of the same key-value documents, in the same order for one seed, with "
        f"the same optimizer. Then `tnt eval --tasks retrieval` asks it for a value in {args.retrieval_documents} "
        f"other documents of each length. Mean ± standard error over {args.seeds} seeds.",
        "## Exact answers",
        _table(report, lambda row: row.exact, _share, ["chance", NOTHING, NOTHING], report.chance),
        "## Nats of the answer",
        _table(report, lambda row: row.nats, _number, ["ln of the pairs", NOTHING, NOTHING],
               {length: -math.log(chance) for length, chance in report.chance.items()}),
    ]  # fmt: skip
    if report.problems:
        parts += ["## Not finished", "\n".join(f"- {problem}" for problem in report.problems)]
    return "\n\n".join(parts) + "\n"


def _table(
    report: Report, values: Callable[[RowResult], dict[int, list[float]]], write: Callable[[Estimate | None], str],
    last: list[str], reference: dict[int, float],
) -> str:  # fmt: skip
    """Rows of the models, and a `last` one with a value for each length to compare them with."""
    lengths = report.arguments.retrieval_lengths
    lines = []
    for row in report.results:
        some = f" ({row.seeds} of {report.arguments.seeds} seeds)" if row.seeds < report.arguments.seeds else ""
        parameters = NOTHING if row.parameters is None else f"{row.parameters:,}"
        head = [ROWS[row.row].title + some, parameters, _number(mean_of(row.bits_per_byte))]
        lines.append([*head, *(write(mean_of(values(row).get(length, []))) for length in lengths)])
    beside = (reference.get(length) for length in lengths)
    lines.append([*last, *(NOTHING if value is None else write(Estimate(value, math.nan)) for value in beside)])
    head = ["model", "parameters", "bits per byte", *(f"{length} tokens" for length in lengths)]
    return markdown_table(head, lines)


def _share(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else f"{estimate.value:.0%}{_error(100 * estimate.standard_error, '.0f')}"


def _number(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else f"{estimate.value:.2f}{_error(estimate.standard_error, '.2f')}"


def _error(error: float, form: str) -> str:
    return f" ± {error:{form}}" if math.isfinite(error) else ""


def write_report(report: Report, markdown: Path, record: Path) -> None:
    with atomic_file(markdown) as file:
        file.write_text(to_markdown(report), encoding="utf-8")
    found = {
        "command": report.command, "versions": describe_versions(), "seeds": report.arguments.seeds,
        "tokens": report.arguments.steps * report.arguments.batch_size * report.arguments.seq_len,
        "chance": report.chance, "not_finished": report.problems,
        "rows": {
            row.row: {
                "title": ROWS[row.row].title, "parameters": row.parameters, "bits_per_byte": row.bits_per_byte,
                "exact_match": row.exact, "nats_of_answer": row.nats,
            }
            for row in report.results
        },
    }  # fmt: skip
    with atomic_file(record) as file:
        file.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
