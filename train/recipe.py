"""The recipe of a training run: what `tnt train --config recipe.yaml` reads, every field of which is also a flag.

A recipe has sections (model, data, optimizer, training, output) and a list of stages. Read `Recipe`, `load_recipe`.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .data import DataOptions
from .options import find_blocked_folder, flag_of, from_mapping, option

ARCHITECTURES = ("tnt", "llama")
SCHEDULES = ("cosine", "wsd", "constant")
TRAINABLE = ("all", "local", "lora")
SHARDINGS = ("none", "fsdp2")
TRACKERS = ("tensorboard", "wandb", "trackio")
PRECISIONS = ("no", "bf16")
PUSHES = ("end", "save")
UNNAMED = "stage"
LONGEST_NAME = 64
# Of a run's folders, those that are not named after stages.
OTHER_FOLDERS = {"best": "the best model", "checkpoints": "the checkpoints", "tnt": "what TensorBoard gets"}
LARGEST_SEED = 2**32 - 1  # of NumPy
LARGEST_NUMBER = 2**53  # beyond it floats are no longer exact


@dataclass
class ModelOptions:
    """Which model is trained, and from which weights."""

    preset: str = option("tiny", "model", "name of the model's preset")
    override: dict[str, Any] = option({}, "model", "TNTConfig fields to replace, e.g. num_heads=2 qk_projection=none")
    architecture: str = option(
        "tnt", "model", "tnt, or llama: transformers' Llama of the preset's width, depth, heads and vocabulary and of "
        "about as many parameters",
    )  # fmt: skip
    start_from: str | None = option(
        None, "model", "folder or Hub name of a TNT checkpoint whose weights and configuration the first stage starts "
        "from, instead of a preset",
    )  # fmt: skip


@dataclass
class OptimizerOptions:
    """AdamW, as in the papers: matrices of the projections decay, and nothing else does (`optim.parameter_groups`)."""

    learning_rate: float = option(3e-3, "optimizer", "peak learning rate of the first stage")
    beta1: float = option(0.9, "optimizer", "decay of the mean of the gradients, a step")
    beta2: float = option(0.95, "optimizer", "decay of the mean of the squared gradients, a step")
    weight_decay: float = option(0.1, "optimizer", "decay of the projections' matrices, and of no others")
    max_grad_norm: float = option(1.0, "optimizer", "L2 norm that gradients are clipped to")


@dataclass
class StageOptions:
    """One stretch of training. Its length is given as one of `steps`, `tokens` and `share`."""

    name: str = UNNAMED
    steps: int | None = option(None, "stages", "optimizer steps")
    tokens: float | None = option(None, "stages", "tokens, rounded up to whole steps")
    share: float | None = option(None, "stages", "steps as a share of the first stage's, at least one step")
    local_chunk_sizes: list[int] | None = option(
        None, "stages", "tokens in a chunk, one number for each local memory; none: as they are"
    )
    chunk_divisor: int | None = option(
        None, "stages", "instead of local_chunk_sizes: the largest divisor of each chunk size that is at most this "
        "part of it, at least 1",
    )  # fmt: skip
    local_shard_lengths: list[int | None] | None = option(
        None, "stages", "tokens after which a local memory is reset, one for each (none: never); without: as they are"
    )
    seq_len: int | None = option(None, "stages", "tokens in a row; none: training.seq_len")
    learning_rate: float | None = option(
        None, "stages", "peak; none: the optimizer's in the first stage, a tenth of it later, where a cosine has ended"
    )
    schedule: str = option(
        "cosine", "stages", "cosine, wsd (warm-up, stable, decay in a straight line) or constant, each after a warm-up"
    )
    warmup_share: float = option(0.1, "stages", "share of the steps with a rising learning rate")
    decay_share: float = option(0.2, "stages", "wsd: share of the steps with a falling learning rate")
    final_share: float = option(0.1, "stages", "share of the peak learning rate that cosine and wsd end with")
    trainable: str = option(
        "all", "stages", "all, local (the local memories alone) or lora (adapters on the projections, and the local "
        "memories; needs peft), merged at the end of the stage",
    )  # fmt: skip
    lora_rank: int = option(8, "stages", "rank of the adapters")


@dataclass
class TrainingOptions:
    """How a step is taken."""

    seq_len: int = option(1024, "training", "tokens in a row")
    batch_size: int = option(1, "training", "rows in a step, over all processes")
    micro_batch_size: int | None = option(
        None, "training", "rows in a forward pass of one process; none: as many as batch_size and the processes allow. "
        "Gradients are accumulated over the passes of a step",
    )  # fmt: skip
    seed: int = option(0, "training", "of the initial weights, the order of the data and the sample")
    mixed_precision: str = option("no", "training", "no (float32) or bf16 (autocast; weights stay float32)")
    gradient_checkpointing: bool = option(False, "training", "keep one activation a block, compute the others again")
    compile: bool = option(False, "training", "torch.compile the model")
    sharding: str = option(
        "none", "training", "none (each process has the whole model, DDP) or fsdp2 (weights, gradients and optimizer "
        "in parts); fsdp2 is also chosen by an accelerate configuration with FSDP",
    )  # fmt: skip
    data_workers: int = option(0, "training", "processes that read rows; 0: the training process")


@dataclass
class OutputOptions:
    """What is kept, shown and measured on the way."""

    dir: Path = option(Path("runs/quickstart"), "output", "folder for checkpoints, models, metrics and plots")
    overwrite: bool = option(False, "output", "replace what an earlier run wrote in output.dir", alias="--overwrite")
    resume: bool = option(
        False, "output", "go on with the run that output.dir holds, from its newest checkpoint, or begin if there is "
        "none", alias="--resume",
    )  # fmt: skip
    accept_changed_data: bool = option(
        False, "output", "resume although the text is not what it was when the checkpoint was saved"
    )
    checkpoint_every: int = option(200, "output", "steps between checkpoints")
    keep_checkpoints: int = option(2, "output", "newest checkpoints to keep; the best model is kept besides")
    eval_every: int | None = option(None, "output", "steps between validations; none: at the end of each stage")
    health_every: int = option(50, "output", "steps between looks at the memories' inner loops")
    eval_tokens: int = option(
        131072, "output", "validation tokens to score, rounded down to whole rows; never more than a quarter of the "
        "tokens that the first stage trains on",
    )  # fmt: skip
    prompt_tokens: int = option(256, "output", "validation tokens that the sample continues")
    sample_tokens: int = option(256, "output", "tokens of the sample; 0: none")
    license: str | None = option(
        None, "output", "licence of the weights for their model cards, an identifier of the Hub, e.g. apache-2.0"
    )
    trackers: list[str] = option([], "output", f"report to these as well: {', '.join(TRACKERS)}")
    push_to_hub: str | None = option(
        None, "output", "repository on the Hub to push the model to: user/name, or name for one of your own",
        alias="--push-to-hub",
    )  # fmt: skip
    push_every: str = option(
        "end", "output", "end: push the last stage's model when the run is done; save: also each checkpoint's model, "
        "for which training waits",
    )  # fmt: skip
    push_private: bool = option(False, "output", "make a new repository private; an existing one must be")
    push_revision: str | None = option(None, "output", "branch to push to, made from main if it is new; none: main")
    push_dry_run: bool = option(False, "output", "list what would be pushed, and send nothing")


def _default_stages() -> list[StageOptions]:
    return [StageOptions(name="stage1", steps=1200), StageOptions(name="stage2", share=0.05, chunk_divisor=4)]


@dataclass
class Recipe:
    """Everything that `tnt train` needs to know. The defaults are the README's first command."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    stages: list[StageOptions] = field(default_factory=_default_stages)
    output: OutputOptions = field(default_factory=OutputOptions)

    def problems(self) -> list[str]:
        """Every rule that a value breaks by itself, as texts with the flag, the rule, the value and the remedy."""
        return [
            *_find_wrong_numbers(self), *_find_wrong_choices(self), *self.data.problems(), *_find_wrong_stages(self),
            *find_blocked_folder(self.output.dir, "output.dir"),
        ]  # fmt: skip


