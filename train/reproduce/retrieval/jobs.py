"""The runs of `tnt reproduce retrieval`: for each model and seed a recipe of the trainer, and its `tnt eval`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...common.model_facts import count_parameters
from ...common.output_folder import OutputFolder
from ...data import load_tokenizer
from ...plan import make_config
from ...recipe import Recipe, recipe_from_mapping
from ..jobs import plan_row
from ..runs import RUNS, Job, environment
from .arguments import BASE, MODEL, ROWS, RetrievalArguments

EVALUATIONS = "eval"
WIDTH_STEP = 8  # of the feed-forward layers, which make up for what attention adds
STAGE = "trained"


def make_jobs(arguments: RetrievalArguments) -> list[Job]:
    """All runs, seed by seed, so that what is stopped has whole seeds.

    Raises ValueError for recipes that cannot be used.
    """
    base = _make_recipe(arguments, BASE, 0)
    tokenizer = load_tokenizer(base.data.tokenizer)
    wanted = count_parameters(make_config(base.model, tokenizer))
    jobs = []
    for seed in range(arguments.seeds):
        for row in arguments.rows:
            recipe = _make_recipe(arguments, row, seed)
            if problems := recipe.problems():
                raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
            jobs.append(Job(row, ROWS[row].title, seed, recipe, *plan_row(recipe, tokenizer, wanted, WIDTH_STEP)))
    return jobs


def _make_recipe(arguments: RetrievalArguments, row: str, seed: int) -> Recipe:
    folder = arguments.output_dir
    mapping: dict[str, Any] = {
        "model": {
            "preset": "tiny", "architecture": ROWS[row].architecture,
            "override": {**MODEL, **ROWS[row].override},
        },
        "data": {
            "sources": [str(folder / texts_name(arguments))], "limit_megabytes": 0,
        },
        "optimizer": {"learning_rate": arguments.learning_rate},
        "training": {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size, "seed": seed},
        "stages": [{"name": STAGE, "steps": arguments.steps}],
        "output": {
            "dir": str(folder / RUNS / f"{row}-seed{seed}"), "sample_tokens": 0, "keep_checkpoints": 1,
            "checkpoint_every": 50, "health_every": 100,
        },
    }  # fmt: skip
    return recipe_from_mapping(mapping, f"the model {row}")


def texts_name(arguments: RetrievalArguments) -> str:
    return f"texts-{arguments.megabytes:g}MB.jsonl"


# ---------------------------------------------------------------------------------------------------------- evaluation


def results_of(arguments: RetrievalArguments, job: Job) -> Path:
    return arguments.output_dir / EVALUATIONS / job.name / "retrieval.json"


def read_results(arguments: RetrievalArguments, job: Job) -> dict[int, dict[str, Any]] | None:
    """What `tnt eval` found of a run, by length; None where it has not measured what is asked for."""
    path = results_of(arguments, job)
    if not job.finished or not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    asked = {"retrieval_lengths": arguments.retrieval_lengths, "retrieval_documents": arguments.retrieval_documents}
    if any(report["arguments"][name] != value for name, value in asked.items()):
        return None
    (of_lengths,) = report["models"].values()
    return {found["length"]: found for found in of_lengths}


def eval_command(arguments: RetrievalArguments, job: Job) -> list[str]:
    data, lengths = job.recipe.data, map(str, arguments.retrieval_lengths)
    return [
        sys.executable, "-m", "modeling_tnt.train.cli", "eval", str(job.folder.stage(STAGE)), "--tasks", "retrieval",
        "--retrieval-lengths", *lengths, "--retrieval-documents", str(arguments.retrieval_documents),
        "--batch-size", "25", "--seq-len", str(arguments.seq_len), "--eval-tokens", str(arguments.seq_len),
        "--data.sources", *data.sources, "--data.limit-megabytes", "0",
        "--device", str(arguments.device), "--output-dir", str(results_of(arguments, job).parent), "--overwrite",
    ]  # fmt: skip


def measure(arguments: RetrievalArguments, job: Job) -> str | None:
    """Evaluate a finished run, unless that has been done; returns why it could not be."""
    if read_results(arguments, job) is not None:
        return None
    command = eval_command(arguments, job)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(arguments.device),
        check=False,
    )  # fmt: skip
    return None if done.returncode == 0 else f"tnt eval: {' '.join(done.stderr.split()[-60:])}"


def clear_evaluations(arguments: RetrievalArguments, jobs: list[Job]) -> None:
    for job in jobs:
        OutputFolder(results_of(arguments, job).parent, "eval").clear()
