"""The recipe of a training run: what `tnt train --config recipe.yaml` reads, every field of which is also a flag.

A recipe has sections (model, data, optimizer, training, output) and a list of stages. Read `Recipe`, `load_recipe`.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .data import DataOptions
from .options import find_blocked_folder, find_broken_rules, flag_of, from_mapping, option

TRACKERS = ("tensorboard", "wandb", "trackio")
# Of `output`, what decides which numbers are measured; the rest says where they go and what is kept.
MEASURING = ("eval_tokens", "eval_every")
UNNAMED = "stage"
LONGEST_NAME = 64
# Of a run's folders, those that are not named after stages.
OTHER_FOLDERS = {"best": "the best model", "checkpoints": "the checkpoints", "tnt": "what TensorBoard gets"}
LARGEST_SEED = 2**32 - 1  # of NumPy


@dataclass
class ModelOptions:
    """Which model is trained, and from which weights."""

    preset: str = option("tiny", "model", "name of the model's preset")
    override: dict[str, Any] = option({}, "model", "TNTConfig fields to replace, e.g. num_heads=2 qk_projection=none")
    architecture: str = option(
        "tnt", "model", "tnt, or llama: transformers' Llama of the preset's width, depth, heads and vocabulary and of "
        "about as many parameters", choices=("tnt", "llama"),
    )  # fmt: skip
    start_from: str | None = option(
        None, "model", "folder or Hub name of a TNT checkpoint whose weights and configuration the first stage starts "
        "from, instead of a preset",
    )  # fmt: skip


@dataclass
class OptimizerOptions:
    """AdamW, as in the papers: matrices of the projections decay, and nothing else does (`optim.parameter_groups`)."""

    learning_rate: float = option(3e-3, "optimizer", "peak learning rate of the first stage", gt=0)
    beta1: float = option(0.9, "optimizer", "decay of the mean of the gradients, a step", ge=0, lt=1)
    beta2: float = option(0.95, "optimizer", "decay of the mean of the squared gradients, a step", ge=0, lt=1)
    weight_decay: float = option(0.1, "optimizer", "decay of the projections' matrices, and of no others", ge=0, le=10)
    max_grad_norm: float = option(1.0, "optimizer", "L2 norm that gradients are clipped to", gt=0)


@dataclass
class StageOptions:
    """One stretch of training. Its length is given as one of `steps`, `tokens` and `share`."""

    name: str = UNNAMED
    steps: int | None = option(None, "stages", "optimizer steps", ge=1)
    tokens: float | None = option(None, "stages", "tokens, rounded up to whole steps", gt=0)
    share: float | None = option(None, "stages", "steps as a share of the first stage's, at least one step", gt=0)
    local_chunk_sizes: list[int] | None = option(
        None, "stages", "tokens in a chunk, one number for each local memory; none: as they are"
    )
    chunk_divisor: int | None = option(
        None, "stages", "instead of local_chunk_sizes: the largest divisor of each chunk size that is at most this "
        "part of it, at least 1", ge=1,
    )  # fmt: skip
    local_shard_lengths: list[int | None] | None = option(
        None, "stages", "tokens after which a local memory is reset, one for each (none: never); without: as they are"
    )
    seq_len: int | None = option(None, "stages", "tokens in a row; none: training.seq_len", ge=2)
    learning_rate: float | None = option(
        None, "stages", "peak; none: the optimizer's in the first stage, a tenth of it later, where a cosine has ended",
        gt=0,
    )  # fmt: skip
    schedule: str = option(
        "cosine", "stages", "cosine, wsd (warm-up, stable, decay in a straight line) or constant, each after a warm-up",
        choices=("cosine", "wsd", "constant"),
    )  # fmt: skip
    warmup_share: float = option(0.1, "stages", "share of the steps with a rising learning rate", ge=0, le=1)
    decay_share: float = option(0.2, "stages", "wsd: share of the steps with a falling learning rate", ge=0, le=1)
    final_share: float = option(
        0.1, "stages", "share of the peak learning rate that cosine and wsd end with", ge=0, le=1
    )
    trainable: str = option(
        "all", "stages", "all, local (the local memories alone) or lora (adapters on the projections, and the local "
        "memories; needs peft), merged at the end of the stage", choices=("all", "local", "lora"),
    )  # fmt: skip
    lora_rank: int = option(8, "stages", "rank of the adapters", ge=1)


@dataclass
class TrainingOptions:
    """How a step is taken."""

    seq_len: int = option(1024, "training", "tokens in a row", ge=2)
    batch_size: int = option(1, "training", "rows in a step, over all processes", ge=1)
    micro_batch_size: int | None = option(
        None, "training", "rows in a forward pass of one process; none: as many as batch_size and the processes allow. "
        "Gradients are accumulated over the passes of a step", ge=1,
    )  # fmt: skip
    seed: int = option(
        0, "training", "of the initial weights, the order of the data and the sample", ge=0, le=LARGEST_SEED
    )
    mixed_precision: str = option(
        "no", "training", "no (float32) or bf16 (autocast; weights stay float32)", choices=("no", "bf16")
    )
    gradient_checkpointing: bool = option(False, "training", "keep one activation a block, compute the others again")
    compile: bool = option(False, "training", "torch.compile the model")
    sharding: str = option(
        "none", "training", "none (each process has the whole model, DDP) or fsdp2 (weights, gradients and optimizer "
        "in parts); fsdp2 is also chosen by an accelerate configuration with FSDP", choices=("none", "fsdp2"),
    )  # fmt: skip
    context_parallel: int | None = option(
        None, "training", "processes that share each row, a stretch of it each: for rows too long for one device. Must "
        "divide the number of processes; none: cp_size of accelerate's ParallelismConfig, or 1", ge=1,
    )  # fmt: skip
    data_workers: int = option(0, "training", "processes that read rows; 0: the training process", ge=0)


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
    checkpoint_every: int = option(200, "output", "steps between checkpoints", ge=1)
    keep_checkpoints: int = option(2, "output", "newest checkpoints to keep; the best model is kept besides", ge=1)
    eval_every: int | None = option(None, "output", "steps between validations; none: at the end of each stage", ge=1)
    health_every: int = option(50, "output", "steps between looks at the memories' inner loops", ge=1)
    eval_tokens: int = option(
        131072, "output", "validation tokens to score, rounded down to whole rows; never more than a quarter of the "
        "tokens that the first stage trains on", ge=1,
    )  # fmt: skip
    prompt_tokens: int = option(256, "output", "validation tokens that the sample continues", ge=1)
    sample_tokens: int = option(256, "output", "tokens of the sample; 0: none", ge=0)
    license: str | None = option(
        None, "output", "licence of the weights for their model cards, an identifier of the Hub, e.g. apache-2.0"
    )
    trackers: list[str] = option([], "output", f"report to these as well: {', '.join(TRACKERS)}", choices=TRACKERS)
    push_to_hub: str | None = option(
        None, "output", "repository on the Hub to push the model to: user/name, or name for one of your own",
        alias="--push-to-hub",
    )  # fmt: skip
    push_every: str = option(
        "end", "output", "end: push the last stage's model when the run is done; save: also each checkpoint's model, "
        "for which training waits", choices=("end", "save"),
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
            *find_broken_rules(self), *_find_contradictions(self), *self.data.problems(), *_find_wrong_stages(self),
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


def _find_contradictions(recipe: Recipe) -> Iterator[str]:
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
    if stage.warmup_share + (stage.decay_share if stage.schedule == "wsd" else 0) > 1:
        yield (
            f"{flag_of(f'{at}.warmup_share')}={stage.warmup_share} and {flag_of(f'{at}.decay_share')}="
            f"{stage.decay_share} are shares of the same steps and must not exceed 1 together"
        )
    if stage.local_chunk_sizes is not None and stage.chunk_divisor is not None:
        yield f"--{at} takes local_chunk_sizes or chunk_divisor, got both; set one of them to none"
    swaps = any(x is not None for x in (stage.local_chunk_sizes, stage.chunk_divisor, stage.local_shard_lengths))
    if recipe.model.architecture == "llama" and (swaps or stage.trainable != "all"):
        yield (
            f"--{at}: a Llama has no local memories whose chunks could be swapped; use a recipe with one stage, "
            "e.g. --config llama-150m"
        )