def available_recipes() -> list[str]:
    """The names that `load_recipe` accepts besides files, sorted."""
    return sorted(file.stem for file in _shipped_folder().glob("*.yaml"))


def _shipped_folder() -> Path:
    """Found without importing its package, which imports transformers."""
    (folder,) = find_spec("modeling_tnt.configuration").submodule_search_locations
    return Path(folder) / "recipes"


def load_recipe(name: str) -> Recipe:
    """The recipe in a YAML file, or one that is shipped, by its name. Either may name another as its `base:` and hold
    only what differs from it; see `train/README.md`.

    Raises:
        OSError: when there is no such file and no such recipe.
        ValueError: for a file that is no YAML, for a base that is not there or leads back to its own file, and for all
            unknown keys and values of a wrong type at once.
    """
    label, file = f"--config {name}", _find_file(name, Path())
    if file is None:
        raise FileNotFoundError(f"{label} is no file, and no recipe has this name; {_name_recipes()}")
    return _from_layers(_add_bases(label, _read_file(file, label), file))


def recipe_from_mapping(mapping: Any, name: str) -> Recipe:
    """A recipe from nested mappings; raises ValueError as `load_recipe` does. `name`: what messages call it."""
    return _from_layers(_add_bases(name, mapping, Path("recipe.yaml")))


