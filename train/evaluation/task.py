"""What a task of `tnt eval` is: one class, in the file of its name. `arguments.TASKS` lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from .arguments import EvalArguments
from .subjects import Subject

if TYPE_CHECKING:
    from .run import Evaluation


@dataclass(frozen=True)
class Setup:
    """What is asked for, before weights are loaded. `tokenizer`: None if it cannot be loaded, which is a problem.

    problems  what is wrong, all of which is told at once.
    remarks   what is left out or unusual.
    """

    arguments: EvalArguments
    subjects: list[Subject]
    tokenizer: PreTrainedTokenizerBase | None
    problems: list[str]
    remarks: list[str] = field(default_factory=list)


class Task(ABC):
    """A measurement. `results` are what `measure` returned, by the models' labels, the first model's first."""

    longest = 0  # tokens that a model reads at a time, besides rows of `seq_len`

    def prepare(self, setup: Setup) -> str | None:
        """Check the task's own arguments, appending to `setup.problems` and `setup.remarks`. Returns why these models
        cannot do the task, or None."""
        return None

    @abstractmethod
    def measure(self, evaluation: Evaluation, label: str) -> Any:
        """The result of one model."""

    @abstractmethod
    def report(self, results: dict[str, Any]) -> dict[str, Any]:
        """What the JSON file holds, but for how it was made."""

    @abstractmethod
    def describe(self, results: dict[str, Any]) -> list[str]:
        """Lines for the terminal."""

    @abstractmethod
    def draw(self, path: Path, results: dict[str, Any]) -> None:
        """Write the picture, a PNG. Raises OSError."""


def report_models(
    results: dict[str, Any], to_json: Callable[[Any], Any], compare: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """Each model's result, and what `compare` says of the first and each other."""
    (_, first), *others = results.items()
    return {
        "models": {name: to_json(result) for name, result in results.items()},
        "minus_first_model": {name: compare(first, result) for name, result in others},
    }
