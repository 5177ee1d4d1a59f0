"""table3.md and table3.json: the rows beside the paper's numbers, and which of its orderings hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bench.machine import describe_versions
from ..checkpoint import atomic_file
from ..evaluation.estimates import Estimate
from .arguments import Table3Arguments
from .jobs import Job
from .paper import REMARKS, ROWS, SOURCE
from .results import (
    HOLDS,
    NOISE,
    REVERSED,
    STANDARD_ERRORS,
    UNKNOWN,
    RowResult,
    Verdict,
    difference_to_base,
    nats_per_token,
    to_json,
)
from .speed import Speed

NOTHING = "–"
MEANINGS = {
    HOLDS: f"the difference has the paper's sign and is larger than {STANDARD_ERRORS:g} of its standard errors",
    NOISE: f"it is smaller than {STANDARD_ERRORS:g} standard errors, whatever its sign",
    REVERSED: f"it has the other sign and is larger than {STANDARD_ERRORS:g} standard errors",
    UNKNOWN: "fewer than two seeds have both rows",
}


@dataclass(frozen=True)
class Table:
    """All that the reports say. `bytes_per_token`: of the validation tokens; None before a run is finished."""

    arguments: Table3Arguments
    jobs: list[Job]
    results: list[RowResult]
    verdicts: list[Verdict]
    speeds: dict[str, Speed]
    speed_machine: str
    description: str
    machine: str
    validation_tokens: int
    bytes_per_token: float | None

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    @property
    def command(self) -> str:
        args = self.arguments
        return f"tnt reproduce table3 --scale {args.scale} --seeds {args.seeds}"

    def nats(self, result: RowResult) -> Estimate | None:
        mean = result.mean
        return None if mean is None or self.bytes_per_token is None else nats_per_token(mean, self.bytes_per_token)

    def job_of(self, key: str) -> Job:
        """The run of the first seed that has the row."""
        return next(job for job in self.jobs if job.row == (ROWS[key].read_from or key))


def write_markdown(table: Table, path: Path) -> None:
    with atomic_file(path) as file:
        file.write_text(to_markdown(table), encoding="utf-8")


def to_markdown(table: Table) -> str:
    parts = [
        f"# Table 3 of TNT at the scale `{table.arguments.scale}`",
        _introduction(table),
        _main_table(table),
        _main_notes(table),
        "![validation loss of each row beside the paper's perplexity](table3.png)",
        "## Which of the paper's orderings hold here",
        summarize(table.verdicts),
        _verdict_table(table),
        "\n".join(f"- {name}: {meaning}." for name, meaning in MEANINGS.items()),
        "## What is compared",
        _settings_table(table),
        "\n".join(f"- {remark}" for remark in REMARKS),
    ]
    problems = _problems(table)
    return "\n\n".join(parts + (["## Not finished", problems] if problems else [])) + "\n"


def _introduction(table: Table) -> str:
    job = table.job_of(table.results[0].key)
    training, stage = job.recipe.training, job.stages[0]
    tokens = stage.steps * training.batch_size * stage.seq_len
    return (
        f"Written by `{table.command}` on {table.machine}; {describe_versions()}.\n\n"
        f"Every row is trained on {tokens:,} tokens ({stage.steps} steps of {training.batch_size} x {stage.seq_len}) "
        f"of {table.description}, in the same order for one seed, with the same optimizer; stage 2 and its control "
        f"take {_later_steps(table)} steps more. Scored on {table.validation_tokens:,} tokens of documents held out. Means "
        f"and standard errors over {table.arguments.seeds} seeds, which draw the initial weights and the order of the "
        "data."
    )


def _later_steps(table: Table) -> int:
    return max(sum(stage.steps for stage in job.stages[1:]) for job in table.jobs)


def _main_table(table: Table) -> str:
    head = ["row", "local chunks", "parameters", "tokens/s", "bits per byte", "to 1 local", "nats per token",
            "perplexity", "paper, C4"]  # fmt: skip
    lines = []
    for result in table.results:
        row, nats = ROWS[result.key], table.nats(result)
        paper = NOTHING if row.c4_perplexity is None else f"{row.c4_perplexity:.2f}"
        lines.append([
            row.title, _chunks(result.local_chunk_sizes), _number(result.parameters), _speed(table, result.key),
            _mean(result, table.arguments.seeds), _signed(difference_to_base(result, table.results)),
            _estimate(nats), NOTHING if nats is None else f"{nats.exp().value:.3f}", paper,
        ])  # fmt: skip
    return _markdown_table(head, lines)


def _main_notes(table: Table) -> str:
    notes = [
        "Bits per byte: mean ± standard error over seeds. \"To 1 local\": the row's bits per byte less those of the "
        "row \"TNT, 1 local memory\", paired by seed, so that what a seed does to all rows cancels; negative is better. "
        "Perplexity is exp(nats per token) of a token of this tokenizer, so it is not of the paper's unit: compare "
        "the order of the rows, not the numbers.",
        f"Paper: {SOURCE}.",
    ]  # fmt: skip
    if table.speeds:
        some = next(iter(table.speeds.values()))
        notes.append(
            f"Tokens/s: median (lowest-highest) of {some.steps} training steps of the row's last stage, the models "
            f"alternating in one process on {table.speed_machine}. Rows with more memories compute more for a token."
        )
    return "\n\n".join(notes)


def _verdict_table(table: Table) -> str:
    lines = []
    for verdict in table.verdicts:
        claim = verdict.claim
        numbers = [ROWS[key].c4_perplexity for key in (claim.better, claim.worse)]
        paper = f"{numbers[0]:.2f} < {numbers[1]:.2f}" if claim.in_paper else "(a control, not in the paper)"
        lines.append([
            ROWS[claim.better].title, ROWS[claim.worse].title, paper,
            _signed(verdict.difference), str(verdict.seeds), verdict.verdict,
        ])  # fmt: skip
    return _markdown_table(
        ["lower loss", "higher loss", "paper", "bits per byte gained here", "seeds", "verdict"], lines, texts=2
    )


def summarize(verdicts: Sequence[Verdict]) -> str:
    """The verdicts on the paper's orderings, counted and named, and that on the control."""
    if not verdicts:
        return "No two rows that the paper compares are both here."
    parts = []
    for name in (HOLDS, NOISE, REVERSED, UNKNOWN):
        claims = [v.claim for v in verdicts if v.verdict == name and v.claim.in_paper]
        if claims:
            listed = "; ".join(f"{ROWS[c.better].title} < {ROWS[c.worse].title}" for c in claims)
            parts.append(f"{name}: {len(claims)} ({listed})")
    paper = [v for v in verdicts if v.claim.in_paper]
    words = f"Of the paper's {len(paper)} orderings, " + ", ".join(parts) + "." if paper else ""
    for verdict in verdicts:
        if not verdict.claim.in_paper and verdict.difference is not None:
            words += (
                f" The control: {ROWS[verdict.claim.better].title} less {ROWS[verdict.claim.worse].title} is "
                f"{_signed(_negative(verdict.difference))} bits per byte ({verdict.verdict})."
            )
    least = min(v.seeds for v in verdicts)
    return words + (
        f" With {least} seeds a standard error is itself uncertain: {STANDARD_ERRORS:g} of them are less than 95%."
        if 2 <= least <= 5
        else ""
    )