def _add_bases(label: str, mapping: Any, file: Path) -> list[tuple[str, Any]]:
    """A mapping and those of its bases, the lowest first, each with what messages call it."""
    layers, above = [(label, mapping)], [file.resolve()]
    while isinstance(mapping, dict) and (base := mapping.get("base")) is not None:
        found = _find_file(base, file.parent) if isinstance(base, str) else None
        if found is None or not found.is_file():
            raise ValueError(f"{label}: base {base!r} is no file beside it, and no recipe's name; {_name_recipes()}")
        if found.resolve() in above:
            raise ValueError(f"{label}: base {base!r} leads in a circle; leave out the `base:` of one of these files")
        label, file = f"{label}, base {base}", found
        mapping = _read_file(file, label)
        layers.insert(0, (label, mapping))
        above.append(file.resolve())
    return layers


def _read_file(file: Path, label: str) -> Any:
    from modeling_tnt.hub_cards.strict_yaml import load_yaml  # imported here, as the licences below

    mapping = load_yaml(file.read_bytes(), label)
    return {} if mapping is None else mapping


def _name_recipes() -> str:
    return f"use a .yaml file or one of {', '.join(available_recipes())}"


def _find_file(name: str, folder: Path) -> Path | None:
    """The file that a path from `folder`, or the name of a shipped recipe, means."""
    path = folder / Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    return _shipped_folder() / f"{name}.yaml" if name in available_recipes() else None


def _from_layers(layers: list[tuple[str, Any]]) -> Recipe:
    problems: list[str] = []
    recipe = None
    for name, mapping in layers:
        model = mapping.get("model") if isinstance(mapping, dict) else None
        if recipe is not None and isinstance(model, dict) and "preset" in model:
            recipe.model.override = {}  # which belongs to the base's preset
        recipe = from_mapping(Recipe, mapping, name, problems, base=recipe, others=("base",))
        for i, stage in enumerate(recipe.stages):
            if stage.name == UNNAMED:
                stage.name = f"{UNNAMED}{i + 1}"
    problems += _find_wrong_names(recipe.stages)  # here already: flags are named after stages
    if problems:
        raise ValueError("\n  ".join(["this recipe cannot be used:", *problems]))
    return recipe


