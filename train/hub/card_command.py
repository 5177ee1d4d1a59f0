"""`tnt card`: write the card of a saved model again, with results of `tnt eval`, a licence, or another template."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_NAME

from modeling_tnt.hub_cards import CardFacts, ResultFacts, find_path, load_facts, save_facts, write_card

from ..common.model_facts import bare_facts, has_code, read_config
from ..common.provenance import DataOrigin, eval_command, find_origin
from ..evaluation.arguments import EvalArguments
from ..options import from_mapping, option

TASKS = ("perplexity", "chunks", "retrieval")


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
    command = eval_command(task, given)
    chunks = facts.config.get("local_chunk_sizes") or None
    return list(_READERS[task](models[label], find_origin(given.data), command, chunks))


def _is_same(source: str, folder: Path) -> bool:
    path = Path(source).expanduser()
    return path.exists() and path.resolve() == folder.resolve()


def _read_perplexity(
    model: dict[str, Any], origin: DataOrigin, command: str, chunks: list[int] | None
) -> Iterator[ResultFacts]:
    for metric in ("perplexity", "bits_per_byte"):
        yield from _result(metric, model[metric], origin, command, chunks, tokens=model["tokens"], own=True)


def _read_chunks(
    model: dict[str, Any], origin: DataOrigin, command: str, chunks: list[int] | None
) -> Iterator[ResultFacts]:
    for point in model["curve"]:
        sizes = point["local_chunk_sizes"]
        yield from _result("bits_per_byte", point["bits_per_byte"], origin, command, sizes, tokens=point["tokens"])


def _read_retrieval(
    model: list[dict[str, Any]], origin: DataOrigin, command: str, chunks: list[int] | None
) -> Iterator[ResultFacts]:
    for at in model:
        text = DataOrigin(f"KEY = VALUE lines of random letters and digits, {at['length']:,} tokens", "key-value-lines")
        yield from _result("exact_match", at["exact_match"], text, command, chunks)


def _result(
    metric: str, estimate: dict[str, Any], origin: DataOrigin, command: str, chunks: list[int] | None,
    tokens: int | None = None, own: bool = False,
) -> Iterator[ResultFacts]:  # fmt: skip
    """One result, or none where the evaluation got no finite number."""
    if estimate["value"] is None:
        return
    held_out = tokens is not None
    yield ResultFacts(
        metric=metric,
        value=estimate["value"],
        standard_error=estimate["standard_error"],
        local_chunk_sizes=chunks,
        dataset=f"held-out documents of {origin.words}" if held_out else origin.words,
        dataset_type=origin.kind,
        dataset_config=origin.config,
        dataset_split=origin.split,
        tokens=tokens,
        command=command,
        own=own,
    )


_READERS = {"perplexity": _read_perplexity, "chunks": _read_chunks, "retrieval": _read_retrieval}


def _merge(known: list[ResultFacts], added: list[ResultFacts]) -> list[ResultFacts]:
    """All of them; what was measured again by the same command replaces the older number."""
    commands = {result.command for result in added}
    return [*(result for result in known if result.command not in commands), *added]


def _with_flag(error: Exception) -> str:
    return str(error).replace("overwrite=True", "--overwrite")
