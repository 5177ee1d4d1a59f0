"""The arguments of `tnt train`: one dataclass and its checks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_tnt.configuration import TNTConfig

from .options import find_blocked_folder, flag_of, option


@dataclass
class TrainArguments:
    """What `tnt train` needs to know; every field is a flag, `max_steps` being `--max-steps`."""

    preset: str = option("tiny", "model", "name of the model's preset")
    override: list[str] = option([], "model", "TNTConfig fields to replace, each as field=JSON, e.g. num_heads=2")

    data: list[str] = option(
        [], "data", "text, JSONL or parquet files, folders of them, or one name of the `datasets` library; "
        "nothing: the source files of Python's standard library",
    )  # fmt: skip
    data_config: str | None = option(None, "data", "configuration of a dataset given by name")
    text_column: str = option("text", "data", "column that holds the text in JSONL, parquet and datasets")
    data_limit: float = option(64.0, "data", "megabytes of text to read at most")
    validation_share: float = option(0.05, "data", "share of the bytes held out for validation, by document")
    tokenizer: str = option("byt5", "data", "byt5 (bytes, needs no download), or a name or folder for AutoTokenizer")

    max_steps: int = option(1200, "optimisation", "optimiser steps of stage 1")
    batch_size: int = option(1, "optimisation", "rows per step")
    seq_len: int = option(1024, "optimisation", "tokens per row")
    learning_rate: float = option(3e-3, "optimisation", "peak learning rate of stage 1")
    warmup_share: float = option(0.1, "optimisation", "share of a stage's steps with a rising learning rate")
    weight_decay: float = option(0.1, "optimisation", "AdamW's decay of the projections' matrices, and of no others")
    max_grad_norm: float = option(1.0, "optimisation", "L2 norm that gradients are clipped to")
    mixed_precision: str = option("no", "optimisation", "no or bf16")
    seed: int = option(0, "optimisation", "of the initial weights, the order of the data and the sample")

    stage2_share: float = option(0.05, "stage 2", "stage 2's steps as a share of stage 1's, at least one; 0: none")
    stage2_chunk_sizes: list[int] | None = option(
        None, "stage 2", "local chunk sizes, in tokens, one for each local memory; by default a quarter of stage 1's"
    )
    stage2_learning_rate: float | None = option(
        None, "stage 2", "peak learning rate of stage 2; by default a tenth of stage 1's, where that ended"
    )

    output_dir: Path = option(Path("runs/quickstart"), "output", "folder for checkpoints, metrics and plot")
    overwrite: bool = option(False, "output", "replace the run that output_dir holds")
    checkpoint_every: int = option(200, "output", "steps between checkpoints")
    health_every: int = option(50, "output", "steps between looks at the memories' inner gradients and states")
    eval_tokens: int = option(
        131072, "output", "validation tokens to score, rounded down to whole rows; never more than a quarter of the "
        "tokens that stage 1 trains on",
    )  # fmt: skip
    prompt_tokens: int = option(256, "output", "validation tokens that the sample continues")
    sample_tokens: int = option(256, "output", "tokens of the sample")

    def __post_init__(self) -> None:
        for name in ("data", "override", "stage2_chunk_sizes"):
            value = getattr(self, name)
            if not isinstance(value, list) and not (value is None and name == "stage2_chunk_sizes"):
                raise TypeError(f"{name} must be a list, got {type(value).__name__}; use [{value!r}]")
        self.output_dir = Path(self.output_dir)

    def problems(self) -> list[str]:
        """Every rule that a value breaks, as texts with the flag, the rule and the value."""
        return [*self._find_wrong_numbers(), *self._find_wrong_choices()]

    def _find_wrong_numbers(self) -> Iterable[str]:
        least = {
            "max_steps": 1, "batch_size": 1, "seq_len": 2, "checkpoint_every": 1, "health_every": 1, "eval_tokens": 1,
            "prompt_tokens": 1, "sample_tokens": 1, "seed": 0,
        }  # fmt: skip
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                yield f"{flag_of(name)} must be at least {minimum}, got {getattr(self, name)}"
        for name in ("data_limit", "learning_rate", "max_grad_norm", "stage2_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                yield f"{flag_of(name)} must be positive and finite, got {value}"
        for name, (low, high) in {"warmup_share": (0, 1), "stage2_share": (0, 1), "weight_decay": (0, 10)}.items():
            if not low <= getattr(self, name) <= high:
                yield f"{flag_of(name)} must lie between {low} and {high}, got {getattr(self, name)}"
        if not 0 < self.validation_share < 1:
            yield f"--validation-share must lie between 0 and 1, both excluded, got {self.validation_share}"

    def _find_wrong_choices(self) -> Iterable[str]:
        if self.mixed_precision not in ("no", "bf16"):
            yield f"--mixed-precision must be no or bf16, got {self.mixed_precision!r}"
        for item in self.override:
            if "=" not in item:
                yield f"--override takes field=JSON, got {item!r}"
        yield from find_blocked_folder(self.output_dir)

    def config_overrides(self) -> dict[str, Any]:
        """`override` as a dict. A value that is no JSON is taken as a string: qk_projection=none."""
        overrides = {}
        for item in self.override:
            name, _, value = item.partition("=")
            try:
                overrides[name] = json.loads(value)
            except json.JSONDecodeError:
                overrides[name] = value
        return overrides

    def default_stage2_chunks(self, config: TNTConfig) -> list[int]:
        """For each local memory the largest divisor of its chunk size that is at most a quarter of it, at least 1."""
        return [
            max(d for d in range(1, max(1, chunk // 4) + 1) if chunk % d == 0) for chunk in config.local_chunk_sizes
        ]
