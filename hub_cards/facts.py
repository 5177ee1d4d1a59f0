"""What a card may say: plain data, all of it optional but the model's configuration. What is None is left out."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .files import write_file

FACTS_FILE = "card_facts.json"


@dataclass
class StageFacts:
    """One stage of training.

    tokens               trained on in it.
    seq_len, batch_size  tokens in a row, rows in a step.
    learning_rate        its peak.
    trainable            "all", "local" or "lora".
    train_seconds        spent in its steps; train_bits_per_byte: mean of its last steps.
    """

    name: str
    steps: int | None = None
    tokens: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    local_chunk_sizes: list[int] | None = None
    local_shard_lengths: list[int | None] | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    trainable: str | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    train_bits_per_byte: float | None = None


@dataclass
class ResultFacts:
    """A number that was measured.

    metric             identifier, e.g. "bits_per_byte".
    label              which weights, or under which condition: "after stage1".
    local_chunk_sizes  that the model was read at.
    dataset            the text it was measured on, in words.
    dataset_type       its name on the Hub, or one word for what has none there: results of one type are shown together.
    tokens             that were scored.
    command            that measured it; `{model}` in it stands for the model's name.
    own                whether it is this model's, as configured: those are the card's model-index.
    """

    metric: str
    value: float
    standard_error: float | None = None
    label: str | None = None
    local_chunk_sizes: list[int] | None = None
    dataset: str | None = None
    dataset_type: str = "text"
    dataset_config: str | None = None
    dataset_split: str | None = None
    tokens: int | None = None
    command: str | None = None
    own: bool = False


@dataclass
class CardFacts:
    """Everything that a card is made from.

    Args:
        config: of the model, as `config.to_dict()` gives it.
        parameters: number of them.
        class_name: of the model; it decides the pipeline tag and the class that the card loads it with.
        name: title of the card; without: the last part of `repo_id`, or else the folder's name.
        repo_id: "user/name" on the Hub; path: of the model's folder, which it is loaded by before it has that name.
        remote_code: whether the model's code lies beside the weights, for `trust_remote_code=True`.
        tokenizer: its class or name; None: there is none beside the weights.
        license, license_name, license_link: of the weights, as the Hub wants them.
        languages: ISO 639 codes.
        datasets: names on the Hub of what it was trained on.
        data: the same in words, without paths.
        train_bytes, train_documents, validation_documents: how much of it.
        base_model: name on the Hub of the model that training started from.
        adapter: folder with the LoRA adapter that was merged into these weights.
        stages: of the training.
        hyperparameters: of the outer optimizer, words → value.
        train_command: that trains it again; recipe: the YAML file that the command names.
        plot: file name of a picture of the training, beside the card.
        seconds: that training and its evaluation took.
        hardware: that it was trained on.
        results: what was measured.
        versions: package → version.
        tags: beside those that every card has.
    """

    config: dict[str, Any]
    parameters: int | None = None
    class_name: str | None = None
    name: str | None = None
    repo_id: str | None = None
    path: str | None = None
    remote_code: bool = True
    tokenizer: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    data: str | None = None
    train_bytes: int | None = None
    train_documents: int | None = None
    validation_documents: int | None = None
    base_model: str | None = None
    adapter: str | None = None
    stages: list[StageFacts] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    train_command: str | None = None
    recipe: str | None = None
    plot: str | None = None
    seconds: float | None = None
    hardware: str | None = None
    results: list[ResultFacts] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.config, dict):
            raise TypeError(f"config must be a dict, got {type(self.config).__name__}; use config.to_dict()")
        if self.config.get("model_type") != "tnt":
            raise ValueError(
                f"config must be that of a TNT model, whose model_type is 'tnt', got "
                f"{self.config.get('model_type')!r}; the card describes no other kind of model"
            )


def save_facts(folder: Path, facts: CardFacts) -> None:
    """Write the facts beside the model, so that its card can be made again. Raises OSError.

    The configuration is left out: config.json beside it holds it.
    """
    saved = {k: v for k, v in asdict(facts).items() if k != "config"}
    write_file(Path(folder) / FACTS_FILE, json.dumps(_finite(saved), indent=2, allow_nan=False) + "\n")


def load_facts(folder: Path, config: dict[str, Any]) -> CardFacts | None:
    """What `save_facts` wrote, or None if it is not there. Raises ValueError for a file that holds something else."""
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["stages"] = [StageFacts(**stage) for stage in saved.get("stages", [])]
        saved["results"] = [ResultFacts(**result) for result in saved.get("results", []) if result["value"] is not None]
        known = {f.name for f in fields(CardFacts)} - {"config"}
        return CardFacts(config=config, **{k: v for k, v in saved.items() if k in known})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no facts of a card ({error}); remove it to make the card without") from error


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
