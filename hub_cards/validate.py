"""The Hub's rules for a model card's metadata, as far as they need no network.

`ModelCard.validate` of huggingface_hub posts the card to the Hub, which answers with the first rule that it breaks.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .strict_yaml import StrictLoader

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3
    llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++
    osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_repo(value: Any) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


# What a value must be, in words, and whether it is.
_TEXT = ("text", _is_text)
_WORD = ("one word, such as transformers or text-generation", _matches(r"[A-Za-z0-9_.-]+"))
_VALUE = ("a number or text", lambda value: isinstance(value, int | float | str) and not isinstance(value, bool))
_REPO = ("a name on the Hub, 'user/name'", _is_repo)
# YAML reads the code of Norwegian, no, as false.
_LANGUAGE = (
    "an ISO 639 code of two or three letters, or code or multilingual", _matches("[a-z]{2,3}|code|multilingual")
)  # fmt: skip
_DATASET = ("a dataset's name, 'user/name' or one word", _matches(r"(?:[\w-]+/)?[\w.-]+"))  # need not be on the Hub

# The form of each field that has one: a list has one of its own for all of its entries.
# https://github.com/huggingface/hub-docs/blob/main/modelcard.md
FIELDS = {
    "license_name": _TEXT,
    "license_link": _TEXT,
    "library_name": _WORD,
    "pipeline_tag": _WORD,
    "tags": [_TEXT],
    "metrics": [_TEXT],
    "model-index": [
        {
            "name": _TEXT,
            "results": [
                {
                    "task": {"type": _TEXT},
                    "dataset": {"type": _DATASET, "name": _TEXT},
                    "metrics": [{"type": _TEXT, "value": _VALUE}],
                }
            ],
        }
    ],
}
ONE_OR_MORE = {"language": [_LANGUAGE], "datasets": [_REPO], "base_model": [_REPO]}


def validate_card(card: str | ModelCard) -> None:
    """Raise one ValueError that lists every rule that a card breaks; see `find_problems`."""
    problems = find_problems(card)
    if problems:
        raise ValueError("\n  ".join(["this model card cannot be used:", *problems]))


def find_problems(card: str | ModelCard) -> list[str]:
    """Every rule that the metadata of a card break, as texts with the field, the rule, the value and the remedy.

    Args:
        card: the content of a README.md, or a card of huggingface_hub.
    """
    found = REGEX_YAML_BLOCK.match(str(card))
    if found is None:
        return ["the card must begin with its metadata, YAML between two lines of ---; a template has {{ card_data }}"]
    try:
        data = yaml.load(found.group(2), Loader=StrictLoader)
    except yaml.YAMLError as error:
        return [f"the metadata must be valid YAML: {error}"]
    if not isinstance(data, dict):
        return [f"the metadata must be a mapping of fields, got {data!r}"]
    problems = [*_find_empty(data, ""), *_find_wrong_license(data)]
    for name, form in (FIELDS | ONE_OR_MORE).items():
        value = data.get(name)
        if name in ONE_OR_MORE and not isinstance(value, list):
            value = [value]
        if value not in (None, "", [], [None], [""]):  # which _find_empty tells of
            problems += _find_wrong_form(value, form, name)
    return problems


def _find_empty(value: Any, at: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _find_empty(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _find_empty(inner, f"{at}[{i}]")
    if value is None or value == "" or value == [] or (value == {} and at):
        yield f"{at} is empty; leave it out"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{at} must be a finite number, got {value}; leave it out"


def _find_wrong_form(value: Any, form: Any, at: str) -> Iterator[str]:
    """What in a value has not the form that it must have; `at` is its place in the metadata."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            yield f"{at} must be a mapping with {', '.join(form)}, got {value!r}"
            return
        for name, inner in form.items():
            yield from _find_wrong_form(value.get(name), inner, f"{at}.{name}")
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{at} must be a list, got {value!r}"
            return
        for i, inner in enumerate(value):
            yield from _find_wrong_form(inner, form[0], f"{at}[{i}]")
    else:
        rule, holds = form
        if not holds(value):
            yield f"{at} must be {rule}, got {value!r}"


def _find_wrong_license(data: dict[str, Any]) -> Iterator[str]:
    licenses = data.get("license")
    licenses = licenses if isinstance(licenses, list) else [] if licenses is None else [licenses]
    for value in licenses:
        if value not in LICENSES:
            near = _nearest_license(str(value))
            hint = f"; did you mean {near}?" if near else ""
            yield (
                f"license must be an identifier of the Hub, such as apache-2.0, or other together with license_name, "
                f"got {value!r}{hint}"
            )
    if "other" in licenses and not data.get("license_name"):
        yield "license other needs license_name, the name of the licence"


def _nearest_license(value: str) -> str | None:
    """The identifier that was meant: "MIT License" is mit, "Apache License, Version 2.0" is apache-2.0."""
    words = re.sub(r"\b(the|gnu|licen[cs]e|version)\b", " ", value.lower())
    words = re.sub(r"(?:\bv|(?<=gpl)v?)(?=\d)", " ", words)
    name = "-".join(re.findall(r"[a-z0-9.+]+", words))
    whole = [known for known in (name, f"{name}.0") if known in LICENSES]
    near = whole or difflib.get_close_matches(name, sorted(LICENSES), n=1)
    return near[0] if near else None
