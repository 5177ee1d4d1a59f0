"""Which files of a model's folder go to the Hub, and what makes a folder unfit for it. Nothing is sent here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_NAME
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_tnt import TNTConfig
from modeling_tnt.hub_cards import CARD_FILE, FACTS_FILE, find_problems
from modeling_tnt.hub_export import WEIGHTS, read_weight_index

from ..integrations.lora import BASE_CONFIG_FILE
from ..loop.checkpoint import TENSORS_FILE

# What a model's folder may hold beside its code: names that this package, transformers and PEFT write, and no others,
# so that nothing is published that only happens to lie there. Patterns of the path from the folder.
SENT = (
    CONFIG_NAME, "generation_config.json", *WEIGHTS, CARD_FILE, FACTS_FILE, "loss.png", "metrics.json",
    "LICENSE", "LICENSE.md", "LICENSE.txt",
    TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE, "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", f"adapter/{BASE_CONFIG_FILE}",
    f"adapter/{CARD_FILE}",
)  # fmt: skip
TOKENIZER_FILES = (TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE)
SAVE_AGAIN = "save the model again with save_pretrained"


@dataclass(frozen=True)
class ModelFolder:
    """A folder that was found fit to be pushed.

    files: what is sent, as paths from the folder with `/`, sorted.
    left_out: all else in it; folders that are not looked into end with `/`.
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
    tokenizer = path / TOKENIZER_CONFIG_FILE
    config = _read_json(path / CONFIG_NAME, problems)
    configs = [config, _read_json(tokenizer, problems) if tokenizer.is_file() else None]
    if config is not None:
        problems += _find_wrong_config(path, config)
    code = _trace_code(path, list(filter(None, configs)), problems)
    problems += _find_wrong_weights(path)
    card = path / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        problems += [f"{CARD_FILE}: {problem}; tnt card writes a new one" for problem in find_problems(text)]
    files, left_out = _choose(path, code, include or [], problems)
    others = [file for file in files if file.endswith(".safetensors") and not _matches_any(file, WEIGHTS)]
    problems += [problem for file in others for problem in _find_damage(path, file, set())]
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
        problems.append(f"{path.name} is no JSON ({error}); {SAVE_AGAIN}")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path.name} must hold an object, got {type(content).__name__}; {SAVE_AGAIN}")
        return None
    return content


def _find_wrong_config(path: Path, config: dict[str, Any]) -> Iterator[str]:
    if not config.get("model_type"):
        yield f"{CONFIG_NAME} names no model_type, so that no one could load it; {SAVE_AGAIN}"
    elif config["model_type"] == TNTConfig.model_type:
        try:
            TNTConfig.from_pretrained(path)
        except (ValueError, TypeError) as error:
            yield f"{CONFIG_NAME}: {error}"
        if "auto_map" not in config:
            yield (
                f"{CONFIG_NAME} has no auto_map and the folder no code, so that it would load only with this package; "
                "load the model and save it again with save_pretrained"
            )


# -------------------------------------------------------------------------------------------------------- code, weights


def _trace_code(path: Path, configs: list[dict[str, Any]], problems: list[str]) -> set[str]:
    """The files of code that transformers loads for the `auto_map`s of configs."""
    maps = [config["auto_map"] for config in configs if isinstance(config.get("auto_map"), dict)]
    values = [value for found in maps for value in found.values()]
    references = [r for value in values for r in (value if isinstance(value, list) else [value])]
    entries = {path / f"{r.split('.')[0]}.py" for r in references if r and "--" not in r}  # --: in another repository
    try:
        imported = [Path(file) for entry in sorted(entries) for file in get_relative_import_files(entry)]
    except FileNotFoundError as error:
        problems.append(f"{Path(error.filename).name} is missing, which the model's code needs; {SAVE_AGAIN}")
        return set()
    return {file.name for file in (*entries, *imported)}


