"""From a recipe to a checked plan: configuration, tokenizer, stages and data. Nothing is trained here."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_tnt.configuration import TNTConfig
from modeling_tnt.configuration.validation import divisors

from .common.models import make_llama_config
from .data import Rows, TokenizedData, Tokens, load_data, load_tokenizer
from .hub.push_run import find_wrong_push
from .loop.checkpoint import read_state
from .loop.distributed import Layout, find_layout, find_wrong_setup, from_main
from .loop.run_folder import RunFolder
from .options import LARGEST_NUMBER, flag_of, leaves, to_mapping
from .recipe import MEASURING, TRACKERS, ModelOptions, Recipe, StageOptions, load_recipe

# What may differ between a run and its resumption: none of it changes what is computed.
FREE_TO_CHANGE = (
    "output.", "training.micro_batch_size", "training.data_workers", "training.sharding", "training.compile",
    "training.gradient_checkpointing", "training.context_parallel", "data.cache_dir",
)  # fmt: skip
SIDES = {"train": "text to train on", "validation": "held-out text"}

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe with all defaults filled in; the fields are those of `StageOptions`, and one more.

    start_tokens: position in the order of the data at which it begins.
    learning_rate: the peak.
    """

    name: str
    steps: int
    seq_len: int
    start_tokens: int
    local_chunk_sizes: list[int]
    local_shard_lengths: list[int | None]
    learning_rate: float
    schedule: str
    warmup_share: float
    decay_share: float
    final_share: float
    trainable: str
    lora_rank: int


@dataclass(frozen=True)
class Run:
    """Everything that training needs, checked. `validation` holds the rows that are scored, and no more; `data_summary`
    tells whether data is the same."""

    recipe: Recipe
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stages: list[Stage]
    folder: RunFolder
    data: TokenizedData
    data_summary: dict[str, dict[str, Any]]
    validation: Rows
    micro_batch_size: int
    layout: Layout

    @property
    def block_len(self) -> int:
        """Tokens in a block of the data's order: the longest row of any stage."""
        return max(stage.seq_len for stage in self.stages)


