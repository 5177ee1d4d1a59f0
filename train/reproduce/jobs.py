"""The runs of a reproduction: for each row and seed a recipe of the trainer, checked, and what it begins with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedTokenizerBase

from modeling_tnt import TNTConfig, TNTForCausalLM

from ..data import load_tokenizer
from ..loop.run_folder import RunFolder
from ..options import to_mapping
from ..plan import Stage, find_differences, make_config, plan_stages
from ..recipe import Recipe, load_recipe, recipe_from_mapping
from .arguments import Table3Arguments
from .paper import BASE, ROWS
from .scales import SCALES, Scale


@dataclass(frozen=True)
class Job:
    """One run of the trainer.

    row, seed  which row of the table, and its seed.
    recipe     complete; `output.dir` is the run's own folder.
    stages     as the trainer will plan them.
    config     of the model that the first stage starts from; of a Llama, the TNT model that it is as large as.
    parent     name of the run whose first stage this one goes on from.
    """

    row: str
    seed: int
    recipe: Recipe
    stages: list[Stage]
    config: TNTConfig
    parent: str | None

    @property
    def name(self) -> str:
        return name_of(self.row, self.seed)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.recipe.output.dir)

    @property
    def finished(self) -> bool:
        return self.folder.metrics_file.is_file()

    @property
    def steps(self) -> int:
        """Optimizer steps that this run takes itself."""
        return sum(stage.steps for stage in (self.stages[1:] if self.parent else self.stages))


def name_of(row: str, seed: int) -> str:
    return f"{row}-seed{seed}"


def make_jobs(arguments: Table3Arguments) -> list[Job]:
    """All runs, seed by seed, so that one that is stopped has whole seeds.

    Args:
        arguments: resolved.

    Raises:
        ValueError: for recipes that cannot be used, or runs in the output folder that were made with other settings.
        OSError: for a tokenizer that cannot be read.
    """
    scale, problems = SCALES[arguments.scale], {}
    rows = [row for row in arguments.rows if ROWS[row].read_from is None]
    base = _make_recipe(arguments, scale, BASE, 0)
    tokenizer = load_tokenizer(base.data.tokenizer)
    for row in rows:
        for problem in _make_recipe(arguments, scale, row, 0).problems():
            problems.setdefault(problem, []).append(row)
    _raise_problems(problems, len(rows))
    wanted = None if scale.width_step is None else count_parameters(make_config(base.model, tokenizer))
    jobs = []
    for seed in range(arguments.seeds):
        for row in rows:
            recipe = _make_recipe(arguments, scale, row, seed)
            try:
                jobs.append(_make_job(row, seed, recipe, tokenizer, wanted, scale.width_step))
            except ValueError as error:
                problems.setdefault(str(error), []).append(row)
        _raise_problems(problems, len(rows))
    return jobs


def _make_job(
    row: str, seed: int, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: int | None, step: int | None
) -> Job:
    """Raises ValueError for a configuration or stages that are no good."""
    if wanted is not None and recipe.model.architecture == "tnt":
        recipe.model.override["intermediate_size"] = _fit_width(recipe, tokenizer, wanted, step)
    config, parent = make_config(recipe.model, tokenizer), ROWS[row].begins_with
    return Job(row, seed, recipe, plan_stages(recipe, config), config, parent and name_of(parent, seed))


def _raise_problems(problems: dict[str, list[str]], num_rows: int) -> None:
    """One ValueError with every problem and the rows that have it, if there are any."""
    if problems:
        lines = [
            f"{problem} ({'all rows' if len(rows) == num_rows else ', '.join(rows)})"
            for problem, rows in problems.items()
        ]  # fmt: skip
        raise ValueError("\n  ".join(["these settings cannot be used:", *lines]))


def _make_recipe(arguments: Table3Arguments, scale: Scale, row: str, seed: int) -> Recipe:
    fields = merge(scale.common, scale.rows[row])
    shipped = fields.pop("recipe", None)
    mapping = merge(to_mapping(load_recipe(shipped)) if shipped else {}, fields)
    for path, value in arguments.override.items():
        *sections, name = path.split(".")
        nested = {name: value}
        for section in reversed(sections):
            nested = {section: nested}
        mapping = merge(mapping, nested)
    if arguments.tokens is not None:
        first, *later = mapping["stages"]
        mapping["stages"] = [{**first, "tokens": arguments.tokens, "steps": None}, *later]
    own = {"training": {"seed": seed}, "output": {"dir": str(arguments.output_dir / "runs" / name_of(row, seed))}}
    return recipe_from_mapping(merge(mapping, own), f"the row {row}")


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; lists are replaced as a whole."""
    merged = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def count_parameters(config: TNTConfig) -> int:
    with torch.device("meta"):
        return TNTForCausalLM(config).num_parameters()


def _fit_width(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: int, step: int) -> int:
    """The multiple of `step` that, as feed-forward width, brings the number of parameters nearest to `wanted`."""
    config = make_config(recipe.model, tokenizer)
    per_unit = 3 * config.num_hidden_layers * config.hidden_size
    width = config.intermediate_size + (wanted - count_parameters(config)) / per_unit
    return step * max(1, round(width / step))


# ------------------------------------------------------------------------------------------------------ output folder


def find_other_settings(jobs: list[Job]) -> list[str]:
    """Runs that are there and were made with other settings, as problems."""
    problems = []
    for job in jobs:
        if not job.folder.recipe_file.exists():
            continue
        file = job.folder.recipe_file
        saved = load_recipe(str(file))
        problems += [
            f"{job.folder.root} was made with {path}={old}, now it is {new}"
            for path, old, new in find_differences(saved, job.recipe)
        ]
    return problems


def write_recipe(job: Job, folder: Path) -> Path:
    """The recipe as a file that the trainer can be started with."""
    path = folder / f"{job.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_mapping(job.recipe), sort_keys=False), encoding="utf-8")
    return path
