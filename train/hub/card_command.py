"""`tnt card`: write the card of a saved model again, with results of `tnt eval`, a licence, or another template."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_NAME

from modeling_tnt.hub_cards import CardFacts, ResultFacts, find_path, load_facts, save_facts, write_card

from ..common.model_facts import bare_facts, has_code, read_config
from ..common.provenance import eval_command, find_origin
from ..evaluation.arguments import EvalArguments
from ..options import from_mapping, option

# Task of tnt eval → what of its results a card takes.
TASKS = {"perplexity": ("perplexity", "bits_per_byte"), "chunks": ("bits_per_byte",), "retrieval": ("exact_match",)}


@dataclass
class CardArguments:
    """What `tnt card` needs to know; every field but the model is a flag."""

    model: Path = option(Path(), "card", "folder of a saved TNT model", positional=True)
    eval: list[Path] = option(
        [], "card", f"results of tnt eval to add: its {', '.join(f'{task}.json' for task in TASKS)}"
    )
    template: Path | None = option(None, "card", "Jinja2 template to use instead of the package's own")
    repo_id: str | None = option(None, "card", "name that the model has, or will have, on the Hub: user/name")
    license: str | None = option(None, "card", "licence of the weights, an identifier of the Hub, e.g. apache-2.0")
    license_name: str | None = option(None, "card", "name of a licence that is none of the Hub's: --license other")
    license_link: str | None = option(None, "card", "where the text of such a licence is")
    languages: list[str] = option([], "card", "ISO 639 codes of the text's languages, e.g. en")
    overwrite: bool = option(False, "card", "replace a README.md that somebody wrote or edited")


def run_card(arguments: CardArguments) -> int:
    """The command `tnt card`: returns its exit status, and prints errors to stderr.

    0: done; 2: a model, a result, a template or metadata that cannot be used, or a README.md that would be lost.
    """
    try:
        path = make_card(arguments)
    except (ValueError, OSError) as error:
        print(f"\ntnt card: error: {_with_flag(error)}", file=sys.stderr)
        return 2
    print(f"card     {path}")
    return 0


def make_card(arguments: CardArguments) -> Path:
    """Write card and facts of a saved model, and return the path of the card.

    Raises:
        FileExistsError: for a README.md that somebody wrote or edited, without `overwrite`.
        ValueError, OSError: for what cannot be used. Nothing is written then.
    """
    folder = arguments.model
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is no folder with {CONFIG_NAME}; give the folder of a saved model")
    config = read_config(folder)
    if config is None:
        raise ValueError(f"{folder} holds no TNT model, and the card describes no other kind")
    facts = load_facts(folder, config) or bare_facts(folder, config)
    given = {
        name: value
        for name in ("repo_id", "license", "license_name", "license_link", "languages")
        if (value := getattr(arguments, name))
    }
    added = [result for path in arguments.eval for result in read_results(path, facts, folder, arguments.repo_id)]
    facts = replace(
        facts, **given, path=find_path(folder), remote_code=has_code(folder), results=_merge(facts.results, added)
    )
    path = write_card(folder, facts, arguments.template, arguments.overwrite)
    save_facts(folder, facts)
    return path


# ------------------------------------------------------------------------------------------------------------- results


def read_results(path: Path, facts: CardFacts, folder: Path, repo_id: str | None = None) -> list[ResultFacts]:
    """What a JSON file of `tnt eval` says of the model in `folder`.

    Raises:
        ValueError: for another kind of file or task, and for results of other models only: they would be claimed of
            this one.
        OSError: for a file that cannot be read.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        task, sources, models, arguments = (report[key] for key in ("task", "sources", "models", "arguments"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--eval {path} is no result of tnt eval ({error}); give one of its JSON files") from error
    if task not in TASKS:
        raise ValueError(f"--eval {path} holds the task {task}; a card takes {', '.join(TASKS)}")
    names = {str(name) for name in (repo_id, facts.repo_id) if name}
    label = next((k for k, s in sources.items() if s in names or _is_same(s, folder)), None)
    if label is None:
        raise ValueError(
            f"--eval {path} measured {', '.join(sources.values())}, not {folder}; run tnt eval {folder}, or give the "
            "paths from the folder that it ran in"
        )
    given = from_mapping(EvalArguments, arguments, f"--eval {path}", [])
    text, command = find_origin(given.data).held_out(), eval_command(task, given)
    own_chunks = facts.config.get("local_chunk_sizes") or None
    return [
        ResultFacts(
            metric=metric,
            value=at[metric]["value"],
            standard_error=at[metric]["standard_error"],
            local_chunk_sizes=at.get("local_chunk_sizes", own_chunks),
            tokens=at.get("tokens"),
            command=command,
            own=task == "perplexity",
            **(_describe_keys(at["length"]) if task == "retrieval" else text),
        )
        for at in _points(models[label])
        for metric in TASKS[task]
        if at[metric]["value"] is not None  # which is no finite number
    ]


def _points(measured: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a task measured: at one point, along a curve, or at each length."""
    return measured if isinstance(measured, list) else measured.get("curve", [measured])


def _describe_keys(length: int) -> dict[str, str]:
    return {
        "dataset": f"KEY = VALUE lines of random letters and digits, {length:,} tokens",
        "dataset_type": "key-value-lines",
    }


def _is_same(source: str, folder: Path) -> bool:
    path = Path(source).expanduser()
    return path.exists() and path.resolve() == folder.resolve()


def _merge(known: list[ResultFacts], added: list[ResultFacts]) -> list[ResultFacts]:
    """All of them; what was measured again by the same command replaces the older number."""
    commands = {result.command for result in added}
    return [*(result for result in known if result.command not in commands), *added]


def _with_flag(error: Exception) -> str:
    return str(error).replace("overwrite=True", "--overwrite")
