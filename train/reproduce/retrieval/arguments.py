"""The arguments of `tnt reproduce retrieval`, and the models that it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...options import find_blocked_folder, find_broken_rules, option
from ..arguments import count_cores

WINDOW = 64  # tokens of a sliding window, and of a segment: a chunk of the global memory
PERSISTENT = 4

MODEL: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 96, "num_heads": 4, "head_dim": 24, "intermediate_size": 320,
    "global_chunk_size": WINDOW, "local_chunk_sizes": [16], "local_shard_lengths": 128, "qk_projection": "none",
}  # fmt: skip


class Row(NamedTuple):
    """A model: its title, what of `MODEL` it replaces, and its architecture."""

    title: str
    override: dict[str, Any]
    architecture: str = "tnt"


BASE = "memory"
ROWS = {
    "llama": Row("full attention alone (Llama)", {}, "llama"),
    BASE: Row("memories alone (TNT)", {}),
    "hybrid": Row("3 memories : 1 full attention", {"full_attention_interval": 4}),
    "mag": Row("MAG", {"memory_as": "gate", "sliding_window": WINDOW, "num_persistent_tokens": PERSISTENT}),
    "mal": Row("MAL", {"memory_as": "layer", "sliding_window": WINDOW, "num_persistent_tokens": PERSISTENT}),
    "mac": Row("MAC", {"memory_as": "context", "num_persistent_tokens": PERSISTENT}),
}


@dataclass
class RetrievalArguments:
    """What `tnt reproduce retrieval` needs to know; every field is a flag."""

    steps: int = option(600, "training", "optimizer steps of each model", ge=1)
    seq_len: int = option(256, "training", "tokens in a row", ge=2)
    batch_size: int = option(4, "training", "rows in a step", ge=1)
    learning_rate: float = option(3e-3, "training", "peak, the same for all models", gt=0)
    megabytes: float = option(4.0, "training", "megabytes of text that is made to train on", gt=0)
    seeds: int = option(2, "training", "seeds 0, 1, ... of each model", ge=1)
    rows: list[str] = option([], "training", f"models to train, by default all of {', '.join(ROWS)}", choices=ROWS)
    retrieval_lengths: list[int] = option(
        [64, 128, 256, 512], "evaluation", "tokens in a document; those above seq_len are longer than any text "
        "that was trained on", ge=1,
    )  # fmt: skip
    retrieval_documents: int = option(100, "evaluation", "documents of each length, for each seed", ge=1)
    device: str | None = option(None, "running", "cuda or cpu; by default cuda if there is one")
    workers: int | None = option(
        None, "running", "runs at once; by default one for each CPU core, of one thread each, and 1 on a GPU", ge=1
    )
    time_limit: float | None = option(
        None, "running", "seconds after which runs are stopped and what is finished is measured; the same command goes "
        "on from there", gt=0,
    )  # fmt: skip
    output_dir: Path = option(
        Path("runs/retrieval"), "output", "folder for retrieval.md, retrieval.json, the text and the runs. What is "
        "finished there is not run again",
    )  # fmt: skip
    overwrite: bool = option(False, "output", "replace the reproduction that output_dir holds")

    def resolve(self) -> RetrievalArguments:
        """A copy without None but for `time_limit`. Raises one ValueError that lists every problem."""
        problems = [*find_broken_rules(self), *self._find_problems(), *find_blocked_folder(self.output_dir)]
        if problems:
            raise ValueError("\n  ".join(["these arguments cannot be used:", *problems]))
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        workers = self.workers if self.workers is not None else 1 if device == "cuda" else count_cores()
        return replace(
            self, device=device, workers=workers, rows=[row for row in ROWS if row in (self.rows or ROWS)],
            retrieval_lengths=sorted(set(self.retrieval_lengths)),
        )  # fmt: skip

    def _find_problems(self) -> Iterable[str]:
        if not self.retrieval_lengths:
            yield "--retrieval-lengths must name at least one length"
        if self.device not in (None, "cuda", "cpu"):
            yield f"--device must be cuda or cpu, got {self.device!r}"
        elif self.device == "cuda" and not torch.cuda.is_available():
            yield "--device cuda: torch sees no GPU here; use --device cpu, or leave it out"
