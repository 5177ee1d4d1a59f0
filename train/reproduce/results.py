"""What the finished runs say: the losses of each row, over seeds, and which of the paper's orderings they show."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..data import TokenizedData
from ..evaluation.estimates import Estimate, mean
from ..loop.state import score_key
from ..recipe import Recipe
from .jobs import Job
from .paper import BASE, CLAIMS, ROWS, Claim

HOLDS, NOISE, REVERSED, UNKNOWN = "holds", "within noise", "does not hold", "no verdict"
STANDARD_ERRORS = 2.0


class RunScore(NamedTuple):
    """Of one run: validation bits per byte, how many tokens were scored, what the model was and had read, and how many
    steps its last stage took, at how many tokens per second."""

    bits_per_byte: float
    validation_tokens: int
    parameters: int
    tokens: int
    local_chunk_sizes: list[int]
    steps: int
    tokens_per_second: float


class Speed(NamedTuple):
    """Tokens per second of a row's last stage: the median run's, the slowest's and the fastest's, of `steps` steps in
    all."""

    median: float
    lowest: float
    highest: float
    steps: int


@dataclass
class RowResult:
    """A row of the table. `losses`: validation bits per byte by seed; `failures`: reasons by seed; `tokens_per_second`:
    of the last stage's training by seed, which took `timed_steps` in all."""

    key: str
    losses: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    timed_steps: int = 0
    parameters: int | None = None
    tokens: int | None = None
    local_chunk_sizes: list[int] = field(default_factory=list)

    @property
    def mean(self) -> Estimate | None:
        return mean_of(list(self.losses.values()))

    @property
    def speed(self) -> Speed | None:
        speeds = list(self.tokens_per_second.values())
        return Speed(statistics.median(speeds), min(speeds), max(speeds), self.timed_steps) if speeds else None


class Verdict(NamedTuple):
    """A claim and what came of it. `difference`: bits per byte of the worse less the better row, paired by seed, over
    `seeds` seeds; positive as claimed."""

    claim: Claim
    difference: Estimate | None
    seeds: int
    verdict: str


def read_score(job: Job, *, swapped: bool = False) -> RunScore:
    """The final score of a finished run; `swapped`: that of its first stage's model, read at the second one's chunks.

    The trainer writes a loss that is not finite as NaN, which stays one here.
    """
    metrics = json.loads(job.folder.metrics_file.read_text(encoding="utf-8"))
    stages = metrics["stages"]
    first, last = stages[0]["name"], stages[-1]["name"]
    key = score_key(first, at=last) if swapped else score_key(last)
    return RunScore(
        bits_per_byte=metrics["validation_bits_per_byte"][key],
        validation_tokens=metrics["validation_tokens"],
        parameters=metrics["parameters"],
        tokens=sum(stage["tokens"] for stage in (stages[:1] if swapped else stages)),
        local_chunk_sizes=stages[-1]["local_chunk_sizes"],
        steps=stages[-1]["steps"],
        tokens_per_second=stages[-1]["tokens_per_second"],
    )


def collect(rows: Sequence[str], jobs: Sequence[Job], failures: dict[str, str]) -> list[RowResult]:
    """The rows in this order, with what is finished."""
    results = []
    for key in rows:
        result = RowResult(key)
        source = ROWS[key].read_from or key
        for job in jobs:
            if job.row != source:
                continue
            if job.finished:
                score = read_score(job, swapped=source != key)
                result.losses[job.seed] = score.bits_per_byte
                result.parameters, result.tokens = score.parameters, score.tokens
                if source == key:
                    result.tokens_per_second[job.seed] = score.tokens_per_second
                    result.timed_steps += score.steps
                if job.recipe.model.architecture == "tnt":
                    result.local_chunk_sizes = score.local_chunk_sizes
            elif job.name in failures:
                result.failures[job.seed] = failures[job.name]
        results.append(result)
    return results


def mean_of(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error over seeds; None without any, and an error of nan for a single one."""
    return mean(torch.tensor(values, dtype=torch.float64)) if values else None


def judge(results: Sequence[RowResult]) -> list[Verdict]:
    """The claims whose two rows are both among the results."""
    losses = {result.key: result.losses for result in results}
    return [_judge(claim, losses) for claim in CLAIMS if claim.better in losses and claim.worse in losses]


def _judge(claim: Claim, losses: dict[str, dict[int, float]]) -> Verdict:
    difference, seeds = paired_difference(losses[claim.worse], losses[claim.better])
    if difference is None or not math.isfinite(difference.standard_error):
        return Verdict(claim, difference, seeds, UNKNOWN)
    bound = STANDARD_ERRORS * difference.standard_error
    verdict = HOLDS if difference.value > bound else REVERSED if difference.value < -bound else NOISE
    return Verdict(claim, difference, seeds, verdict)


def paired_difference(losses: dict[int, float], other: dict[int, float]) -> tuple[Estimate | None, int]:
    """`losses` less `other`, by seed: what a seed does to both (the order of the data) cancels. And how many seeds."""
    seeds = sorted(losses.keys() & other.keys())
    return mean_of([losses[seed] - other[seed] for seed in seeds]), len(seeds)


def difference_to_base(result: RowResult, results: Sequence[RowResult]) -> Estimate | None:
    """Bits per byte more than the base row's, paired by seed."""
    base = next((other.losses for other in results if other.key == BASE), {})
    return None if result.key == BASE else paired_difference(result.losses, base)[0]


def bytes_per_token(data: TokenizedData, recipe: Recipe, validation_tokens: int) -> float:
    """UTF-8 bytes for each predicted token of the rows that the runs are scored on."""
    seq_len = recipe.stages[0].seq_len or recipe.training.seq_len
    rows = data.validation.rows(seq_len, recipe.data.boundaries).head(validation_tokens // seq_len)
    predicted, text_bytes = 0, 0.0
    for i in range(len(rows)):
        scored = rows[i]["labels"][1:] != -100
        predicted += int(scored.sum())
        text_bytes += float((rows.token_bytes(i)[1:] * scored).sum())
    return text_bytes / predicted


def nats_per_token(bits_per_byte: Estimate, bytes_per_token: float) -> Estimate:
    """`ln 2 · bits per byte · bytes per token`."""
    factor = math.log(2) * bytes_per_token
    return Estimate(bits_per_byte.value * factor, bits_per_byte.standard_error * factor)


def to_json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_json()
