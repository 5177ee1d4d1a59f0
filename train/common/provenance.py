"""Where a number came from, in words and commands that hold no path of this machine."""

from __future__ import annotations

import platform
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..data import DataOptions
from ..data.sources import is_on_hub
from ..evaluation.arguments import TASKS, EvalArguments
from ..options import flag_of, leaves, to_mapping
from ..recipe import MEASURING, Recipe, StageOptions

LOCAL_TEXT = "your-text"
LOCAL_MODEL = "your-model"
LOCAL_TOKENIZER = "your-tokenizer"
# Of an evaluation: what says on which machine it ran, beside which models, and where results went.
_NOT_MEASURING = ("model", "compare", "tasks", "output_dir", "overwrite", "batch_size", "device", "data.cache_dir")


@dataclass(frozen=True)
class DataOrigin:
    """Text that was read: in words, by its name on the Hub or by one word for what has none."""

    words: str
    kind: str
    on_hub: bool = False
    config: str | None = None
    split: str | None = None

    def held_out(self) -> dict[str, str | None]:
        """The fields of `ResultFacts` that say what was measured on."""
        return {
            "dataset": f"held-out documents of {self.words}", "dataset_type": self.kind,
            "dataset_config": self.config, "dataset_split": self.split,
        }  # fmt: skip


def find_origin(data: DataOptions) -> DataOrigin:
    if not data.sources:
        version = ".".join(platform.python_version_tuple()[:2])
        return DataOrigin(f"source files of the standard library of Python {version}", "python-stdlib")
    if is_on_hub(data.sources):
        (name,) = data.sources
        return DataOrigin(f"the dataset {name}", name, True, data.config, data.split)
    return DataOrigin("local text, which is not published with the model", "local-text")


def is_local(name: str) -> bool:
    """Whether a name of a model or a tokenizer is a path."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def train_command(recipe: Recipe) -> tuple[str, str | None]:
    """The command that trains with a recipe, and the YAML file that it names, if it needs one.

    The file holds what differs from the defaults. Local files, models and tokenizers are there under a stand-in.
    """
    given, usual = to_mapping(recipe), to_mapping(Recipe())
    changed = {name: _difference(given[name], usual[name]) for name in given if name != "stages"}
    if given["stages"] != usual["stages"]:
        empty = to_mapping(StageOptions())
        changed["stages"] = [{"name": stage["name"]} | _difference(stage, empty) for stage in given["stages"]]
    changed["data"].pop("cache_dir", None)
    changed["output"] = {k: v for k, v in changed["output"].items() if k in MEASURING}
    _hide_data(changed["data"])
    start_from = changed["model"].get("start_from")
    if start_from is not None and is_local(start_from):
        changed["model"]["start_from"] = LOCAL_MODEL
    changed = {section: changed[section] for section in given if changed.get(section)}
    if not changed:
        return "tnt train", None
    return "tnt train --config recipe.yaml", yaml.safe_dump(changed, sort_keys=False).rstrip()


def eval_command(task: str, arguments: EvalArguments) -> str:
    """The command that measured `task`; the model is called `{model}` in it.

    Args:
        arguments: of the evaluation. What says how fast, and where results go, is left out.
    """
    usual = {leaf.path: leaf.value for leaf in leaves(EvalArguments())}
    hidden = {"sources": list(arguments.data.sources), "tokenizer": arguments.data.tokenizer}
    _hide_data(hidden)
    parts = []
    for path, _, value, metadata in leaves(arguments):
        other_task = metadata["group"] in TASKS and metadata["group"] != task
        if path in _NOT_MEASURING or value == usual[path] or other_task:
            continue
        section, _, name = path.rpartition(".")
        value = hidden.get(name, value) if section == "data" else value
        parts += [flag_of(path), *(map(str, value) if isinstance(value, list) else [str(value)])]
    return " ".join(["tnt eval {model} --tasks", task, *map(shlex.quote, parts)])


def _hide_data(data: dict[str, Any]) -> None:
    sources = data.get("sources")
    if sources and not is_on_hub(sources):
        data["sources"] = [LOCAL_TEXT]
    if data.get("tokenizer") and is_local(data["tokenizer"]):
        data["tokenizer"] = LOCAL_TOKENIZER


def _difference(mapping: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value != defaults[key]}
