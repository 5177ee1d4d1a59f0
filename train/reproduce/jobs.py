"""The runs of table 3: for each row and seed a recipe of the trainer, checked."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_tnt import TNTConfig

from ..common.model_facts import count_parameters
from ..data import load_tokenizer
from ..options import to_mapping
from ..plan import Stage, make_config, plan_stages
from ..recipe import Recipe, load_recipe, recipe_from_mapping
from .arguments import Table3Arguments
from .paper import BASE, ROWS
from .runs import RUNS, Job
from .scales import SCALES


def make_jobs(arguments: Table3Arguments) -> list[Job]:
    """All runs, seed by seed, so that what is stopped has whole seeds.

    Args:
        arguments: resolved.

    Raises:
        ValueError: for recipes that cannot be used, with all that is wrong and the rows where it is.
        OSError: for a tokenizer that cannot be read.
    """
    base, step = _make_recipe(arguments, BASE), SCALES[arguments.scale].width_step
    tokenizer = load_tokenizer(base.data.tokenizer)
    recipes = {row: _make_recipe(arguments, row) for row in arguments.rows if ROWS[row].read_from is None}
    _raise_problems({row: recipe.problems() for row, recipe in recipes.items()})
    wanted = None if step is None else count_parameters(make_config(base.model, tokenizer))
    plans, problems = {}, dict.fromkeys(recipes, [])
    for row, recipe in recipes.items():
        try:
            plans[row] = plan_row(recipe, tokenizer, wanted, step)
        except ValueError as error:
            problems[row] = [str(error)]
    _raise_problems(problems)
    jobs: dict[tuple[str, int], Job] = {}
    for seed in range(arguments.seeds):
        for row, (stages, config) in plans.items():
            training = replace(recipes[row].training, seed=seed)
            output = replace(recipes[row].output, dir=arguments.output_dir / RUNS / f"{row}-seed{seed}")
            recipe, parent = replace(recipes[row], training=training, output=output), ROWS[row].begins_with
            jobs[row, seed] = Job(
                row, ROWS[row].title, seed, recipe, stages, config, parent and jobs[parent, seed]
            )  # fmt: skip
    return list(jobs.values())


def _make_recipe(arguments: Table3Arguments, row: str) -> Recipe:
    """Without the seed, and the folder of a run. Raises ValueError for unknown fields and values of a wrong type."""
    scale = SCALES[arguments.scale]
    fields = merge(scale.common, scale.rows[row])
    shipped = fields.pop("recipe", None)
    mapping = merge(to_mapping(load_recipe(shipped)) if shipped else {}, fields)
    for path, value in arguments.override.items():
        for name in reversed(path.split(".")):
            value = {name: value}
        mapping = merge(mapping, value)
    if arguments.tokens is not None:
        first, *later = mapping["stages"]
        mapping["stages"] = [{**first, "tokens": arguments.tokens, "steps": None}, *later]
    mapping = merge(mapping, {"output": {"dir": str(arguments.output_dir)}})
    return recipe_from_mapping(copy.deepcopy(mapping), f"the row {row}")


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; lists are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def plan_row(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: int | None, step: int | None
) -> tuple[list[Stage], TNTConfig]:
    """Stages and configuration of a row's runs; with `wanted` the recipe gets the feed-forward width, a multiple of
    `step`, that brings the number of parameters nearest to it. Raises ValueError for what cannot be used."""
    config = make_config(recipe.model, tokenizer)
    if wanted is not None and recipe.model.architecture == "tnt":
        per_unit = 3 * config.num_hidden_layers * config.hidden_size
        width = config.intermediate_size + (wanted - count_parameters(config)) / per_unit
        recipe.model.override["intermediate_size"] = step * max(1, round(width / step))
        config = make_config(recipe.model, tokenizer)
    return plan_stages(recipe, config), config


def _raise_problems(problems: dict[str, list[str]]) -> None:
    """One ValueError with the problems of all rows, each with the rows that have it, if there are any."""
    lines = []
    for problem in dict.fromkeys(text for texts in problems.values() for text in texts):
        rows = [row for row, texts in problems.items() if problem in texts]
        lines.append(f"{problem} ({'all rows' if len(rows) == len(problems) else ', '.join(rows)})")
    if lines:
        raise ValueError("\n  ".join(["these settings cannot be used:", *lines]))
