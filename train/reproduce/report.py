"""table3.md and table3.json: the rows beside the paper's numbers, and which of its orderings hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modeling_tnt import TNTConfig
from modeling_tnt.configuration.validation import ATTENTION_TYPES

from ..common.files import atomic_file
from ..common.machine import describe_versions
from ..common.models import make_llama_config
from ..evaluation.estimates import Estimate
from .arguments import Table3Arguments
from .paper import BASE, REMARKS, ROWS, SOURCE
from .results import (
    HOLDS,
    NOISE,
    REVERSED,
    STANDARD_ERRORS,
    UNKNOWN,
    RowResult,
    Speed,
    Verdict,
    difference_to_base,
    judge,
)
from .runs import Job
from .scales import SCALES

NOTHING = "–"
MEANINGS = {
    HOLDS: f"the difference has the paper's sign and is larger than {STANDARD_ERRORS:g} of its standard errors",
    NOISE: f"it is smaller than {STANDARD_ERRORS:g} standard errors, whatever its sign",
    REVERSED: f"it has the other sign and is larger than {STANDARD_ERRORS:g} standard errors",
    UNKNOWN: "fewer than two seeds have both rows, or a loss is not finite",
}


@dataclass(frozen=True)
class Table:
    """All that the reports say. `description`: of the data; `bytes_per_token`: of the validation tokens, None before a
    run is finished."""

    arguments: Table3Arguments
    jobs: list[Job]
    results: list[RowResult]
    description: str
    machine: str
    validation_tokens: int
    bytes_per_token: float | None

    @property
    def verdicts(self) -> list[Verdict]:
        return judge(self.results)

    @property
    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]

    @property
    def command(self) -> str:
        """What makes this table, paths left out."""
        args = self.arguments
        words = [f"tnt reproduce table3 --scale {args.scale} --seeds {args.seeds}"]
        if args.rows != replace(args, rows=[]).complete_rows():
            words.append(f"--rows {' '.join(args.rows)}")
        if args.hybrids:
            words.append("--hybrids")
        if args.tokens is not None:
            words.append(f"--tokens {args.tokens:g}")
        if args.override:
            words.append("--override " + " ".join(f"{k}={json.dumps(v)}" for k, v in args.override.items()))
        return " ".join(words)

    def nats(self, result: RowResult) -> Estimate | None:
        """Per token: `ln 2 · bits per byte · bytes per token`."""
        if result.mean is None or self.bytes_per_token is None:
            return None
        factor = math.log(2) * self.bytes_per_token
        return Estimate(factor * result.mean.value, factor * result.mean.standard_error)

    def speed(self, result: RowResult) -> Speed | None:
        return result.speed if self.arguments.speed else None

    def job_of(self, key: str) -> Job:
        """The run of the first seed that has the row."""
        return next(job for job in self.jobs if job.row == (ROWS[key].read_from or key))


def write_markdown(table: Table, path: Path) -> None:
    with atomic_file(path) as file:
        file.write_text(to_markdown(table), encoding="utf-8")


def describe(table: Table) -> str:
    """What is printed at the end: the table and the verdicts in short. table3.md has it all."""
    return "\n\n".join(filter(None, [_main_table(table), summarize(table.verdicts), _problems(table)]))


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
    if problems := _problems(table):
        parts += ["## Not finished", problems]
    return "\n\n".join(parts) + "\n"


def _introduction(table: Table) -> str:
    job = table.job_of(table.results[0].key)
    training, stage = job.recipe.training, job.stages[0]
    tokens = stage.steps * training.batch_size * stage.seq_len
    later_steps = max(sum(stage.steps for stage in job.stages[1:]) for job in table.jobs)
    return (
        f"Written by `{table.command}` on {table.machine}; {describe_versions()}.\n\n"
        f"Every row is trained on {tokens:,} tokens ({stage.steps} steps of {training.batch_size} x {stage.seq_len}) "
        f"of {table.description}, in the same order for one seed, with the same optimizer; stage 2 and its control "
        f"take {later_steps} steps more. Scored on {table.validation_tokens:,} tokens of documents held out. "
        f"Means and standard errors over {table.arguments.seeds} seeds, which draw the initial weights and the order "
        "of the data."
    )


def _main_table(table: Table) -> str:
    head = ["row", "local chunks", "parameters", "tokens/s", "bits per byte", "to 1 local", "nats per token",
            "perplexity", "paper, C4"]  # fmt: skip
    lines = []
    for result in table.results:
        row, nats = ROWS[result.key], table.nats(result)
        paper = NOTHING if row.c4_perplexity is None else f"{row.c4_perplexity:.2f}"
        lines.append([
            row.title, _chunks(result.local_chunk_sizes), _number(result.parameters), _speed(table.speed(result)),
            _mean(result, table.arguments.seeds), _estimate(difference_to_base(result, table.results), sign="+"),
            _estimate(nats), NOTHING if nats is None else f"{nats.exp().value:.3f}", paper,
        ])  # fmt: skip
    return markdown_table(head, lines)


def _main_notes(table: Table) -> str:
    notes = [
        "Bits per byte: mean ± standard error over seeds. \"To 1 local\": the row's bits per byte less those of the "
        "row \"TNT, 1 local memory\", paired by seed, so that what a seed does to all rows cancels; negative is "
        "better. Perplexity is exp(nats per token) of a token of this tokenizer, so it is not of the paper's unit: "
        "compare the order of the rows, not the numbers.",
        f"Paper: {SOURCE}.",
    ]  # fmt: skip
    if any(map(table.speed, table.results)):
        threads = ", of one thread each," if table.arguments.device == "cpu" else ""
        notes.append(
            f"Tokens/s: of all steps of the row's last stage, as its runs{threads} timed themselves (metrics.json): "
            "median (lowest-highest) over seeds. Whatever ran at the same time slowed them down: to compare speeds, "
            "train with --workers 1 on an idle machine. Rows with more memories compute more for a token."
        )
    return "\n\n".join(notes)


def _verdict_table(table: Table) -> str:
    lines = []
    for verdict in table.verdicts:
        claim = verdict.claim
        paper = "a control, not in the paper"
        if claim.paper is not None:
            paper = f"{claim.paper[0]:.2f} < {claim.paper[1]:.2f}"
        lines.append([
            ROWS[claim.better].title, ROWS[claim.worse].title, paper,
            _estimate(verdict.difference, sign="+"), str(verdict.seeds), verdict.verdict,
        ])  # fmt: skip
    return markdown_table(
        ["lower loss", "higher loss", "paper", "bits per byte gained here", "seeds", "verdict"], lines, texts=2
    )


def summarize(verdicts: Sequence[Verdict]) -> str:
    """How many of the paper's orderings hold and which, and what chance alone would do."""
    paper = [verdict for verdict in verdicts if verdict.claim.paper is not None]
    if not paper:
        return "No two rows that the paper compares are both here."
    counts = {name: [v.claim for v in paper if v.verdict == name] for name in MEANINGS}
    parts = [f"{name}: {len(claims)}" for name, claims in counts.items() if claims]
    lines = [f"Orderings of the paper that can be compared here: {len(paper)}; {', '.join(parts)}."]
    fewest = min(verdict.seeds for verdict in paper)
    if fewest >= 2:
        lines.append(
            f"With {fewest} seeds two rows that are equal differ by more than {STANDARD_ERRORS:g} standard errors in "
            f"{chance_beyond(STANDARD_ERRORS, fewest - 1):.0%} of cases (Student's t)."
        )
    listed = [
        f"- {name}: " + "; ".join(f"{ROWS[c.better].title} < {ROWS[c.worse].title}" for c in claims)
        for name, claims in counts.items() if claims and name != UNKNOWN
    ]  # fmt: skip
    return "\n\n".join([" ".join(lines), *(["\n".join(listed)] if listed else [])])