# --------------------------------------------------------------------------------------------------------------- rules


def _find_wrong_numbers(recipe: Recipe) -> Iterator[str]:
    training, output, optimizer = recipe.training, recipe.output, recipe.optimizer
    least = {
        "training.seq_len": (training.seq_len, 2), "training.batch_size": (training.batch_size, 1),
        "training.micro_batch_size": (training.micro_batch_size, 1), "training.seed": (training.seed, 0),
        "training.data_workers": (training.data_workers, 0), "output.checkpoint_every": (output.checkpoint_every, 1),
        "output.keep_checkpoints": (output.keep_checkpoints, 1), "output.eval_every": (output.eval_every, 1),
        "output.health_every": (output.health_every, 1), "output.eval_tokens": (output.eval_tokens, 1),
        "output.prompt_tokens": (output.prompt_tokens, 1), "output.sample_tokens": (output.sample_tokens, 0),
    }  # fmt: skip
    yield from _below(least)
    positive = {
        "optimizer.learning_rate": optimizer.learning_rate, "optimizer.max_grad_norm": optimizer.max_grad_norm,
    }  # fmt: skip
    yield from _not_positive(positive)
    yield from _outside({"optimizer.weight_decay": optimizer.weight_decay}, 0, 10)
    if training.seed > LARGEST_SEED:
        yield f"--training.seed must be at most {LARGEST_SEED}, got {training.seed}"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"--optimizer.{name} must be at least 0 and below 1, got {getattr(optimizer, name)}"


def _find_wrong_choices(recipe: Recipe) -> Iterator[str]:
    choices = {
        "model.architecture": (recipe.model.architecture, ARCHITECTURES),
        "training.mixed_precision": (recipe.training.mixed_precision, PRECISIONS),
        "training.sharding": (recipe.training.sharding, SHARDINGS),
        "output.push_every": (recipe.output.push_every, PUSHES),
    }
    yield from _not_among(choices)
    if recipe.model.architecture == "llama" and recipe.data.boundaries == "marked":
        yield (
            "--data.boundaries marked resets memories at the start of a document, which a Llama does not have; use "
            "--data.boundaries joined"
        )
    if recipe.model.architecture == "llama" and recipe.model.start_from is not None:
        yield "--model.start-from takes a TNT checkpoint, and --model.architecture is llama; leave one of them out"
    yield from _find_wrong_license(recipe.output.license)
    if recipe.output.resume and recipe.output.overwrite:
        yield "--output.resume goes on with a run and --output.overwrite replaces it; use one of them"


def _find_wrong_license(name: str | None) -> Iterator[str]:
    from modeling_tnt.hub_cards import LICENSES  # imported here: it takes longer than the rest of a recipe

    if name == "other":
        yield "--output.license other needs its name; use tnt card --license other --license-name NAME afterwards"
    elif name is not None and name not in LICENSES:
        near = difflib.get_close_matches(name.lower(), LICENSES, n=1)
        remedy = f"did you mean {near[0]}?" if near else "use tnt card --license other --license-name NAME afterwards"
        yield f"--output.license must be an identifier of the Hub, such as apache-2.0, got {name!r}; {remedy}"


def _find_wrong_stages(recipe: Recipe) -> Iterator[str]:
    if not recipe.stages:
        yield "stages must hold at least one stage, got []"
    yield from _find_wrong_names(recipe.stages)
    for i, stage in enumerate(recipe.stages):
        yield from _find_wrong_stage(recipe, stage, first=i == 0)


