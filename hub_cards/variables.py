"""The variables of a card's template, made from facts: metadata, words, and Markdown tables without empty columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .facts import CardFacts, ResultFacts
from .family import describe_attention, describe_family, describe_memory, describe_model

# End of a class name → pipeline tag, Auto class.
HEADS = {
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "Model": ("feature-extraction", "AutoModel"),
}
TRAINED = {"all": "all weights", "local": "the local memories", "lora": "LoRA adapters and the local memories, merged"}


def template_variables(facts: CardFacts) -> dict[str, Any]:
    """Everything that a card's template may use. What is not known is None, "" or an empty list.

    card_data        the metadata as YAML.
    title            name of the model.
    family           "TNT", "Titans", "TTT-Linear" ...; description: what that is, in sentences.
    pipeline_tag, auto_class, model_id   what it is loaded as, and the name that it is loaded by.
    model_table, stage_table, data_table   Markdown tables; of stages, one has a column.
    result_groups    for each command that measured something: .command, .table, and .text if that is one for all.
    local_chunk_sizes, smaller_chunks, global_chunk_size   of the configuration; the next smaller ones to try.
    measured_chunks  whether the results hold other chunk sizes of the same weights; mismatch: in words, by how much
                     they are worse at most, or None.
    facts            the `CardFacts` themselves.
    """
    tag, auto_class = _head(facts.class_name)
    title = facts.name or (facts.repo_id or "").rpartition("/")[2] or f"{describe_family(facts.config)} model"
    chunks = list(facts.config.get("local_chunk_sizes") or [])
    model_id = facts.repo_id or facts.path or f"./{facts.name or 'model'}"
    losses = _read_elsewhere(facts.results)
    return {
        "card_data": make_card_data(facts, title, tag).to_yaml(),
        "title": title,
        "family": describe_family(facts.config),
        "description": describe_model(facts.config),
        "pipeline_tag": tag,
        "auto_class": auto_class,
        "model_id": model_id,
        "model_table": _pair_table(_model_rows(facts)),
        "data_table": _pair_table(_training_rows(facts)),
        "stage_table": _table([_stage_row(stage) for stage in facts.stages], transposed=True),
        "result_groups": _group_results(facts.results, model_id),
        "local_chunk_sizes": chunks,
        "smaller_chunks": [1] * len(chunks),
        "global_chunk_size": facts.config.get("global_chunk_size"),
        "measured_chunks": bool(losses),
        "mismatch": _describe_mismatch(losses),
        "facts": facts,
    }


def make_card_data(facts: CardFacts, title: str, pipeline_tag: str) -> ModelCardData:
    """The metadata of the card, as huggingface_hub writes them."""
    paper = describe_family(facts.config).lower().split("-")[0]
    tags = ["tnt", "test-time-training", *([paper] if paper != "tnt" else [])]
    if facts.remote_code:
        tags.append("custom_code")
    results = [_eval_result(r, pipeline_tag) for r in facts.results if r.own and _is_known(r.value)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.languages or None,
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        tags=[*tags, *facts.tags],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _head(class_name: str | None) -> tuple[str, str]:
    name = class_name or "TNTForCausalLM"
    return next((head for end, head in HEADS.items() if name.endswith(end)), HEADS["ForCausalLM"])


def _eval_result(result: ResultFacts, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        task_name=task.replace("-", " ").title(),
        dataset_type=result.dataset_type,
        dataset_name=result.dataset or result.dataset_type,
        dataset_config=result.dataset_config,
        dataset_split=result.dataset_split,
        metric_type=result.metric,
        metric_name=_metric_words(result) + (f" on {result.tokens:,} tokens" if result.tokens else ""),
        metric_value=float(f"{result.value:.6g}"),
    )


# -------------------------------------------------------------------------------------------------------------- tables


def _model_rows(facts: CardFacts) -> Iterable[tuple[str, Any]]:
    config = facts.config
    chunks = config.get("local_chunk_sizes")
    yield "Parameters", facts.parameters
    yield "Layers", config.get("num_hidden_layers")
    yield "Width", config.get("hidden_size")
    if config.get("num_heads") and config.get("head_dim"):
        yield "Heads", f"{config['num_heads']} of {config['head_dim']}"
    yield "Vocabulary", config.get("vocab_size")
    yield "Tokenizer", facts.tokenizer
    if config.get("memory_type"):
        memory, expansion = describe_memory(config), config.get("memory_expansion")
        wider = "" if expansion in (None, 1) else f" with {expansion} times the head's width inside"
        yield "Memory of a head", f"{memory}{wider}"
    if config.get("global_chunk_size"):
        how = " by Muon" if config.get("global_update") == "muon" else ""
        yield "Global memory", f"updated every {config['global_chunk_size']:,} tokens{how}"
    if chunks:
        yield "Local memories, tokens in a chunk", chunks
        yield "Local memories, tokens until they are reset", _shards(config)
        yield "Q-K projection", config.get("qk_projection")
    if describe_attention(config):
        heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
        yield "Heads of attention", f"{heads}" + (f", {shared} of keys and values" if shared != heads else "")
        yield "Persistent tokens", config.get("num_persistent_tokens") or None
    inner = [word for key, word in (("use_momentum", "momentum"), ("use_forget_gate", "forget gate"),
                                    ("token_scale", "token scale")) if config.get(key)]  # fmt: skip
    yield "Inner optimizer", "gradient descent" + (f" with {' and '.join(inner)}" if inner else "")


def _shards(config: dict[str, Any]) -> str:
    lengths = config.get("local_shard_lengths")
    lengths = lengths if isinstance(lengths, list) else [lengths] * len(config.get("local_chunk_sizes") or [])
    return ", ".join("never" if length is None else f"{length:,}" for length in lengths)


def _training_rows(facts: CardFacts) -> Iterable[tuple[str, Any]]:
    yield "Text", facts.data
    yield "Bytes trained on", facts.train_bytes
    yield "Documents trained on", facts.train_documents
    yield "Documents held out", facts.validation_documents
    yield "Weights started from", facts.base_model
    yield from facts.hyperparameters.items()
    yield "Hardware", facts.hardware
    if _is_known(facts.seconds):
        yield "Time, with evaluation", f"{facts.seconds:,.0f} s"
    yield "Versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or None


def _stage_row(stage: Any) -> dict[str, Any]:
    return {
        "Stage": stage.name,
        "Local chunks": stage.local_chunk_sizes,
        "Reset after": stage.local_shard_lengths and ["never" if n is None else n for n in stage.local_shard_lengths],
        "Trained": TRAINED.get(stage.trainable, stage.trainable),
        "Steps": stage.steps,
        "Tokens": stage.tokens,
        "Row length": stage.seq_len,
        "Rows a step": stage.batch_size,
        "Peak learning rate": _number(stage.learning_rate, ".4g"),
        "Schedule": stage.schedule,
        "Seconds": _number(stage.train_seconds, ",.0f"),
        "Tokens/s": _number(stage.tokens_per_second, ",.0f"),
        "Training bits per byte, last steps": _number(stage.train_bits_per_byte, ".3f"),
    }


def _read_elsewhere(results: list[ResultFacts]) -> list[tuple[float, list[int]]]:
    """Where these weights were also read at other chunk sizes: bits per byte more than at their own, and the chunks."""
    known = [r for r in results if r.metric == "bits_per_byte" and r.local_chunk_sizes and _is_known(r.value)]
    return [
        (other.value - own.value, other.local_chunk_sizes)
        for own in known
        for other in known
        if own.own and other.local_chunk_sizes != own.local_chunk_sizes
        and (other.label, other.dataset, other.tokens) == (own.label, own.dataset, own.tokens)
    ]  # fmt: skip


def _describe_mismatch(losses: list[tuple[float, list[int]]]) -> str | None:
    loss, chunks = max(losses, default=(0.0, []))
    if round(loss, 3) <= 0:
        return None
    return f"{loss:.3f} bits per byte when they are read at local chunks {_cell(chunks)}"


def _group_results(results: list[ResultFacts], model_id: str) -> list[dict[str, Any]]:
    """The results of each command as one table, in order. What all of them were measured on stands above it."""
    groups: dict[str | None, list[dict[str, Any]]] = {}
    for result in results:
        digits, error_digits = (".3f", ".3f") if result.metric == "bits_per_byte" else (".4g", ".2g")
        value = _number(result.value, digits)
        if value is None:
            continue
        error = _number(result.standard_error, error_digits)
        groups.setdefault(result.command, []).append(
            {
                "Weights": result.label,
                "Local chunks": result.local_chunk_sizes,
                "Measure": _metric_words(result),
                "Value": value if error is None else f"{value} ± {error}",
                "Text": result.dataset,
                "Tokens": result.tokens,
            }
        )
    return [
        {"command": command and command.replace("{model}", model_id), **_split_text(rows)}
        for command, rows in groups.items()
    ]


def _split_text(rows: list[dict[str, Any]]) -> dict[str, str | None]:
    (text, tokens), *others = {(row["Text"], row["Tokens"]) for row in rows}
    if others or text is None:
        return {"text": None, "table": _table(rows)}
    shorter = [{k: v for k, v in row.items() if k not in ("Text", "Tokens")} for row in rows]
    return {"text": f"{tokens:,} tokens of {text}" if tokens else text, "table": _table(shorter)}


def _metric_words(result: ResultFacts) -> str:
    return result.metric.replace("_", " ")


def _table(rows: list[dict[str, Any]], transposed: bool = False) -> str:
    """A Markdown table of the columns that hold something; transposed where many columns would not fit a page."""
    names = [name for name in (rows[0] if rows else ()) if any(_cell(row[name]) for row in rows)]
    grid = [names, *([_cell(row[name]) for name in names] for row in rows)]
    return _markdown(list(zip(*grid, strict=True)) if transposed else grid) if names else ""


def _pair_table(pairs: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values, of those that are known."""
    known = [(name, _cell(value)) for name, value in pairs if _cell(value)]
    return _markdown([("", ""), *known]) if known else ""


def _markdown(grid: list[Sequence[str]]) -> str:
    head, *rows = grid
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def _cell(value: Any) -> str:
    if not _is_known(value):
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, form: str) -> str | None:
    return format(value, form) if _is_known(value) else None


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