def prepare(recipe: Recipe, accelerator: Accelerator) -> Run:
    """Check the recipe, read the data and plan the stages. No model is built, and nothing of the run is written.

    Raises:
        ValueError, TypeError: for a recipe that breaks a rule, all of them at once, or data that does not fit it.
        OSError: for data, a tokenizer or a checkpoint that cannot be read.
    """
    folder = RunFolder(recipe.output.dir)
    config, tokenizer, stages, layout, micro_batch_size = _check(recipe, folder, accelerator)
    with accelerator.main_process_first():
        data = load_data(recipe.data, tokenizer)
    longest = max(stage.seq_len for stage in stages)
    for name, side, wanted in (("training", data.train, longest), ("validation", data.validation, stages[0].seq_len)):
        rows = len(side.rows(wanted))
        least = layout.data_size if name == "training" else 1
        if rows < least:
            readers = layout.name_readers(least)
            raise ValueError(
                f"the {name} side of the data has {side.num_tokens:,} tokens in {side.num_documents} documents, "
                f"{rows} rows of {wanted} tokens, and at least {least} {'are' if least > 1 else 'is'} needed"
                f"{f' for {least} {readers}' if least > 1 else ''}; give more data, a smaller --training.seq-len, "
                f"another --data.validation-share{f' or fewer {readers}' if least > 1 else ''}"
            )
    summary = from_main(accelerator, lambda: {side: _summarize(getattr(data, side)) for side in SIDES})
    problems = from_main(accelerator, lambda: _find_other_data(recipe, folder, summary))
    if problems:
        raise ValueError(problems[0])
    first = stages[0]
    scored = min(recipe.output.eval_tokens, first.steps * recipe.training.batch_size * first.seq_len // 4)
    validation = data.validation.rows(first.seq_len, recipe.data.boundaries).head(max(1, scored // first.seq_len))
    return Run(recipe, config, tokenizer, stages, folder, data, summary, validation, micro_batch_size, layout)


def _check(
    recipe: Recipe, folder: RunFolder, accelerator: Accelerator
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase, list[Stage], Layout, int]:
    """Everything that can be wrong before the data is read; one ValueError with all of it."""
    problems = recipe.problems()
    problems += find_wrong_setup(accelerator, recipe.training.sharding)
    problems += find_missing_trackers(recipe) + _find_missing_peft(recipe)
    other_run = _attempt(problems, lambda: from_main(accelerator, lambda: _find_other_run(recipe, folder)))
    problems += other_run or []
    problems += find_wrong_push(recipe.output, recipe.model.architecture, accelerator)
    tokenizer = _attempt(problems, lambda: load_tokenizer(recipe.data.tokenizer))
    config = stages = None
    if tokenizer is not None:
        if tokenizer.eos_token_id is None:
            problems.append(
                f"--data.tokenizer {recipe.data.tokenizer} has no end-of-sequence token, which separates documents"
            )
        config = _attempt(problems, lambda: make_config(recipe.model, tokenizer))
    if config is not None:
        problems += _find_wrong_vocabulary(recipe, config, tokenizer)
        stages = _attempt(problems, lambda: plan_stages(recipe, config))
    layout = _attempt(problems, lambda: find_layout(accelerator, recipe.training.context_parallel))
    micro_batch_size = None
    if layout is not None:
        problems += _find_wrong_context(recipe, layout)
        micro_batch_size = _attempt(problems, lambda: split_batch(recipe, layout))
    if problems:
        raise ValueError("\n  ".join(["this recipe cannot be used:", *problems]))
    return _model_config(recipe, config, stages), tokenizer, stages, layout, micro_batch_size


def _attempt(problems: list[str], build: Callable[[], T]) -> T | None:
    """What `build` returns, or None when it cannot, the reason being added to the problems."""
    try:
        return build()
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return None


# --------------------------------------------------------------------------------------------------------------- model


def make_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> TNTConfig:
    """The configuration that the first stage starts from.

    Raises ValueError for a preset or fields that are no good, or a checkpoint of another architecture; OSError for one
    that cannot be read.
    """
    if options.start_from is None:
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        return TNTConfig.from_preset(options.preset, **ids | options.override)
    try:
        saved, _ = PreTrainedConfig.get_config_dict(options.start_from)
    except (OSError, ValueError) as error:
        raise OSError(f"--model.start-from {options.start_from} could not be read: {error}") from error
    if saved.get("model_type") != TNTConfig.model_type:
        raise ValueError(
            f"--model.start-from {options.start_from} holds a model of type {saved.get('model_type')!r}; "
            f"it must be of type {TNTConfig.model_type!r}"
        )
    return AutoConfig.from_pretrained(options.start_from, **options.override)


def _model_config(recipe: Recipe, config: TNTConfig, stages: list[Stage]) -> PreTrainedConfig:
    """What the model is built from."""
    if recipe.model.architecture == "llama":
        return make_llama_config(config, max(stage.seq_len for stage in stages))
    return config


def _find_wrong_vocabulary(recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    name, start_from = recipe.data.tokenizer, recipe.model.start_from
    problems = []
    if len(tokenizer) > config.vocab_size:
        origin = f"the preset {recipe.model.preset}" if start_from is None else start_from
        remedy = f"use --model.override vocab_size={len(tokenizer)}" if start_from is None else "use its own tokenizer"
        problems.append(
            f"--data.tokenizer {name} has {len(tokenizer)} tokens, more than vocab_size={config.vocab_size} of "
            f"{origin}; {remedy}"
        )
    if start_from is not None:
        try:
            trained_with = AutoTokenizer.from_pretrained(start_from)
        except (OSError, ValueError):
            return problems  # saved without one, so nothing is known of it
        if trained_with.get_vocab() != tokenizer.get_vocab():
            problems.append(
                f"--data.tokenizer {name} is not the tokenizer of --model.start-from {start_from}, whose embeddings "
                f"belong to its own; use --data.tokenizer {start_from}"
            )
    return problems


# -------------------------------------------------------------------------------------------------------------- stages


def plan_stages(recipe: Recipe, config: TNTConfig) -> list[Stage]:
    """Fill in the defaults of the stages, one after the other.

    Raises ValueError for chunk sizes and shard lengths that do not fit the config, local memories to train where there
    are none, and more tokens than can be counted.
    """
    stages: list[Stage] = []
    end, current = 0, config
    for options in recipe.stages:
        current = _swapped(options, current)
        seq_len = options.seq_len or recipe.training.seq_len
        start = seq_len * math.ceil(end / seq_len)
        if options.trainable == "local" and not current.local_chunk_sizes:
            raise ValueError(
                f"--stages.{options.name}.trainable local: the model has no local memory to train; use all, or lora"
            )
        steps = _count_steps(options, stages, recipe.training.batch_size * seq_len)
        end = start + steps * recipe.training.batch_size * seq_len
        if end > LARGEST_NUMBER:
            raise ValueError(
                f"--stages.{options.name} would end after more than {LARGEST_NUMBER} tokens; give fewer steps or "
                "tokens, or a smaller share"
            )
        peak = recipe.optimizer.learning_rate * (0.1 if stages else 1.0)
        as_given = {f.name: getattr(options, f.name) for f in fields(Stage) if hasattr(options, f.name)}
        filled_in = {
            "steps": steps, "seq_len": seq_len, "start_tokens": start, "learning_rate": options.learning_rate or peak,
            "local_chunk_sizes": current.local_chunk_sizes, "local_shard_lengths": current.shard_lengths,
        }  # fmt: skip
        stages.append(Stage(**as_given | filled_in))
    longest = max((stage.seq_len for stage in stages), default=1)
    for stage in stages:
        if longest % stage.seq_len:
            raise ValueError(
                f"--stages.{stage.name}.seq-len {stage.seq_len} must divide the longest of the stages, {longest}, "
                "since rows of that length are what is shuffled"
            )
    return stages


def _count_steps(options: StageOptions, earlier: list[Stage], tokens_per_step: int) -> int:
    if options.tokens is not None:
        return max(1, math.ceil(options.tokens / tokens_per_step))
    if options.share is not None and earlier:
        return max(1, round(min(options.share * earlier[0].steps, LARGEST_NUMBER)))
    return options.steps or 1


def _swapped(options: StageOptions, config: TNTConfig) -> TNTConfig:
    """The config with the stage's chunk sizes and shard lengths."""
    at, memories = f"--stages.{options.name}", len(config.local_chunk_sizes)
    changes: dict[str, Any] = {}
    if options.chunk_divisor is not None:
        changes["local_chunk_sizes"] = [_divide_chunk(c, options.chunk_divisor) for c in config.local_chunk_sizes]
    if options.local_chunk_sizes is not None:
        changes["local_chunk_sizes"] = options.local_chunk_sizes
    if options.local_shard_lengths is not None:
        changes["local_shard_lengths"] = options.local_shard_lengths
    if not changes:
        return config
    if memories == 0:
        raise ValueError(
            f"{at}: the model has no local memory to swap chunks of; set {at}.chunk-divisor none, or train in one stage"
        )
    for name, value in changes.items():
        if len(value) != memories:
            raise ValueError(
                f"{flag_of(f'stages.{options.name}.{name}')} has {len(value)} entries; give one for each of the "
                f"{memories} local memories"
            )
    try:
        return TNTConfig.from_dict(config.to_diff_dict(), **changes)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from error


def _divide_chunk(chunk_size: int, divisor: int) -> int:
    """The largest divisor of a chunk size that is at most 1/divisor of it, at least 1."""
    return max(d for d in divisors(chunk_size) if d <= max(1, chunk_size // divisor))


def split_batch(recipe: Recipe, layout: Layout) -> int:
    """Rows in a forward pass of one process. Raises ValueError when the batch cannot be split evenly."""
    batch_size, micro, readers = recipe.training.batch_size, recipe.training.micro_batch_size, layout.data_size
    if batch_size % readers:
        raise ValueError(
            f"--training.batch-size {batch_size} must be a multiple of the number of {layout.name_readers(readers)}, "
            f"{readers}; use {readers * max(1, round(batch_size / readers))}"
        )
    share = batch_size // readers
    if micro is not None and share % micro:
        raise ValueError(
            f"--training.micro-batch-size {micro} must divide the {share} rows of a step that each of {readers} "
            f"{layout.name_readers(readers)} gets; use {max(d for d in divisors(share) if d <= max(1, micro))}"
        )
    return micro or share


# --------------------------------------------------------------------------------------------------------- other rules


def find_missing_trackers(recipe: Recipe) -> list[str]:
    """Trackers that are not installed, as problems."""
    modules = {name: [name] for name in TRACKERS} | {"tensorboard": ["tensorboard", "tensorboardX"]}
    return [
        f"--output.trackers {name} needs the package of that name, which is not installed; pip install {name}"
        for name in recipe.output.trackers
        if name in modules and not any(map(importlib.util.find_spec, modules[name]))
    ]


def _find_missing_peft(recipe: Recipe) -> list[str]:
    if any(stage.trainable == "lora" for stage in recipe.stages) and importlib.util.find_spec("peft") is None:
        return ["a stage with trainable: lora needs the package peft, which is not installed; pip install peft"]
    return []


def _find_wrong_context(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What cannot be done by processes that share their rows."""
    if layout.context_size == 1:
        return
    option = f"--training.context-parallel {layout.context_size}"
    if recipe.training.compile:
        yield f"{option} excludes --training.compile: a compiled graph cannot wait for another process; leave one out"
    if recipe.model.architecture == "llama":
        yield f"{option} needs memories, which pass a small state on, and a Llama has attention; use 1"


def _find_other_run(recipe: Recipe, folder: RunFolder) -> list[str]:
    """What stands in the way in the output folder. Raises ValueError or OSError for files of a run that are damaged."""
    output, stages = recipe.output, [stage.name for stage in recipe.stages]
    held = list(folder.find_holder())
    if held:
        return held
    if folder.holds_run() and not (output.resume or output.overwrite):
        return [
            f"--output.dir {folder.root} holds another run; give another folder, --output.resume to go on with it, or "
            "--output.overwrite to replace it"
        ]
    problems = []
    if output.resume and folder.holds_run():
        if not folder.recipe_file.exists():
            return [f"--output.resume: {folder.root} has no {folder.recipe_file.name}; give another folder"]
        problems += [
            f"--output.resume: {flag_of(path)} is {new} and was {old} when the run began; use the old value, or "
            "another --output.dir"
            for path, old, new in find_differences(load_recipe(str(folder.recipe_file)), recipe)
        ]
        if folder.newest_first(stages):
            return problems
    blocked = list(folder.find_problems(folder.names(stages), flag="--output.dir", overwrite=True))
    if blocked and folder.holds_run() and not folder.listed():
        blocked[0] += "; the run there is of an earlier version, which kept no list: --output.resume goes on with it"
    return problems + blocked


def _summarize(tokens: Tokens) -> dict[str, Any]:
    digest = hashlib.sha256()
    for begin in range(0, tokens.num_tokens, 1 << 24):
        digest.update(tokens.tokens[begin : begin + (1 << 24)].data)
    return {"documents": tokens.num_documents, "bytes": tokens.num_bytes, "tokens_sha256": digest.hexdigest()}


def _find_other_data(recipe: Recipe, folder: RunFolder, summary: dict[str, dict[str, Any]]) -> list[str]:
    """How the data differs from that of the newest checkpoint, when a run goes on. Earlier versions did not keep it."""
    if not recipe.output.resume or recipe.output.accept_changed_data:
        return []
    for path in folder.newest_first([stage.name for stage in recipe.stages]):
        try:
            saved = read_state(path).get("data") or summary
        except (OSError, ValueError, AttributeError):
            continue  # damaged; it will be passed over
        changes = [
            f"the {words} was {_words(saved[side])} and is {_words(summary[side])}"
            for side, words in SIDES.items()
            if saved[side] != summary[side]
        ]
        return changes and [
            f"--output.resume: the data is not what it was when {path} was saved: {', '.join(changes)}; bring the old "
            "text back, or go on with the new one by --output.accept-changed-data"
        ]
    return []


def _words(side: dict[str, Any]) -> str:
    return f"{side['bytes']:,} bytes in {side['documents']:,} documents (tokens {side['tokens_sha256'][:8]})"


def find_differences(saved: Recipe, recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Path, saved and new value of every field that differs and changes what is computed."""
    old = {leaf.path: leaf.value for leaf in leaves(saved)}
    new = {leaf.path: leaf.value for leaf in leaves(recipe)}
    return [
        (path, to_mapping(old.get(path)), to_mapping(new.get(path)))
        for path in dict.fromkeys([*old, *new])
        if old.get(path) != new.get(path) and not _is_free_to_change(path)
    ]


def _is_free_to_change(path: str) -> bool:
    return path.startswith(FREE_TO_CHANGE) and path not in {f"output.{name}" for name in MEASURING}