def _find_wrong_weights(path: Path) -> Iterator[str]:
    whole, index = path / SAFE_WEIGHTS_NAME, path / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file() and index.is_file():
        yield f"{whole.name} and {index.name} are both there; remove those of the older model"
    if not whole.is_file() and not index.is_file():
        yield f"it has neither {whole.name} nor {index.name}; {SAVE_AGAIN}"
    try:
        files = {whole.name: set()} if whole.is_file() else read_weight_index(path)
    except OSError as error:
        yield str(error)
        return
    for name, tensors in sorted(files.items()):
        if not _matches_any(name, WEIGHTS):
            yield f"{index.name} names the file {name!r}, which holds no weights; {SAVE_AGAIN}"
        elif (path / name).is_file():
            yield from _find_damage(path, name, tensors)
        else:
            yield f"{name} is missing, which {index.name} names; copy it again, or {SAVE_AGAIN}"


def _find_damage(path: Path, name: str, expected: set[str]) -> Iterator[str]:
    """What is wrong with a file of weights, which is read a tensor at a time; one that was cut off does not open."""
    try:
        with safe_open(path / name, framework="pt") as file:
            keys = set(file.keys())
            wrong = [key for key in sorted(keys) if not _is_finite(file.get_tensor(key))]
    except SafetensorError as error:
        yield f"{name} cannot be read ({error}): it was cut off or damaged; copy it again, or {SAVE_AGAIN}"
        return
    missing = sorted(expected - keys)
    if missing:
        yield f"{name} lacks {len(missing)} tensors that the index names, e.g. {missing[0]}; {SAVE_AGAIN}"
    if wrong:
        yield (
            f"{name} holds numbers that are not finite in {len(wrong)} tensors, e.g. {wrong[0]}: the model diverged; "
            "push one that was saved before"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # isfinite knows no eight bits
    return bool(tensor.isfinite().all())


# -------------------------------------------------------------------------------------------------------------- choice


def _choose(path: Path, code: set[str], include: list[str], problems: list[str]) -> tuple[list[str], list[str]]:
    """What is sent and what is not. Hidden files, caches and linked folders are not looked into."""
    found, left_out = [], []
    for folder, folders, names in os.walk(path):
        at = Path(folder).relative_to(path)
        skipped = [x for x in folders if x[0] == "." or x == "__pycache__" or (path / at / x).is_symlink()]
        folders[:] = sorted(set(folders) - set(skipped))
        left_out += [f"{(at / name).as_posix()}/" for name in skipped]
        found += [(at / name).as_posix() for name in names]
    wanted = (*SENT, *include)
    visible = [file for file in found if not _is_hidden(Path(file)) and (path / file).is_file()]
    files = sorted(file for file in visible if file in code or _matches_any(file, wanted))
    for pattern in include:
        if not any(_matches(file, pattern) for file in files):
            problems.append(f"--include {pattern} matches no file there; hidden files are never sent")
    problems += [
        f"{file} is a link out of the folder, or to something hidden in it; put a copy there, or remove the link"
        for file in files
        if not _stays_inside(path, file)
    ]
    return files, sorted([*left_out, *(set(found) - set(files))])


def _stays_inside(path: Path, file: str) -> bool:
    """Whether a file is what it seems to be, also where it is a link."""
    root, target = path.resolve(), (path / file).resolve()
    return target.is_relative_to(root) and not any(map(_is_hidden, map(Path, target.relative_to(root).parts)))


def _matches_any(file: str, patterns: Iterable[str]) -> bool:
    return any(_matches(file, pattern) for pattern in patterns)


def _matches(file: str, pattern: str) -> bool:
    """A `*` of a pattern stands for no `/`."""
    parts, patterns = file.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _warn(path: Path, files: list[str]) -> Iterator[str]:
    if not any(name in files for name in TOKENIZER_FILES):
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
        print("         --include PATTERN sends more of them, but nothing hidden")
    for warning in folder.warnings:
        print(f"warning  {warning}")


def _format_bytes(number: int) -> str:
    """In decimal units, as the Hub shows sizes."""
    return tqdm.format_sizeof(number, "B")
