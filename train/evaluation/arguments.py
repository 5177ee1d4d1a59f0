"""The arguments of `tnt eval`: one dataclass and the checks that need no model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.output_folder import OutputFolder
from ..data import DataOptions
from ..options import find_blocked_folder, find_broken_rules, option

# In the order in which they are done: the class of each as `module:name`, which is not imported for the flags alone.
TASKS = {
    "perplexity": "perplexity:PerplexityTask", "position": "position:PositionTask", "chunks": "chunks:ChunksTask",
    "retrieval": "retrieval:RetrievalTask",
}  # fmt: skip
DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OWN_TOKENIZER = "model"
RETRIEVAL_LENGTHS = [128, 256, 512, 1024, 2048, 4096]


@dataclass
class EvalArguments:
    """The arguments of `tnt eval`; every field but the model is a flag."""

    model: str = option(
        "", "evaluation", "folder or Hub name of a causal language model, TNT or other", positional=True
    )
    compare: list[str] = option(
        [], "evaluation", "other models with the same tokenizer, measured on the same text and drawn beside it, e.g. "
        "the folder of stage 2 beside that of stage 1",
    )  # fmt: skip
    tasks: list[str] = option(
        [], "evaluation", f"of {', '.join(TASKS)}, in this order; by default all, without chunks if a model is no TNT"
    )
    seq_len: int = option(1024, "evaluation", "tokens in a row of held-out text", ge=2)
    eval_tokens: int = option(131072, "evaluation", "held-out tokens to score, rounded down to whole rows", ge=1)
    batch_size: int = option(4, "evaluation", "rows, or documents, in a forward pass", ge=1)
    device: str | None = option(None, "evaluation", "cpu, cuda, cuda:1 …; by default cuda if there is one")
    dtype: str = option(
        "auto", "evaluation", "of the weights: fp32, bf16, fp16, or auto: as they were saved", choices=tuple(DTYPES)
    )
    context_parallel: int = option(
        1, "evaluation", "processes that read each row together, each a part of it; start as many, with "
        "accelerate launch --num-processes N -m modeling_tnt.train.cli eval, or with torchrun", ge=1,
    )  # fmt: skip
    seed: int = option(0, "evaluation", "of the key-value documents", ge=0)

    data: DataOptions = option(
        DataOptions(tokenizer=OWN_TOKENIZER), "data", "held-out text; the tokenizer `model` is the model's own"
    )

    chunk_sizes: list[int] = option(
        [], "chunks", "of the local memory with the smallest chunks, in tokens; the others are scaled alike. By "
        "default 1, 2, 4 … up to the shard length or seq_len", ge=1,
    )  # fmt: skip
    retrieval_lengths: list[int] = option(
        [], "retrieval", f"tokens in a document; by default {' '.join(map(str, RETRIEVAL_LENGTHS))}", ge=1
    )
    retrieval_documents: int = option(
        50, "retrieval", "documents of each length, their needles spread over all depths", ge=1
    )

    output_dir: Path = option(Path("runs/eval"), "output", "folder for a JSON file and a PNG of each task")
    overwrite: bool = option(False, "output", "replace the results of the same tasks that output_dir holds")

    def __post_init__(self) -> None:
        for name in ("compare", "tasks", "chunk_sizes", "retrieval_lengths"):
            value = getattr(self, name)
            if not isinstance(value, list):
                raise TypeError(f"{name} must be a list, got {type(value).__name__}; use [{value!r}]")
        self.output_dir = Path(self.output_dir)

    def problems(self) -> list[str]:
        """Every rule that a value breaks by itself, as texts with the flag, the rule, the value and the remedy."""
        return [
            *find_broken_rules(self),
            *self._find_wrong_choices(),
            *self.data.problems(),
            *find_blocked_folder(self.output_dir),
            *self._find_old_results(),
        ]

    def _find_wrong_choices(self) -> Iterable[str]:
        if not self.model:
            yield "model must be the folder or Hub name of a causal language model"
        for task in self.tasks:
            if task not in TASKS:
                near = difflib.get_close_matches(task, TASKS, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(TASKS)}"
                yield f"--tasks {task} is unknown; {remedy}"
        yield from self._find_wrong_device()
        yield from self._find_wrong_processes()

    def _find_wrong_device(self) -> Iterable[str]:
        try:
            device = self.torch_device()
        except RuntimeError:
            yield f"--device must be a device of torch, such as cpu or cuda, got {self.device!r}"
            return
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            yield f"--device {self.device}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu"
        elif device.type == "mps" and not torch.backends.mps.is_available():
            yield "--device mps: torch cannot use it here; use --device cpu"

    def _find_wrong_processes(self) -> Iterable[str]:
        asked, started = self.context_parallel, int(os.environ.get("WORLD_SIZE", "1"))
        if started == 1 < asked:
            yield (
                f"--context-parallel {asked} needs {asked} processes, and this one is alone; start them with torchrun "
                f"--standalone --nproc-per-node {asked} (on GPUs also accelerate launch --num-processes {asked}) "
                f"-m modeling_tnt.train.cli eval {self.model} --context-parallel {asked}"
            )
        elif started != asked:
            yield (
                f"{started} processes were started, and --context-parallel is {asked}; use --context-parallel "
                f"{started}, with which they read each row together"
            )
        elif started > 1 and ":" in (self.device or ""):
            yield f"--device {self.device} would be that of all {started} processes; leave its number out"

    def _find_old_results(self) -> Iterable[str]:
        yield from self.output.find_problems(self.results, overwrite=self.overwrite)

    @property
    def output(self) -> OutputFolder:
        return OutputFolder(self.output_dir, "eval")

    @property
    def results(self) -> list[str]:
        return [f"{task}.{kind}" for task in self.tasks or TASKS for kind in ("json", "png")]

    def torch_device(self) -> torch.device:
        """The device that is named, or the default. Raises RuntimeError for what torch does not know."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
