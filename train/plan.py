"""From arguments to a checked plan: configuration, tokenizer, data and stages. Nothing is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from modeling_tnt.configuration import TNTConfig

from .arguments import TrainArguments
from .checkpoint import recover
from .data import PackedTokens, Split, pack, read_corpus, split_documents

STAGE_FOLDERS = ("stage1", "stage2")
RESULT_FILES = ("metrics.json", "loss.png", "log.jsonl", "sample.txt")


@dataclass(frozen=True)
class Stage:
    """One stretch of training: its steps, its chunk sizes and its peak learning rate."""

    name: str
    steps: int
    local_chunk_sizes: list[int]
    learning_rate: float


@dataclass(frozen=True)
class Run:
    """Everything that training needs, checked. `validation` holds the rows that are scored, and no more."""

    arguments: TrainArguments
    config: TNTConfig
    tokenizer: PreTrainedTokenizerBase
    stages: list[Stage]
    description: str
    documents: Split
    train: PackedTokens
    validation: PackedTokens


def prepare(arguments: TrainArguments) -> Run:
    """Check the arguments, read the data and plan the stages. No model is built and no file written.

    Raises:
        ValueError, TypeError: for arguments that break a rule, all of them at once, or data that does not fit them.
        OSError: for data that cannot be read.
    """
    config, tokenizer, stages = _check(arguments)
    print("reading and tokenising the data ...", flush=True)
    corpus = read_corpus(
        arguments.data, data_config=arguments.data_config, text_column=arguments.text_column,
        limit_bytes=int(arguments.data_limit * 1e6),
    )  # fmt: skip
    documents = split_documents(corpus.documents, arguments.validation_share)
    sides = {}
    for name, side in (("training", documents.train), ("validation", documents.validation)):
        sides[name] = pack(side, tokenizer).rows(arguments.seq_len)
        if len(sides[name].tokens) == 0:
            size = sum(len(d.text.encode()) for d in side)
            raise ValueError(
                f"the {name} side of the data has {size:,} bytes, less than one row of --seq-len {arguments.seq_len} "
                "tokens; give more data, a smaller --seq-len or another --validation-share"
            )
    scored = min(arguments.eval_tokens, arguments.max_steps * arguments.batch_size * arguments.seq_len // 4)
    scored_rows = max(1, scored // arguments.seq_len)
    validation = PackedTokens(*(x[:scored_rows] for x in sides["validation"]))
    return Run(arguments, config, tokenizer, stages, corpus.description, documents, sides["training"], validation)


def _check(arguments: TrainArguments) -> tuple[TNTConfig, PreTrainedTokenizerBase, list[Stage]]:
    """Build the config and the tokenizer and plan the stages; raise one ValueError with all that is wrong."""
    problems = arguments.problems()
    tokenizer = _load_tokenizer(arguments.tokenizer)
    if tokenizer.eos_token_id is None:
        problems.append(f"--tokenizer {arguments.tokenizer} has no end-of-sequence token, which separates documents")
    if not arguments.overwrite and _holds_run(arguments.output_dir):
        problems.append(f"--output-dir {arguments.output_dir} holds another run; give another folder, or --overwrite")
    stages: list[Stage] = []
    config = None
    try:
        overrides = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = TNTConfig.from_preset(arguments.preset, **overrides | arguments.config_overrides())
        stages = plan_stages(arguments, config)
    except ValueError as error:
        problems.append(str(error))
    if config is not None and len(tokenizer) > config.vocab_size:
        problems.append(
            f"--tokenizer {arguments.tokenizer} has {len(tokenizer)} tokens, more than vocab_size={config.vocab_size} "
            f"of the preset {arguments.preset}; use --override vocab_size={len(tokenizer)}"
        )
    if problems:
        raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
    return config, tokenizer, stages


def _holds_run(output_dir: Path) -> bool:
    for name in STAGE_FOLDERS:
        recover(output_dir / name)
    return any((output_dir / name).exists() for name in (*STAGE_FOLDERS, "metrics.json"))


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "byt5":
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise OSError(f"--tokenizer {name} could not be loaded: {error}") from error


def plan_stages(arguments: TrainArguments, config: TNTConfig) -> list[Stage]:
    """Stage 1 with the config's local chunk sizes, then stage 2, unless its share is 0.

    Raises ValueError for chunk sizes of stage 2 that do not fit the config.
    """
    first = Stage("stage1", arguments.max_steps, config.local_chunk_sizes, arguments.learning_rate)
    if arguments.stage2_share == 0:
        return [first]
    if not config.local_chunk_sizes:
        raise ValueError(f"preset {arguments.preset} has no local memory to swap chunks of; use --stage2-share 0")
    chunk_sizes = arguments.stage2_chunk_sizes or arguments.default_stage2_chunks(config)
    if len(chunk_sizes) != len(config.local_chunk_sizes):
        raise ValueError(
            f"--stage2-chunk-sizes has {len(chunk_sizes)} entries; give one for each of the "
            f"{len(config.local_chunk_sizes)} local memories"
        )
    try:
        TNTConfig(**{**config.to_diff_dict(), "local_chunk_sizes": chunk_sizes})
    except ValueError as error:
        raise ValueError(f"stage 2 with the local chunks {chunk_sizes}: {error}") from error
    steps = max(1, round(arguments.stage2_share * arguments.max_steps))
    learning_rate = arguments.stage2_learning_rate or 0.1 * arguments.learning_rate
    return [first, Stage("stage2", steps, chunk_sizes, learning_rate)]
