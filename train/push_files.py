"""Which files of a model's folder go to the Hub, and what makes a folder unfit for it. Nothing is sent here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_NAME
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_tnt import TNTConfig
from modeling_tnt.hub_cards import CARD_FILE, find_problems

from .checkpoint import TENSORS_FILE

# Of a model's folder, matched with the path from it. What a trainer keeps to go on from is none of them.
SENT = (
    CONFIG_NAME, "generation_config.json", "model*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "*.py", CARD_FILE, "LICENSE*",
    "card_facts.json", "*.png", "*.jpg", "*.svg", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "chat_template.j*", "additional_chat_templates/*.jinja",
    "adapter/*.json", "adapter/*.safetensors", "adapter/README.md",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class ModelFolder:
    """A folder that was found fit to be pushed.

    files: what is sent, as paths from the folder with `/`, sorted.
    left_out: the other files in it.
    warnings: what a reader of the repository will miss.
    """

    path: Path
    model_type: str
    files: list[str]
    left_out: list[str]
    warnings: list[str]

    def size(self, file: str) -> int:
        return (self.path / file).stat().st_size

    @property
    def num_bytes(self) -> int:
        return sum(map(self.size, self.files))


def check_folder(path: Path, include: list[str] | None = None) -> ModelFolder:
    """Look at everything in a folder that would be sent.

    Args:
        include: patterns of further files to send, such as `results/*.json`.

    Raises:
        ValueError: for a folder that holds no model, and for one with all that is wrong with its model.
        OSError: for files that cannot be read.
    """
    _check_holds_model(path)
    problems: list[str] = []
    config = _read_json(path / CONFIG_NAME, problems)
    if config is not None:
        problems += _find_wrong_config(path, config)
        problems += _find_wrong_code(path, config)
    problems += _find_wrong_weights(path)
    card = path / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        problems += [f"{CARD_FILE}: {problem}; tnt card writes a new one" for problem in find_problems(text)]
    files, left_out = _choose(path, include or [], problems)
    if problems:
        raise ValueError("\n  ".join([f"{path} cannot be pushed, and nothing was sent:", *problems]))
    return ModelFolder(path, config["model_type"], files, left_out, list(_warn(path, files)))


def _check_holds_model(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give the folder of a saved model")
    if (path / CONFIG_NAME).is_file():
        return
    inner = [folder for pattern in ("*", "*/*") for folder in sorted(path.glob(pattern)) if not _is_hidden(folder)]
    models = [str(folder) for folder in inner if (folder / CONFIG_NAME).is_file()]
    if models:
        raise ValueError(f"{path} holds several models and is none itself; push one of {', '.join(models)}")
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds an adapter without its model; push the folder of the merged model, such as the stage's"
        )
    raise ValueError(f"{path} has no {CONFIG_NAME}; give the folder of a saved model")


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} is no JSON ({error}); save the model again")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path.name} must hold an object, got {type(content).__name__}; save the model again")
        return None
    return content


def _find_wrong_config(path: Path, config: dict[str, Any]) -> Iterator[str]:
    if not config.get("model_type"):
        yield f"{CONFIG_NAME} names no model_type, so that no one could load it; save the model again"
    elif config["model_type"] == TNTConfig.model_type:
        try:
            TNTConfig.from_pretrained(path)
        except (ValueError, TypeError) as error:
            yield f"{CONFIG_NAME}: {error}"


# -------------------------------------------------------------------------------------------------------- code, weights


def _find_wrong_code(path: Path, config: dict[str, Any]) -> Iterator[str]:
    """What keeps the code that a model carries from being loaded."""
    if "auto_map" not in config:
        if config.get("model_type") == TNTConfig.model_type:
            yield (
                f"{CONFIG_NAME} has no auto_map and the folder no code, so that it would load only with this package; "
                "load the model and save it again with save_pretrained"
            )
        return
    references = [r for value in config["auto_map"].values() for r in (value if isinstance(value, list) else [value])]
    waiting = [r.rpartition("--")[2].split(".")[0] for r in references if r and "--" not in r]
    known: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        file = path / f"{name}.py"
        if file.is_file():
            waiting += get_relative_imports(file)
        else:
            yield f"{file.name} is missing, which the model's code needs; save the model again with save_pretrained"


def _find_wrong_weights(path: Path) -> Iterator[str]:
    whole, index = path / SAFE_WEIGHTS_NAME, path / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        yield from _find_damage(whole, None)
        if index.is_file():
            yield f"{whole.name} and {index.name} are both there; remove those of the older model"
        return
    if not index.is_file():
        yield f"it has neither {whole.name} nor {index.name}; save the model again with save_pretrained"
        return
    problems: list[str] = []
    content = _read_json(index, problems)
    yield from problems
    if content is None:
        return
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        yield f"{index.name} has no weight_map; save the model again"
        return
    for name in sorted(set(places.values())):
        if (path / name).is_file():
            yield from _find_damage(path / name, {key for key, place in places.items() if place == name})
        else:
            yield f"{name} is missing, which {index.name} names; copy it again, or save the model again"


def _find_damage(path: Path, expected: set[str] | None) -> Iterator[str]:
    """What is wrong with a file of weights; a file that was cut off does not open."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        yield f"{path.name} cannot be read ({error}): it was cut off or damaged; copy it again, or save the model again"
        return
    missing = sorted((expected or set()) - keys)
    if missing:
        yield f"{path.name} lacks {len(missing)} tensors that the index names, e.g. {missing[0]}; save the model again"


# -------------------------------------------------------------------------------------------------------------- choice


def _choose(path: Path, include: list[str], problems: list[str]) -> tuple[list[str], list[str]]:
    """What is sent and what is not. Hidden files, caches and linked folders are not looked at."""
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [(Path(folder) / name).relative_to(path).as_posix() for name in names if not name.startswith(".")]
    files = sorted(file for file in found if any(map(lambda p, f=file: _matches(f, p), (*SENT, *include))))
    for pattern in include:
        if not any(_matches(file, pattern) for file in files):
            problems.append(f"--include {pattern} matches no file there; hidden files are never sent")
    return files, sorted(set(found) - set(files))


def _matches(file: str, pattern: str) -> bool:
    """A `*` of a pattern stands for no `/`."""
    parts, patterns = file.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _warn(path: Path, files: list[str]) -> Iterator[str]:
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield "there is no tokenizer in it; tokenizer.save_pretrained adds one"
    if CARD_FILE not in files:
        yield "there is no model card in it; tnt card writes one"
    if (path / TENSORS_FILE).is_file():
        yield "it is a checkpoint in the middle of a run; what the trainer goes on from is not sent"


# ---------------------------------------------------------------------------------------------------------------- words


def show_folder(folder: ModelFolder, repo: str, revision: str | None, *, every_file: bool) -> None:
    """Print what goes where, what does not, and what is missing."""
    branch = "" if revision is None else f", branch {revision}"
    size = _format_bytes(folder.num_bytes)
    print(f"push     {folder.path} to {repo}{branch}: {len(folder.files)} files, {size}")
    for file in folder.files if every_file else []:
        print(f"         {_format_bytes(folder.size(file)):>9}  {file}")
    if folder.left_out:
        print(f"not sent {', '.join(folder.left_out)}")
    for warning in folder.warnings:
        print(f"warning  {warning}")


def _format_bytes(number: float) -> str:
    """In decimal units, as the Hub shows sizes."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
