"""The model cards of a run: in the folder of each stage and of the best model, and again when the run is done."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator

from modeling_tnt.hub_cards import (
    CARD_FILE,
    CardFacts,
    ResultFacts,
    StageFacts,
    find_path,
    is_own_card,
    load_facts,
    save_facts,
    write_card,
)

from ..common.files import atomic_file
from ..common.model_facts import count_parameters, has_code, read_config
from ..common.provenance import find_origin, is_local, train_command
from ..loop.state import Score, State, score_key
from ..plan import Run

ADAPTER = "adapter"


def write_run_card(folder: Path, place: Path, run: Run, state: State, score: Score, accelerator: Accelerator) -> None:
    """Write card and facts of the model that was just saved to `folder`.

    A Llama gets none. What breaks a rule of cards is printed and keeps no model from being saved.

    Args:
        place: the run's folder that `folder` is put in the place of. A card there that somebody wrote or edited goes
            over to the new one.
        score: what the validation said of these weights.

    Raises:
        OSError: when it cannot be written.
    """
    config = read_config(folder)
    if config is None:
        return
    try:
        facts = collect_facts(run, state, score, config, accelerator)
        facts.name, facts.path = f"{run.folder.root.resolve().name}-{place.name}", find_path(place)
        if place == run.folder.stage(run.stages[-1].name):
            facts.repo_id = _pushed_to(run)
        facts.remote_code = has_code(folder)
        facts.adapter = ADAPTER if (folder / ADAPTER).is_dir() else None
        earlier = place / CARD_FILE
        if earlier.is_file() and not is_own_card(earlier):
            shutil.copyfile(earlier, folder / CARD_FILE)
        _write(folder, facts, place)
    except ValueError as error:
        print(f"{place.name} gets no model card: {error}", flush=True)


def finish_cards(run: Run, state: State, *, seconds: float) -> None:
    """Write the cards again with what is known at the end of a run: the plot, the time, and for a stage how its model
    reads at the chunks of the next. A card that was edited in the meantime is kept. Raises OSError.
    """
    last = len(run.stages) - 1
    for index, path in [
        *((i, run.folder.stage(stage.name)) for i, stage in enumerate(run.stages)),
        (None, run.folder.best),
    ]:
        config = read_config(path)
        facts = None if config is None else load_facts(path, config)
        if facts is None:
            continue
        if index is not None:
            own = score_key(run.stages[index].name)
            score = next((score for score in state.scores if score.key == own), None)
            results = _results(run, state, index, score)
            commands = {result.command for result in results}
            evaluated = [result for result in facts.results if result.command not in commands]  # by tnt card, meanwhile
            facts = replace(facts, results=[*results, *evaluated])
        plot = run.folder.plot_file
        if plot.exists():
            with atomic_file(path / plot.name) as fresh:
                shutil.copyfile(plot, fresh)
            facts = replace(facts, plot=plot.name)
        facts = replace(facts, path=find_path(path), seconds=seconds if index == last else None)
        _write(path, facts, path)


def _write(folder: Path, facts: CardFacts, place: Path) -> None:
    """Write the facts, and the card unless somebody edited it; `place` is what the folder will be called."""
    save_facts(folder, facts)
    try:
        write_card(folder, facts)
    except FileExistsError:
        print(f"{place / CARD_FILE} was edited, and is kept; tnt card --overwrite writes it again", flush=True)


def collect_facts(run: Run, state: State, score: Score, config: dict[str, Any], accelerator: Accelerator) -> CardFacts:
    """What a run knows of the model that it trains now."""
    recipe, data, origin = run.recipe, run.data, find_origin(run.recipe.data)
    command, file = train_command(recipe)
    start_from = recipe.model.start_from
    return CardFacts(
        config=config,
        class_name="TNTForCausalLM",
        parameters=count_parameters(config),
        tokenizer=type(run.tokenizer).__name__,
        license=recipe.output.license,
        datasets=[origin.kind] if origin.on_hub else [],
        data=origin.words,
        train_bytes=data.train.num_bytes,
        train_documents=data.train.num_documents,
        validation_documents=data.validation.num_documents,
        base_model=None if start_from is None or is_local(start_from) else start_from,
        stages=[_stage(run, state, index) for index in range(state.stage + 1)],
        hyperparameters=_hyperparameters(run),
        train_command=command,
        recipe=file,
        hardware=_hardware(accelerator),
        results=_results(run, state, state.stage, score),
        versions={
            "torch": torch.__version__, "transformers": transformers.__version__, "accelerate": accelerate.__version__,
        },
    )  # fmt: skip


def _pushed_to(run: Run) -> str | None:
    """The name by which the last stage's model is loaded from the Hub, unless its owner's name is left to the token."""
    name = run.recipe.output.push_to_hub
    return name if name is not None and "/" in name else None


def _stage(run: Run, state: State, index: int) -> StageFacts:
    """A finished stage, or the one that is trained now."""
    stage = run.stages[index]
    figures = state.stages[index] if index < len(state.stages) else state.figures(stage) | {"steps": state.step}
    return StageFacts(
        name=stage.name,
        steps=figures["steps"],
        tokens=figures["tokens"],
        seq_len=stage.seq_len,
        batch_size=run.recipe.training.batch_size,
        local_chunk_sizes=stage.local_chunk_sizes or None,
        local_shard_lengths=stage.local_shard_lengths or None,
        learning_rate=stage.learning_rate,
        schedule=stage.schedule,
        trainable=stage.trainable,
        train_seconds=figures["train_seconds"],
        tokens_per_second=figures["tokens_per_second"],
        train_bits_per_byte=figures["train_bits_per_byte_of_last_20_steps"],
    )


def _results(run: Run, state: State, index: int, own: Score | None) -> list[ResultFacts]:
    """The validation scores up to stage `index`, that of a bigram model, and the model's own."""
    chunks: dict[str, list[int] | None] = {"bigram": None}
    for i, stage in enumerate(run.stages[: index + 1]):
        chunks[score_key(stage.name)] = stage.local_chunk_sizes or None
        for after in run.stages[i + 1 : i + 2]:
            chunks[score_key(stage.name, at=after.name)] = after.local_chunk_sizes or None
    scores = [score for score in state.scores if score.key in chunks]
    if own is not None and own not in scores:
        scores.append(own)
        chunks[own.key] = run.stages[index].local_chunk_sizes or None
    origin, (command, _) = find_origin(run.recipe.data), train_command(run.recipe)
    return [
        ResultFacts(
            metric="bits_per_byte",
            value=score.bits_per_byte,
            standard_error=score.standard_error,
            label=score.label.partition(", local chunks")[0],
            local_chunk_sizes=chunks[score.key],
            **origin.held_out(),
            tokens=len(run.validation) * run.validation.seq_len,
            command=command,
            own=score == own,
        )
        for score in scores
    ]


def _hyperparameters(run: Run) -> dict[str, Any]:
    recipe, adam, start_from = run.recipe, run.recipe.optimizer, run.recipe.model.start_from
    return {
        "Preset": recipe.model.preset if start_from is None else None,
        "Weights started from": "a local model" if start_from is not None and is_local(start_from) else None,
        "Optimizer": f"AdamW, betas {adam.beta1} and {adam.beta2}, weight decay {adam.weight_decay}, gradients clipped "
        f"to a norm of {adam.max_grad_norm}",
        "Precision": "float32" if recipe.training.mixed_precision == "no" else "float32 weights, bfloat16 autocast",
        "Document boundaries": "joined" if recipe.data.boundaries == "joined" else "marked: memories are reset there",
        "Seed": recipe.training.seed,
    }


def _hardware(accelerator: Accelerator) -> str:
    device, count = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return f"{count} x {name}" if count > 1 else name