def chance_beyond(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution with so many degrees of freedom, by Simpson's rule."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 200
    points = [2 * t * i / steps - t for i in range(steps + 1)]
    weights = [1, *([4, 2] * (steps // 2))[: steps - 1], 1]
    within = sum(w * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for w, x in zip(weights, points, strict=True))
    return 1 - scale * within * 2 * t / steps / 3


def _attention(config: TNTConfig) -> str:
    """Which blocks attend, and how far."""
    kinds = config.layer_types
    words = [
        f"{kind.replace('_', ' ')} in {kinds.count(kind)} of {len(kinds)} blocks instead"
        for kind in ATTENTION_TYPES if kind in kinds
    ]  # fmt: skip
    if config.memory_as is not None:
        reach = config.global_chunk_size if config.memory_as == "context" else config.sliding_window
        words.append(
            f"{config.memory_as} of attention within {reach}, {config.num_persistent_tokens} persistent tokens"
        )
    return "".join(f"; {word}" for word in words)


def _settings_table(table: Table) -> str:
    lines = []
    for result in table.results:
        job = table.job_of(result.key)
        config, stage, width = job.config, job.stages[-1], job.config.intermediate_size
        memory = f"{config.memory_type}, expansion {config.memory_expansion}"
        memory += ", momentum and forget gate" if config.use_momentum else ""
        memory += ", token scale" if config.token_scale else ""
        memory += f"; projection {_projection(config)}" if config.local_chunk_sizes else ""
        memory += _attention(config)
        chunk, resets = config.global_chunk_size, _resets(stage.local_shard_lengths)
        if job.recipe.model.architecture == "llama":
            memory, chunk, resets = "causal attention", None, NOTHING
            width = make_llama_config(config, stage.seq_len).intermediate_size
        lines.append([
            ROWS[result.key].title, memory, NOTHING if chunk is None else str(chunk), resets, str(width),
            _number(result.tokens),
        ])  # fmt: skip
    head = ["row", "memory", "global chunk", "reset after", "feed-forward width", "tokens trained on"]
    table_lines = markdown_table(head, lines, texts=2)
    if SCALES[table.arguments.scale].width_step is None:
        return table_lines
    return (
        f"{table_lines}\n\nFeed-forward widths are chosen so that all models have about as many parameters as the row "
        f'"{ROWS[BASE].title}": what a memory adds is taken from there.'
    )


def _projection(config: TNTConfig) -> str:
    normalised = " normalised" if config.normalize_projection and config.qk_projection != "none" else ""
    return config.qk_projection + normalised


def _resets(lengths: Sequence[int | None]) -> str:
    return ", ".join(dict.fromkeys("never" if n is None else str(n) for n in lengths)) or NOTHING


def _problems(table: Table) -> str:
    """Runs that failed, each with its reason, and how many are not finished for no such reason."""
    reasons = {(r.key, seed): reason for r in table.results for seed, reason in r.failures.items()}
    failed = {job.name: reasons.get((job.row, job.seed)) for job in table.missing}
    lines = [f"- {name} failed: {reason}" for name, reason in failed.items() if reason is not None]
    left = [name for name, reason in failed.items() if reason is None]
    if left:
        lines.append(f"- not finished: {len(left)} of {len(table.jobs)} runs ({', '.join(left)})")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- JSON


def write_json(table: Table, path: Path) -> None:
    record = {
        "command": table.command, "scale": table.arguments.scale, "seeds": table.arguments.seeds,
        "machine": table.machine, "versions": describe_versions(), "data": table.description,
        "validation_tokens": table.validation_tokens, "complete": not table.missing, "paper": SOURCE,
        "rows": {result.key: _row_to_json(table, result) for result in table.results},
        "orderings": [
            {"better": v.claim.better, "worse": v.claim.worse, "paper": v.claim.paper, "seeds": v.seeds,
             "bits_per_byte_gained": _to_json(v.difference), "verdict": v.verdict}
            for v in table.verdicts
        ],
    }  # fmt: skip
    with atomic_file(path) as file:
        file.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _row_to_json(table: Table, result: RowResult) -> dict[str, Any]:
    speed = table.speed(result)
    return {
        "title": ROWS[result.key].title, "parameters": result.parameters, "tokens": result.tokens,
        "local_chunk_sizes": result.local_chunk_sizes,
        "bits_per_byte": _to_json(result.mean),
        "bits_per_byte_by_seed": {seed: x if math.isfinite(x) else None for seed, x in result.losses.items()},
        "bits_per_byte_less_base": _to_json(difference_to_base(result, table.results)),
        "nats_per_token": _to_json(table.nats(result)),
        "tokens_per_second": speed and speed._asdict(),
        "failures": result.failures, "paper_c4_perplexity": ROWS[result.key].c4_perplexity,
    }  # fmt: skip


def _to_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    return estimate and estimate.to_json()


# -------------------------------------------------------------------------------------------------------------- cells


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """The first `texts` columns to the left, the others to the right."""
    rule = ["---" if i < texts else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *lines])


def _chunks(sizes: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, sizes)) + "}" if sizes else NOTHING


def _number(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _speed(speed: Speed | None) -> str:
    return NOTHING if speed is None else f"{speed.median:,.0f} ({speed.lowest:,.0f}-{speed.highest:,.0f})"


def _mean(result: RowResult, seeds: int) -> str:
    """The mean, with how many seeds it is of where some are missing."""
    if result.mean is None:
        return "failed" if result.failures else NOTHING
    some = f" ({len(result.losses)} of {seeds} seeds)" if len(result.losses) < seeds else ""
    return _estimate(result.mean) + some


def _estimate(estimate: Estimate | None, sign: str = "") -> str:
    """`sign="+"` for a difference, which always shows its sign."""
    if estimate is None:
        return NOTHING
    error = f" ± {estimate.standard_error:.4f}" if math.isfinite(estimate.standard_error) else ""
    return f"{estimate.value:{sign}.4f}{error}"
