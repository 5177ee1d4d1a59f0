"""What the finished runs say: the losses of each row, over seeds, and which of the paper's orderings they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..data import TokenizedData
from ..evaluation.estimates import Estimate, mean
from ..loop.state import score_key
from .paper import BASE, CLAIMS, ROWS, Claim
from .runs import Job

HOLDS, NOISE, REVERSED, UNKNOWN = "holds", "within noise", "does not hold", "no verdict"
STANDARD_ERRORS = 2.0


class Speed(NamedTuple):
    """Tokens per second of a row's last stage: the median run's, the slowest's and the fastest's, of `steps` steps in
    all."""

    median: float
    lowest: float
    highest: float
    steps: int


@dataclass
class RowResult:
    """A row of the table, as its finished runs' metrics.json have it.

    losses, tokens_per_second, failures  by seed: validation bits per byte, training speed of the last stage, reason.
    """

    key: str
    losses: dict[int, float] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    parameters: int | None = None
    tokens: int | None = None
    timed_steps: int = 0
    local_chunk_sizes: list[int] = field(default_factory=list)

    def add(self, job: Job) -> None:
        """Take in a finished run. A row that is read from another one's has the score of the first stage's model at
        the second one's chunks, and has trained nothing itself."""
        metrics = job.metrics
        first, last = metrics["stages"][0], metrics["stages"][-1]
        trained, key = metrics["stages"], score_key(last["name"])
        if self.key == job.row:
            self.tokens_per_second[job.seed] = last["tokens_per_second"]
            self.timed_steps += last["steps"]
        else:
            trained, key = [first], score_key(first["name"], at=last["name"])
        self.losses[job.seed] = metrics["validation_bits_per_byte"][key]
        self.parameters, self.tokens = metrics["parameters"], sum(stage["tokens"] for stage in trained)
        if job.recipe.model.architecture == "tnt":
            self.local_chunk_sizes = last["local_chunk_sizes"]

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


def collect(rows: Sequence[str], jobs: Sequence[Job], failures: dict[str, str]) -> list[RowResult]:
    """The rows in this order, with what is finished."""
    results = [RowResult(key) for key in rows]
    for result in results:
        for job in jobs:
            if job.row != (ROWS[result.key].read_from or result.key):
                continue
            if job.finished:
                result.add(job)
            elif job.name in failures:
                result.failures[job.seed] = failures[job.name]
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


def bytes_per_token(data: TokenizedData, job: Job) -> float:
    """UTF-8 bytes for each predicted token of the rows that runs are scored on; `job`: any that is finished."""
    seq_len = job.stages[0].seq_len
    count = job.metrics["validation_tokens"] // seq_len
    rows = data.validation.rows(seq_len, job.recipe.data.boundaries).head(count)
    predicted, text_bytes = 0, 0.0
    for i in range(len(rows)):
        scored = rows[i]["labels"][1:] != -100
        predicted += int(scored.sum())
        text_bytes += float((rows.token_bytes(i)[1:] * scored).sum())
    return text_bytes / predicted
