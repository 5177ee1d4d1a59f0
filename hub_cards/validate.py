"""The Hub's rules for a model card's metadata, as far as they need no network.

`ModelCard.validate` of huggingface_hub posts the card to the Hub, which answers with the first rule that it breaks.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
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
SPECIAL_LANGUAGES = ("code", "multilingual")
# What the Hub asks of a dataset in a model-index, which need not be one of its own.
DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+")


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
    return [
        *_find_empty(data, ""),
        *_find_wrong_license(data),
        *_find_wrong_lists(data),
        *_find_wrong_languages(data.get("language")),
        *_find_wrong_names(data),
        *_find_wrong_index(data.get("model-index")),
    ]


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
    for name in ("license_name", "license_link"):
        if data.get(name) is not None and not isinstance(data[name], str):
            yield f"{name} must be text, got {data[name]!r}"


def _nearest_license(value: str) -> str | None:
    """The identifier that was meant: "MIT License" is mit, "Apache License, Version 2.0" is apache-2.0."""
    words = re.sub(r"\b(the|gnu|licen[cs]e|version)\b", " ", value.lower())
    words = re.sub(r"(?:\bv|(?<=gpl)v?)(?=\d)", " ", words)
    name = "-".join(re.findall(r"[a-z0-9.+]+", words))
    whole = [known for known in (name, f"{name}.0") if known in LICENSES]
    near = whole or difflib.get_close_matches(name, sorted(LICENSES), n=1)
    return near[0] if near else None


def _find_wrong_lists(data: dict[str, Any]) -> Iterator[str]:
    for name in ("tags", "metrics"):
        value = data.get(name)
        if value is None:
            continue
        if not isinstance(value, list):
            yield f"{name} must be a list of texts, got {value!r}"
            continue
        yield from (f"{name}[{i}] must be text, got {x!r}" for i, x in enumerate(value) if not isinstance(x, str))
    for name in ("datasets", "base_model"):
        value = data.get(name)
        for i, item in enumerate(value if isinstance(value, list) else [] if value is None else [value]):
            try:
                validate_repo_id(item)
            except (HFValidationError, TypeError) as error:
                yield f"{name}[{i}] must be a name on the Hub, 'user/name', got {item!r}: {error}"


def _find_wrong_languages(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        # YAML reads the code of Norwegian, no, as false.
        if not isinstance(item, str) or not (re.fullmatch("[a-z]{2,3}", item) or item in SPECIAL_LANGUAGES):
            yield (
                f"language must be an ISO 639 code of two or three letters, or {' or '.join(SPECIAL_LANGUAGES)}, got "
                f"{item!r}"
            )


def _find_wrong_names(data: dict[str, Any]) -> Iterator[str]:
    for name in ("library_name", "pipeline_tag"):
        value = data.get(name)
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", value)):
            yield f"{name} must be one word, such as transformers or text-generation, got {value!r}"


# --------------------------------------------------------------------------------------------------------- model-index


def _find_wrong_index(index: Any) -> Iterator[str]:
    """https://github.com/huggingface/hub-docs/blob/main/modelcard.md"""
    if index is None:
        return
    if not isinstance(index, list):
        yield f"model-index must be a list, got {index!r}"
        return
    for i, model in enumerate(index):
        at = f"model-index[{i}]"
        if not isinstance(model, dict):
            yield f"{at} must be a mapping, got {model!r}"
            continue
        yield from _find_missing_text(model, ("name",), at)
        results = model.get("results")
        if not isinstance(results, list) or not results:
            yield f"{at}.results must be a list of at least one result, got {results!r}"
            continue
        for j, result in enumerate(results):
            yield from _find_wrong_result(result, f"{at}.results[{j}]")


def _find_wrong_result(result: Any, at: str) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f"{at} must be a mapping, got {result!r}"
        return
    for name, required in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(name)
        if isinstance(part, dict):
            yield from _find_missing_text(part, required, f"{at}.{name}")
        else:
            yield f"{at}.{name} must be a mapping with {' and '.join(required)}, got {part!r}"
    dataset = result.get("dataset")
    kind = dataset.get("type") if isinstance(dataset, dict) else None
    if isinstance(kind, str) and kind and not DATASET_TYPE.fullmatch(kind):
        yield f"{at}.dataset.type must be a dataset's name, 'user/name' or one word, got {kind!r}"
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f"{at}.metrics must be a list of at least one metric, got {metrics!r}"
        return
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict):
            yield f"{at}.metrics[{k}] must be a mapping, got {metric!r}"
            continue
        yield from _find_missing_text(metric, ("type",), f"{at}.metrics[{k}]")
        value = metric.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            yield f"{at}.metrics[{k}].value must be a number or text, got {value!r}"


def _find_missing_text(mapping: dict[str, Any], names: tuple[str, ...], at: str) -> Iterator[str]:
    for name in names:
        if not isinstance(mapping.get(name), str) or not mapping[name]:
            yield f"{at}.{name} must be text, got {mapping.get(name)!r}"
