"""Make a card from facts and a template, and write it where no other one would be lost."""

from __future__ import annotations

import difflib
import hashlib
import re
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from .facts import FACTS_FILE, CardFacts, save_facts
from .files import write_file
from .validate import validate_card
from .variables import template_variables

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# The last line of a card tells a later run whether somebody has edited it since.
_SIGNATURE = re.compile(r"\n<!-- written by modeling_tnt, sha256 ([0-9a-f]{16}) -->\n\Z")


def render_card(facts: CardFacts, template_path: str | Path | None = None) -> ModelCard:
    """The card of a model.

    `ModelCard.from_template` renders a misspelt variable as nothing, so the template is rendered here.

    Args:
        template_path: a Jinja2 template; it begins with the metadata, `---`, `{{ card_data }}`, `---`. The variables
            are those of `variables.template_variables`. None: the package's own.

    Raises:
        ValueError: for a variable that the template uses and that does not exist, all of them at once; a template that
            is no Jinja2, or fails when it is rendered; metadata that break a rule of the Hub, all of them at once.
        OSError: for a template that cannot be read.
    """
    path = TEMPLATE if template_path is None else Path(template_path)
    variables = template_variables(facts)
    content = _render(path, variables)
    validate_card(content)
    return ModelCard(content)


def write_card(
    folder: str | Path, facts: CardFacts, template_path: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Write the card of the model in `folder` to README.md there, and return its path.

    The file is replaced as a whole, or not at all. A card that this function wrote and nobody has changed since is
    written again.

    Args:
        template_path: as for `render_card`.
        overwrite: replace a README.md of any other origin, too.

    Raises:
        FileExistsError: for a README.md that somebody else wrote, or edited.
        ValueError: as `render_card` does.
        OSError: when it cannot be written; the one that was there is kept.
    """
    path = Path(folder) / CARD_FILE
    if not overwrite and path.exists() and not is_own_card(path):
        raise FileExistsError(
            f"{path} was written or edited by somebody else, and is kept; use overwrite=True to replace it"
        )
    name = Path(folder).resolve().name
    if facts.name is None and facts.repo_id is None and not name.startswith("."):  # hidden: it will be renamed
        facts = replace(facts, name=name, path=find_path(folder))
    write_file(path, _sign(render_card(facts, template_path)))
    return path


def find_path(folder: str | Path) -> str:
    """The path of a model's folder from the working directory, or if it is not in there from the folder around it: no
    other part of a path says anything to others."""
    folder = Path(folder).resolve()
    around = Path.cwd() if Path.cwd() in folder.parents else folder.parent
    return f"./{folder.relative_to(around).as_posix()}"


def name_card(folder: str | Path, facts: CardFacts, repo_id: str) -> bool:
    """Write the card of a model that goes to the Hub again, so that it loads it by its name there; and its facts, if
    they are beside it.

    Only a card that is exactly what the package's template makes of `facts`, which nothing is lost of. Returns whether
    it was. Raises OSError.
    """
    path = Path(folder) / CARD_FILE
    try:
        is_same = path.is_file() and path.read_text(encoding="utf-8") == _sign(render_card(facts))
    except ValueError:  # of another encoding, or facts that no longer make a card
        return False
    if is_same:
        facts = replace(facts, repo_id=repo_id)
        write_card(folder, facts)
        if (Path(folder) / FACTS_FILE).is_file():
            save_facts(Path(folder), facts)
    return is_same


def _sign(card: ModelCard) -> str:
    text = str(card).rstrip("\n") + "\n"
    return f"{text}\n<!-- written by modeling_tnt, sha256 {_digest(text)} -->\n"


def is_own_card(path: Path) -> bool:
    """Whether `write_card` wrote this file and nobody has changed it since."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    found = _SIGNATURE.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _render(path: Path, variables: dict[str, Any]) -> str:
    # In the sandbox a template of somebody else's can neither run code nor change what it is given.
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    try:
        source = path.read_text(encoding="utf-8")
        parsed = environment.parse(source)
        unknown = meta.find_undeclared_variables(parsed) - set(variables)
        if unknown:
            lines = {name.name: name.lineno for name in parsed.find_all(nodes.Name) if name.name in unknown}
            wrong = "; ".join(_suggest(name, line, variables) for name, line in sorted(lines.items()))
            raise ValueError(f"the card template {path} uses {wrong}. It may use {', '.join(sorted(variables))}")
        template = environment.from_string(source)
    except UnicodeDecodeError as error:
        raise ValueError(f"the card template {path} is not UTF-8 text ({error}); convert it") from error
    except TemplateSyntaxError as error:
        raise ValueError(f"the card template {path} is no Jinja2: line {error.lineno}: {error.message}") from error
    try:
        return template.render(variables)
    except Exception as error:  # whatever the template's own expressions raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        what = {
            SecurityError: "does what the sandbox forbids: a template may read its variables, and run no code",
            UndefinedError: "uses what does not exist",
        }.get(type(error), f"fails with {type(error).__name__}")
        raise ValueError(f"the card template {path}, line {lines[-1] if lines else '?'}, {what} ({error})") from error


def _suggest(name: str, line: int, variables: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, variables, n=1)
    return f"the variable {name} in line {line}, which does not exist" + (f" (did you mean {near[0]}?)" if near else "")
