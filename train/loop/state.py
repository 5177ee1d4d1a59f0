"""Where a run stands: one object that is saved whole with each checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..plan import Stage


class Score(NamedTuple):
    """Validation bits per byte: the key in metrics.json, the words in the summary, the value and its standard error
    over rows, nan where it is not known."""

    key: str
    label: str
    bits_per_byte: float
    standard_error: float = math.nan


def score_key(stage: str, at: str | None = None) -> str:
    """The key of the score of a stage's model at its end; `at`: read at the chunks of that stage, the next one."""
    return f"after_{stage}" if at is None else f"after_{stage}_at_{at}_chunks"


@dataclass
class State:
    """Where a run stands.

    stage            index of the stage that is trained.
    step             steps done in it; the learning rate and the position in the data follow from the two.
    total_steps      steps done in all stages.
    tokens           tokens trained on in all stages.
    stage_tokens     tokens trained on in this stage.
    stage_seconds    seconds spent in this stage's steps, interruptions, validation and saving left out.
    earlier_seconds  seconds that the processes before the last resumption had run for when they saved.
    losses           training bits per byte of the last 20 steps.
    best             lowest validation bits per byte so far.
    scores           validation scores that are part of the results.
    stages           figures of the stages that are finished, for metrics.json.
    log_bytes        size of log.jsonl, to which it is cut back when the run is resumed.
    """

    stage: int = 0
    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    stage_tokens: int = 0
    stage_seconds: float = 0.0
    earlier_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: float | None = None
    scores: list[Score] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    log_bytes: int = 0

    def begin_stage(self, index: int) -> None:
        self.stage, self.step, self.stage_tokens, self.stage_seconds, self.losses = index, 0, 0, 0.0, []

    def count_step(self, tokens: int, seconds: float) -> None:
        self.step += 1
        self.total_steps += 1
        self.tokens += tokens
        self.stage_tokens += tokens
        self.stage_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Of this stage's steps so far."""
        return self.stage_tokens / self.stage_seconds if self.stage_seconds else 0.0

    @property
    def recent_loss(self) -> float:
        """Mean training bits per byte of the last 20 steps."""
        return sum(self.losses) / max(1, len(self.losses))

    def figures(self, stage: Stage) -> dict[str, Any]:
        """The stage that is done, for metrics.json."""
        return {
            "name": stage.name, "local_chunk_sizes": stage.local_chunk_sizes, "steps": stage.steps,
            "tokens": self.stage_tokens, "train_seconds": self.stage_seconds,
            "tokens_per_second": self.tokens_per_second, "train_bits_per_byte_of_last_20_steps": self.recent_loss,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"scores": [list(score) for score in self.scores]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> State:
        return cls(**{**saved, "scores": [Score(*score) for score in saved["scores"]]})