def _settings_table(table: Table) -> str:
    lines = []
    for result in table.results:
        job = table.job_of(result.key)
        config, stage = job.config, job.stages[-1]
        if job.recipe.model.architecture == "llama":
            lines.append(
                [ROWS[result.key].title, "causal attention", NOTHING, NOTHING, NOTHING, _number(result.tokens)]
            )
            continue
        memory = f"{config.memory_type}, expansion {config.memory_expansion}"
        memory += ", momentum and forget gate" if config.use_momentum else ""
        memory += ", token scale" if config.token_scale else ""
        lines.append([
            ROWS[result.key].title, f"{memory}; projection {_projection(config)}",
            NOTHING if config.global_chunk_size is None else str(config.global_chunk_size),
            _resets(stage.local_shard_lengths), str(config.intermediate_size), _number(result.tokens),
        ])  # fmt: skip
    head = ["row", "memory", "global chunk", "reset after", "feed-forward", "tokens trained on"]
    return _markdown_table(head, lines, texts=2)


def _projection(config: object) -> str:
    normalised = " normalised" if config.normalize_projection and config.qk_projection != "none" else ""
    return config.qk_projection + normalised


def _resets(lengths: Sequence[int | None]) -> str:
    return ", ".join(dict.fromkeys("never" if n is None else str(n) for n in lengths)) or NOTHING