def _find_wrong_names(stages: list[StageOptions]) -> Iterator[str]:
    """A stage's name is that of a folder in output.dir, begins the names of its checkpoints, and is part of flags."""
    seen: dict[str, str] = {}
    for name in (str(stage.name) for stage in stages):
        folder = unicodedata.normalize("NFC", name).casefold()  # some file systems tell no more apart
        if not name.replace("-", "").replace("_", "").isalnum() or len(name) > LONGEST_NAME:
            rule = f"1 to {LONGEST_NAME} letters, digits, - and _"
            yield f"stages: a name must be of {rule}, since a folder gets it, got {name!r}"
        elif folder in OTHER_FOLDERS:
            yield f"stages: the name {name!r} is taken by the folder of {OTHER_FOLDERS[folder]}; give another"
        elif folder in seen:
            yield f"stages: the names {seen[folder]!r} and {name!r} are of one folder; give each stage its own"
        seen.setdefault(folder, name)


def _find_wrong_stage(recipe: Recipe, stage: StageOptions, *, first: bool) -> Iterator[str]:
    at = f"stages.{stage.name}"
    lengths = {name: getattr(stage, name) for name in ("steps", "tokens", "share") if getattr(stage, name) is not None}
    if len(lengths) != 1:
        given = " and ".join(f"{name}={value}" for name, value in lengths.items()) or "none of them"
        yield (
            f"--{at} takes exactly one of steps, tokens and share, got {given}"
            + (f"; use {flag_of(f'{at}.{next(iter(lengths))}')} none to leave one out" if lengths else "")
        )
    if first and stage.share is not None:
        yield f"--{at}.share is a share of the first stage's steps, which this one is; give steps or tokens"
    yield from _below({f"{at}.{n}": (getattr(stage, n), m) for n, m in
                       (("steps", 1), ("seq_len", 2), ("chunk_divisor", 1), ("lora_rank", 1))})  # fmt: skip
    yield from _not_positive({f"{at}.{n}": getattr(stage, n) for n in ("tokens", "share", "learning_rate")})
    yield from _outside({f"{at}.{n}": getattr(stage, n) for n in ("warmup_share", "decay_share", "final_share")}, 0, 1)
    if stage.warmup_share + (stage.decay_share if stage.schedule == "wsd" else 0) > 1:
        yield (
            f"{flag_of(f'{at}.warmup_share')}={stage.warmup_share} and {flag_of(f'{at}.decay_share')}="
            f"{stage.decay_share} are shares of the same steps and must not exceed 1 together"
        )
    yield from _not_among(
        {f"{at}.schedule": (stage.schedule, SCHEDULES), f"{at}.trainable": (stage.trainable, TRAINABLE)}
    )
    if stage.local_chunk_sizes is not None and stage.chunk_divisor is not None:
        yield f"--{at} takes local_chunk_sizes or chunk_divisor, got both; set one of them to none"
    swaps = any(x is not None for x in (stage.local_chunk_sizes, stage.chunk_divisor, stage.local_shard_lengths))
    if recipe.model.architecture == "llama" and (swaps or stage.trainable != "all"):
        yield (
            f"--{at}: a Llama has no local memories whose chunks could be swapped; use a recipe with one stage, "
            "e.g. --config llama-150m"
        )


def _below(least: dict[str, tuple[int | None, int]]) -> Iterable[str]:
    for name, (value, minimum) in least.items():
        if value is not None and value < minimum:
            yield f"{flag_of(name)} must be at least {minimum}, got {value}"
        elif value is not None and value > LARGEST_NUMBER:
            yield f"{flag_of(name)} must be at most {LARGEST_NUMBER}, got {value}"


def _not_positive(values: dict[str, float | None]) -> Iterable[str]:
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"{flag_of(name)} must be positive and finite, got {value}"


def _outside(values: dict[str, float], low: float, high: float) -> Iterable[str]:
    for name, value in values.items():
        if not low <= value <= high:
            yield f"{flag_of(name)} must lie between {low} and {high}, got {value}"


def _not_among(choices: dict[str, tuple[str, tuple[str, ...]]]) -> Iterable[str]:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            yield f"{flag_of(name)} must be one of {', '.join(allowed)}, got {value!r}"