def _problems(table: Table) -> str:
    """Runs that failed and those that have not been made, as a list."""
    reasons = {(r.key, seed): reason for r in table.results for seed, reason in r.failures.items()}
    lines = []
    for job in table.missing:
        reason = reasons.get((job.row, job.seed))
        lines.append(f"- seed {job.seed}, {ROWS[job.row].title}: {'not yet run' if reason is None else reason}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- JSON


def write_json(table: Table, path: Path) -> None:
    rows = {}
    for result in table.results:
        speed, nats = table.speeds.get(result.key), table.nats(result)
        rows[result.key] = {
            "title": ROWS[result.key].title, "parameters": result.parameters, "tokens": result.tokens,
            "local_chunk_sizes": result.local_chunk_sizes,
            "bits_per_byte": to_json(result.mean),
            "bits_per_byte_by_seed": {seed: _finite(loss) for seed, loss in result.losses.items()},
            "bits_per_byte_less_base": to_json(difference_to_base(result, table.results)),
            "nats_per_token": to_json(nats),
            "tokens_per_second": None if speed is None else speed._asdict(),
            "failures": result.failures, "paper_c4_perplexity": ROWS[result.key].c4_perplexity,
        }  # fmt: skip
    record = {
        "command": table.command, "scale": table.arguments.scale, "seeds": table.arguments.seeds,
        "machine": table.machine, "versions": describe_versions(), "data": table.description,
        "validation_tokens": table.validation_tokens, "complete": not table.missing, "paper": SOURCE, "rows": rows,
        "orderings": [
            {"better": v.claim.better, "worse": v.claim.worse, "in_paper": v.claim.in_paper, "seeds": v.seeds,
             "bits_per_byte_gained": to_json(v.difference), "verdict": v.verdict}
            for v in table.verdicts
        ],
    }  # fmt: skip
    with atomic_file(path) as file:
        file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


# -------------------------------------------------------------------------------------------------------------- cells


def _markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """The first `texts` columns to the left, the others to the right."""
    rule = ["---" if i < texts else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def _chunks(sizes: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, sizes)) + "}" if sizes else NOTHING


def _number(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _speed(table: Table, key: str) -> str:
    speed = table.speeds.get(key)
    return NOTHING if speed is None else f"{speed.median:,.0f} ({speed.lowest:,.0f}-{speed.highest:,.0f})"


def _mean(result: RowResult, seeds: int) -> str:
    """The mean, with how many seeds it is of where some are missing."""
    if result.mean is None:
        return "failed" if result.failures else NOTHING
    some = f" ({len(result.losses)} of {seeds} seeds)" if len(result.losses) < seeds else ""
    return _estimate(result.mean) + some


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    if not math.isfinite(estimate.standard_error):
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"


def _signed(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    error = f" ± {estimate.standard_error:.4f}" if math.isfinite(estimate.standard_error) else ""
    return f"{estimate.value:+.4f}{error}"


def _negative(estimate: Estimate) -> Estimate:
    return estimate._replace(value=-estimate.value)
